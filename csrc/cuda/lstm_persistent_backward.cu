// The backward of many steps in one launch. A block owns 16 units, 16 columns of W_hh: the gradient of their h_t
// is the product with G, the gradient of all 4 H sums of the step after, which the other blocks left in global memory.
#include "lstm_persistent.cuh"

namespace fastattn::cuda {

namespace {

constexpr int kUnits = 16;
constexpr int kRows = kThreads / kUnits;  // rows of the batch at a time: one cell for each thread
constexpr int kPitch = kRows + 1;

constexpr int kPartials = kWarps * kUnits * kPitch;  // floats of one set of partial sums

// Rows of G are (4, units): the depth is gate by gate, each padded to `units`, which no vector straddles.
template <class T, bool EXACT, int BLOCKS>
FASTATTN_INLINE void load_weights(
    const T* w, int64_t hidden, int units, int unit_block, Weights<EXACT, 1, BLOCKS>& weights) {
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
    const int gate = depth_of<T>(block) / units, k = depth_of<T>(block) % units;
#pragma unroll
    for (int octet = 0; octet < 2; ++octet) {
      const int64_t unit = unit_block * kUnits + octet * 8 + threadIdx.x % 32 / 4;
      const int64_t count = unit < hidden && gate < 4 ? hidden - k : 0;
      weights.set(block, octet, gather<T, EXACT>(w + (gate * hidden + k) * hidden + unit, hidden, count));
    }
    __syncthreads();  // else the assembler issues all these loads at once, into registers it has not
  }
}

// This warp's share of the sums of 8 COLUMNS rows, to shared memory.
template <int COLUMNS, class T, bool EXACT, int BLOCKS>
FASTATTN_INLINE void partial_sums(
    const Weights<EXACT, 1, BLOCKS>& weights, const T* rows, int64_t stride, int count, int depth, float* partial) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum[COLUMNS][1][4] = {};
  multiply(weights, rows, stride, count, depth, sum);
  float* to = partial + (warp * kUnits + lane / 4) * kPitch + lane % 4 * 2;
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i / 2 * 8 * kPitch + 8 * c + i % 2] = sum[c][0][i];
}

template <class T, bool EXACT, int BLOCKS>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const __grid_constant__ PersistentBackward a) {
  FASTATTN_SHARED(shared);
  // Two sets of partial sums in turn: a thread may write one while others still read the other.
  auto* partials = reinterpret_cast<float*>(shared);
  float* grad_cell = partials + 2 * kPartials;  // a thread's own: no barrier around it

  const Owner own = owner(a);
  const BackwardPart& part = a.part[own.part];
  const int64_t H = a.part[0].cells.hidden, width = 4 * a.part[0].cells.unit_stride, stride = a.groups * width;
  const bool reverse = part.reverse;
  uint32_t* arrivals = part.arrivals + own.group;
  T* grad_gates = static_cast<T*>(part.cells.grad_gates) + own.group * width;
  Weights<EXACT, 1, BLOCKS> weights;
  weights.shared = reinterpret_cast<Vector16*>(grad_cell + kMaxGroupRows * kUnits);
  load_weights(
      static_cast<const T*>(part.weight), H, static_cast<int>(a.part[0].cells.unit_stride), own.unit_block, weights);

  const int unit = threadIdx.x % kUnits, lane_row = threadIdx.x / kUnits;
  const int groups = static_cast<int>(a.groups), j = own.unit_block * kUnits + unit;
  const int most = group_rows(static_cast<int>(a.steps.batch), own.group, groups);
  const int steps = group_steps(a.steps, own.group);
  const Turns turns = turns_of(part, steps, !reverse);
  for (int i = lane_row; i < most && j < H && turns.begin > 0; i += kRows)
    grad_cell[i * kUnits + unit] = part.grad_cell[(own.group + i * groups) * H + j];

  int turn = 0;
  for (int s = turns.begin; s < turns.end; ++s) {
    // Read the arguments anew at each step: kept over all of them, they would take the registers of weights.
    uint32_t p = own.part;
    opaque(p);
    const BackwardCells& cells = a.part[p].cells;
    // Against the forward's order: `after` is the step done just now, `before` the one whose cells these come from.
    const int t = reverse ? s : steps - 1 - s, after = reverse ? t - 1 : t + 1, before = reverse ? t + 1 : t - 1;
    const int64_t first = first_row(a.steps, t);
    const int previous_rows = rows_of(a.steps, before);
    const int rows = group_rows(rows_of(a.steps, t), own.group, groups);
    const int rows_after = group_rows(rows_of(a.steps, after), own.group, groups);
    const int carried = rows < rows_after ? rows : rows_after;  // the others end with this step
    for (int begin = 0; begin < rows; begin += kRows) {
      const int i = begin + lane_row;
      const bool mine = i < rows && j < H;
      const int b = own.group + i * groups;
      Saved saved{};
      if (mine) saved = load_saved<T>(cells, first + b, b < previous_rows ? first_row(a.steps, before) + b : -1, b, j);
      if (begin == 0 && s > 0) wait(arrivals, static_cast<uint32_t>(s) * static_cast<uint32_t>(a.unit_blocks));

      const float* partial = partials + turn * kPartials;
      if (begin < carried) {
        const int count = carried - begin < kRows ? carried - begin : kRows, depth = static_cast<int>(width);
        const T* from = grad_gates + first_row(a.steps, after) * width + begin * stride;
        float* to = partials + turn * kPartials;
        __syncwarp();  // the tensor cores want all lanes
        constexpr int columns = sizeof(T) == 4 ? 1 : 2;  // float32 leaves no registers for all 16 rows at once
        if (count <= 8)
          partial_sums<1>(weights, from, stride, count, depth, to);
        else
#pragma unroll 1
          for (int row = 0; row < count; row += 8 * columns)
            partial_sums<columns>(weights, from + row * stride, stride, count - row, depth, to + row);
        __syncthreads();
        turn ^= 1;
      }
      if (mine) {
        float grad_h = 0.0f, grad_c = 0.0f;
        if (i < carried) {
#pragma unroll
          for (int warp = 0; warp < kWarps; ++warp) grad_h += partial[(warp * kUnits + unit) * kPitch + lane_row];
          grad_c = grad_cell[i * kUnits + unit];
        } else {
          if (a.part[p].grad_h_n) grad_h = element<T>(a.part[p].grad_h_n, b * H + j);
          if (a.part[p].grad_c_n) grad_c = element<T>(a.part[p].grad_c_n, b * H + j);
        }
        grad_c = backward_cell<T>(cells, first + b, j, saved, grad_h, grad_c);
        grad_cell[i * kUnits + unit] = grad_c;
        if (b >= previous_rows) put<T>(a.part[p].grad_c0, b * H + j, grad_c);
      } else if (i < rows) {
        // The next product reads the padding.
        for (int gate = 0; gate < 4; ++gate)
          put<T>(grad_gates, first * width + i * stride + gate * cells.unit_stride + j, 0.0f);
      }
    }
    if (s + 1 < steps) arrive(arrivals);
  }
  for (int i = lane_row; i < most && j < H && turns.end < steps; i += kRows)
    part.grad_cell[(own.group + i * groups) * H + j] = grad_cell[i * kUnits + unit];
}

template <class T, bool EXACT, int BLOCKS>
Launch<PersistentBackward> of_blocks() {
  return {
      backward_kernel<T, EXACT, BLOCKS>,
      (2 * kPartials + kMaxGroupRows * kUnits) * int64_t{sizeof(float)} + Weights<EXACT, 1, BLOCKS>::kSharedBytes};
}

template <class T, bool EXACT>
Launch<PersistentBackward> of_size(int64_t hidden) {
  constexpr int unit = 2 * sizeof(T);  // so many blocks for each warp are 4 x 256 elements of each row
  if (hidden <= 256) return of_blocks<T, EXACT, unit>();
  if (hidden <= 512) return of_blocks<T, EXACT, 2 * unit>();
  if (hidden <= 1024) return of_blocks<T, EXACT, 4 * unit>();
  return {};
}

Launch<PersistentBackward> launch_for(Element type, bool tf32, int64_t hidden) {
  switch (type) {
    case Element::half: return of_size<half, false>(hidden);
    case Element::bfloat16: return of_size<bfloat16, false>(hidden);
    default: return tf32 ? of_size<float, false>(hidden) : of_size<float, true>(hidden);
  }
}

}  // namespace

Plan plan_backward(Element type, bool tf32, int64_t parts, int64_t batch, int64_t hidden) {
  return plan_for(launch_for(type, tf32, hidden), parts, batch, (hidden + kUnits - 1) / kUnits);
}

void persistent_backward(Element type, bool tf32, const PersistentBackward& args, void* stream) {
  const auto launch = launch_for(type, tf32, args.part[0].cells.hidden);
  launch_together(
      launch.kernel, args.parts * args.groups * args.unit_blocks, kThreads, launch.shared_bytes, args, stream);
}

}  // namespace fastattn::cuda
