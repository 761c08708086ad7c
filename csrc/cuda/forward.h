// The forward of one layer of the CUDA LSTM, and what a stack of layers side by side shares with it.
#pragma once

#include "call.h"

namespace fastattn::cuda {

// The states of some parts: the directions of a layer, or layers of a stack. h0 and c0 are read, h_n and c_n written.
struct States {
  at::Tensor h0, c0;    // (parts, B, P), (parts, B, H), c0 dense
  at::Tensor h_n, c_n;  // likewise, both dense

  States narrow(int64_t begin, int64_t count) const {
    return {h0.narrow(0, begin, count), c0.narrow(0, begin, count), h_n.narrow(0, begin, count),
            c_n.narrow(0, begin, count)};
  }
};

// One layer, whose results are written where they are to stand.
struct ForwardLayer {
  const Direction* weights;  // of each direction
  States states;
  at::Tensor out;           // (N, D P) dense
  at::Tensor gates, cells;  // (N, D, 4 Hr), (N, D, Hr) dense, or empty: not saved
};

// From `input` (N, I).
void forward_layer(const Call& call, const at::Tensor& input, const ForwardLayer& layer);

// The cells of direction d, but for the input gates.
ForwardCells cells_of(const Call& call, const ForwardLayer& layer, int64_t d);

// A launch of some parts over all steps, with the memory of what its kernel keeps.
struct ForwardLaunch {
  PersistentForward args{};
  at::Tensor exchange, cell_state, arrivals;
};
ForwardLaunch forward_launch(
    const Call& call, const Plan& plan, const States& states, const Direction* weights, const ForwardCells* cells);

}  // namespace fastattn::cuda
