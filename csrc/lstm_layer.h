// What the forward and the backward of the CPU LSTM share: float32 tensors, packed weights, and who does which rows.
#pragma once

#include "aligned.h"
#include "lstm_cpu.h"
#include "lstm_shape.h"
#include "team.h"

namespace fastattn {

// `tensor` as contiguous float32: itself where it is that.
at::Tensor dense_float(const at::Tensor& tensor);

// `tensor` as that type: itself where it is that, without asking torch, which for a cell counts.
inline at::Tensor as_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

Type lstm_type(at::ScalarType type);

// lstm_shape, or lstm_cell_shape, for tensors on the CPU.
LstmShape cpu_shape(const LstmArgs& args, bool cell = false);

// How the products of a call are made, in the types of its tensors; `gradients` are operands, too. Products are split
// where a step has `least_rows` on average.
LstmForm lstm_form(
    const LstmShape& shape, const LstmArgs& args, int64_t least_rows, at::TensorList gradients = {});

// `tensor` contiguous, as bfloat16 where the form takes that, else as float32.
inline at::Tensor operand(const at::Tensor& tensor, LstmForm form) {
  return is_half(form) ? tensor.contiguous() : dense_float(tensor);
}

// Where element `offset` of such an operand stands.
inline char* at_element(const at::Tensor& tensor, int64_t offset) {
  return static_cast<char*>(tensor.data_ptr()) + offset * static_cast<int64_t>(tensor.element_size());
}

// W (4H, K) as panels (Hr / 16, K, 64), one per block of units: what the forward multiplies x or h with.
Floats pack_gates(const at::Tensor& weight, int64_t hidden, LstmForm form);

// A matrix (K, columns) as panels (columns / 64 rounded up, K, 64), zeros beyond the columns.
Floats pack_columns(const at::Tensor& matrix, LstmForm form);

// W (4H, K), b (4H) or, with `dim` 1, products (N, 4H) with the gates block by block, as in a panel, 4Hr for 4H; and
// the way back, for a gradient.
at::Tensor gate_blocks(const at::Tensor& gates, int64_t hidden, int64_t dim = 0);
at::Tensor from_gate_blocks(const at::Tensor& blocks, int64_t hidden, int64_t dim = 0);

// States (..., H) as float32 (..., Hr), zeros beyond H: themselves where they are that, and a copy in any case.
at::Tensor padded_state(const at::Tensor& state, int64_t units);
at::Tensor copy_of_state(const at::Tensor& state, int64_t units);

// The way back for a result: padded states (..., Hr) as contiguous (..., H) of that type.
at::Tensor unpadded_state(const at::Tensor& padded, int64_t hidden, at::ScalarType type);

// h_{t-1} of every row in direction d, (N, P), from out (N, D P) and h0 (D, B, P): contiguous, of one type.
at::Tensor states_before(const LstmShape& shape, int64_t d, const at::Tensor& out, const at::Tensor& h0);

// Which thread does what: a direction, rows of the batch, and a share of the units. Threads with the same direction and
// rows are a group and meet at a barrier after each step; groups need not know of each other.
struct Part {
  int64_t direction;
  Range rows;
  int64_t member, members;  // of the group
  int64_t group;
};

// Splits directions and rows over `threads`; rows by the steps they have, so that packed batches split evenly. No group
// has so few rows that the weights it reads in a step are not worth it: then its units are split. Where the directions do
// not run at the same time, each thread has a part of both, that of the first direction first.
std::vector<Part> lstm_parts(const LstmShape& shape, LstmForm form, int64_t threads);

inline int64_t weight_bytes(const LstmShape& shape) {
  return 4 * shape.hidden * (shape.inputs + shape.state) * static_cast<int64_t>(sizeof(float));
}

// How a step reads the weights, of float32 or of the form's type.
inline Reading weights_reading(const LstmShape& shape, LstmForm form) {
  return panel_reading(weight_bytes(shape) / (is_half(form) ? 2 : 1));
}

// Rows of a group that fill register tiles, and rows that are worth reading all weights for in each step.
constexpr int64_t kRowsOfATile = 12, kRowsWorthWeights = 64;

// Whether the call is long enough to wake other threads for.
bool worth_a_team(const LstmShape& shape);

// Makes results and operands below the smallest normal number zero, for a scope: they cost a hundred times as much, and
// an LSTM whose gradient fades away is full of them.
class FlushDenormals {
 public:
  FlushDenormals();
  ~FlushDenormals();

 private:
  uint32_t saved_ = 0;
};

// Runs f(part, barrier, scratch) for every part, those of a group at the same time.
template <class F>
void run_parts(const LstmShape& shape, LstmForm form, F f) {
  const int64_t threads = std::max<int64_t>(at::get_num_threads(), 1);
  std::vector<Barrier> barriers(static_cast<size_t>(threads * shape.directions));  // at most so many groups
  const std::vector<Floats> scratch = [&] {
    std::vector<Floats> each;
    const int64_t depth = shape.inputs + shape.state + 4 * shape.units();
    for (int64_t i = 0; i < threads; ++i) each.emplace_back(lstm_scratch(depth));
    return each;
  }();
  const bool worthwhile = worth_a_team(shape);
  std::atomic<bool> ready{false};
  run_team(worthwhile ? threads : 1, [&](int64_t member, int64_t members) {
    const FlushDenormals flush;
    const std::vector<Part> parts = lstm_parts(shape, form, members);
    // The number of threads is known only now; the first one tells the barriers.
    if (member == 0) {
      for (const Part& part : parts) barriers[static_cast<size_t>(part.group)].set_members(part.members);
      ready.store(true, std::memory_order_release);
    } else {
      spin_until([&] { return ready.load(std::memory_order_acquire); });
    }
    for (size_t i = static_cast<size_t>(member); i < parts.size(); i += static_cast<size_t>(members))
      f(parts[i], barriers[static_cast<size_t>(parts[i].group)], scratch[static_cast<size_t>(member)].get());
  });
}

}  // namespace fastattn
