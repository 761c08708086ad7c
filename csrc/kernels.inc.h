// Every kernel for one instruction set. The including file says which: it defines ISA, a namespace of its own, and
//
//     kLanes         floats in a vector register
//     kMaxVectors    registers across one register block of the matrix product
//     kAccumulators  accumulators of a block: the register file less what the operands need
//     kMaxRows       most rows of a block
//
// No function of a standard or torch header may be called here: a shared inline function compiled for AVX-512 could be
// the copy that the linker keeps for everyone. So the headers below have no includes and no include guards.

namespace fastattn {
namespace ISA {
namespace {

#include "vec.h"
#include "gemm.h"
#include "convert.h"
#include "philox.h"
#include "amx.h"
#include "stream.h"
#include "split_tile.h"
#include "panels_tile.h"
#include "score_tile.h"
#include "weights_rows.h"
#include "forward_tile.h"
#include "direct_tile.h"
#include "weights_tile.h"
#include "backward_tile.h"
#include "additive_tile.h"
#include "lstm_tile.h"
#include "layer_norm_lstm_tile.h"

}  // namespace

extern const Kernels table;
const Kernels table = {
    ISA_NAME,       forward_pack,    forward_scratch, forward_tile,     direct_scratch, direct_tile,
    direct_join,    weights_pack,    weights_scratch, weights_tile,     backward_scratch, backward_task,
    &additive_table, &lstm_table,    &layer_norm_lstm_table, &split_table, &panel_table,
};

}  // namespace ISA
}  // namespace fastattn
