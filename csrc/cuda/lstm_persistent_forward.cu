// The forward of many steps in one launch. A block owns 8 units: 32 rows of W_hh, in the two tiles (i, f) and
// (g, o), so that one lane gets the four gates of a unit.
#include "lstm_persistent.cuh"

namespace fastattn::cuda {

namespace {

constexpr int kUnits = 8;
constexpr int kRows = kThreads / kUnits;  // rows of the batch at a time: one cell for each thread
constexpr int kPitch = kRows + 1;         // odd: threads of 8 units meet in no bank

constexpr int kPartials = kWarps * kUnits * kPitch;  // Gates<float> of one set of partial sums

template <class T, bool EXACT, int BLOCKS>
FASTATTN_INLINE void load_weights(const T* w, int64_t hidden, int unit_block, Weights<EXACT, 2, BLOCKS>& weights) {
  const int64_t unit = unit_block * kUnits + threadIdx.x % 32 / 4;
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
    const int64_t k = depth_of<T>(block), count = unit < hidden ? hidden - k : 0;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
      weights.set(block, gate, gather<T, EXACT>(w + (gate * hidden + unit) * hidden + k, 1, count));
    __syncthreads();  // else the assembler issues all these loads at once, into registers it has not
  }
}

// This warp's share of the sums of 8 COLUMNS rows, to shared memory.
template <int COLUMNS, class T, bool EXACT, int BLOCKS>
FASTATTN_INLINE void partial_sums(
    const Weights<EXACT, 2, BLOCKS>& weights, const T* rows, int64_t stride, int count, int depth,
    Gates<float>* partial) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum[COLUMNS][2][4] = {};
  multiply(weights, rows, stride, count, depth, sum);
  Gates<float>* to = partial + (warp * kUnits + lane / 4) * kPitch + lane % 4 * 2;
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      to[8 * c + i] = {sum[c][0][i], sum[c][0][2 + i], sum[c][1][i], sum[c][1][2 + i]};
}

// Of more than 16 rows; float32 leaves no registers for all 32 rows at once.
template <class T, bool EXACT, int BLOCKS>
FASTATTN_INLINE void partial_sums_of_all(
    const Weights<EXACT, 2, BLOCKS>& weights, const T* rows, int64_t stride, int count, int depth,
    Gates<float>* partial) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll 1
    for (int begin = 0; begin < count; begin += 16)
      partial_sums<2>(weights, rows + begin * stride, stride, count - begin, depth, partial + begin);
  } else {
    partial_sums<4>(weights, rows, stride, count, depth, partial);
  }
}

template <class T, bool EXACT, int BLOCKS>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ PersistentForward a) {
  FASTATTN_SHARED(shared);
  // Two sets of partial sums in turn: a thread may write one while others still read the other.
  auto* partials = reinterpret_cast<Gates<float>*>(shared);
  auto* cell_state = reinterpret_cast<float*>(partials + 2 * kPartials);  // a thread's own: no barrier around it

  const Owner own = owner(a);
  const ForwardPart& part = a.part[own.part];
  const int64_t H = a.part[0].cells.hidden, stride = a.groups * a.depth;
  const bool reverse = part.reverse;
  uint32_t* arrivals = part.arrivals + own.group;
  T* exchange = static_cast<T*>(part.exchange) + own.group * a.depth;
  Weights<EXACT, 2, BLOCKS> weights;
  weights.shared = reinterpret_cast<Vector16*>(cell_state + kMaxGroupRows * kUnits);
  load_weights(static_cast<const T*>(part.weight), H, own.unit_block, weights);

  const int unit = threadIdx.x % kUnits, lane_row = threadIdx.x / kUnits;
  const int groups = static_cast<int>(a.groups), j = own.unit_block * kUnits + unit;
  const Gates<float> bias = j < H ? bias_sums<T>(part.cells, j) : Gates<float>{};
  const int most = group_rows(static_cast<int>(a.steps.batch), own.group, groups);
  const int steps = group_steps(a.steps, own.group);
  const Turns turns = turns_of(part, steps, reverse);
  for (int i = lane_row; i < most && j < H; i += kRows) {
    const int64_t at = (own.group + i * groups) * H + j;
    cell_state[i * kUnits + unit] = turns.begin > 0 ? part.cell_state[at] : element<T>(part.c0, at);
  }

  int turn = 0;
  for (int s = turns.begin; s < turns.end; ++s) {
    // Read the arguments anew at each step: kept over all of them, they would take the registers of weights.
    uint32_t p = own.part;
    opaque(p);
    const ForwardCells& cells = a.part[p].cells;
    const int t = reverse ? steps - 1 - s : s;
    const int64_t first = first_row(a.steps, t);
    const int rows = group_rows(rows_of(a.steps, t), own.group, groups);
    const int after = rows_of(a.steps, reverse ? t - 1 : t + 1);  // rows that go on
    const T* state = exchange + s % 2 * a.steps.batch * a.depth;
    T* next = exchange + (s + 1) % 2 * a.steps.batch * a.depth;
    for (int begin = 0; begin < rows; begin += kRows) {
      const int count = rows - begin < kRows ? rows - begin : kRows, i = begin + lane_row;
      const bool mine = lane_row < count && j < H;
      const int b = own.group + i * groups;
      Gates<float> sums = mine ? input_sums<T>(cells, first + b, j) + bias : Gates<float>{};
      if (begin == 0 && s > 0) wait(arrivals, static_cast<uint32_t>(s) * static_cast<uint32_t>(a.unit_blocks));

      Gates<float>* partial = partials + turn * kPartials;
      turn ^= 1;
      const T* from = state + begin * stride;
      const int depth = static_cast<int>(a.depth);
      __syncwarp();  // the tensor cores want all lanes, and those without a cell have skipped it
      if (count > 16)
        partial_sums_of_all(weights, from, stride, count, depth, partial);
      else if (count > 8)
        partial_sums<2>(weights, from, stride, count, depth, partial);
      else
        partial_sums<1>(weights, from, stride, count, depth, partial);
      __syncthreads();
      if (!mine) continue;

#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sums = sums + partial[(warp * kUnits + unit) * kPitch + lane_row];
      float c = cell_state[i * kUnits + unit];
      const float h = forward_cell<T>(cells, first + b, j, sums, c);
      cell_state[i * kUnits + unit] = c;
      put<T>(next, i * stride + j, h);
      if (b >= after || (reverse && t == 0)) {
        put<T>(a.part[p].h_n, b * H + j, h);
        put<T>(a.part[p].c_n, b * H + j, c);
      }
    }
    if (s + 1 < steps) arrive(arrivals);
  }
  for (int i = lane_row; i < most && j < H && turns.end < steps; i += kRows)
    part.cell_state[(own.group + i * groups) * H + j] = cell_state[i * kUnits + unit];
}

template <class T, bool EXACT, int BLOCKS>
Launch<PersistentForward> of_blocks() {
  return {
      forward_kernel<T, EXACT, BLOCKS>, 2 * kPartials * int64_t{sizeof(Gates<float>)} +
                                            kMaxGroupRows * kUnits * int64_t{sizeof(float)} +
                                            Weights<EXACT, 2, BLOCKS>::kSharedBytes};
}

template <class T, bool EXACT>
Launch<PersistentForward> of_size(int64_t hidden) {
  constexpr int unit = sizeof(T) / 2;  // so many blocks for each warp are 256 elements of each row
  if (hidden <= 256) return of_blocks<T, EXACT, unit>();
  if (hidden <= 512) return of_blocks<T, EXACT, 2 * unit>();
  if (hidden <= 1024) return of_blocks<T, EXACT, 4 * unit>();
  return {};
}

Launch<PersistentForward> launch_for(Element type, bool tf32, int64_t hidden) {
  switch (type) {
    case Element::half: return of_size<half, false>(hidden);
    case Element::bfloat16: return of_size<bfloat16, false>(hidden);
    default: return tf32 ? of_size<float, false>(hidden) : of_size<float, true>(hidden);
  }
}

}  // namespace

int64_t forward_depth(Element type, int64_t hidden) {
  const int64_t depth = type == Element::single ? kDepth<float> : kDepth<half>;
  return (hidden + depth - 1) / depth * depth;
}

Plan plan_forward(Element type, bool tf32, int64_t parts, int64_t batch, int64_t hidden) {
  return plan_for(launch_for(type, tf32, hidden), parts, batch, (hidden + kUnits - 1) / kUnits);
}

void persistent_forward(Element type, bool tf32, const PersistentForward& args, void* stream) {
  const auto launch = launch_for(type, tf32, args.part[0].cells.hidden);
  launch_together(
      launch.kernel, args.parts * args.groups * args.unit_blocks, kThreads, launch.shared_bytes, args, stream);
}

}  // namespace fastattn::cuda
