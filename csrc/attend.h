// Attention of a described problem: in general, and reading keys and values where they are, of few rows and to a cache.
#pragma once

#include "attention_cpu.h"

namespace fastattn {

// Writes out, logsumexp and, where mode says so, weights. tile_rows, first_plane, packed_key and packed_value are not read.
void attend(const Forward& forward);

// Rows of a tile; more rows than one tile of them read packed keys faster.
constexpr int64_t kDirectRows = 64;

// Decides the tiles and the splits, and runs the tasks. Both depend on shapes alone, and the splits of a sequence on its
// own: the bits of its result depend neither on the threads nor on the rest of the batch.
void attend_directly(Direct direct);

}  // namespace fastattn
