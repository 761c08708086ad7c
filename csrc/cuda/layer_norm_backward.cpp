// The backward of the layer-normalised CUDA LSTM, for each direction: from its last step, one launch for a step and a
// product through W_hh; the rest over all rows at once. With S (N, 4H) the gradient of the sums of the gates, G_x and
// G_h those of W_ih x and W_hh (m h_{t-1}), du that of u = gain_c n_c + bias_c, and sums over the rows:
//
//     dx = G_x W_ih,   dW_ih = G_x^T x,   dW_hh = G_h^T (m h_{t-1})
//     dgain_x = sum S n_x,   dgain_h = sum S n_h,   dbias = sum S,   dgain_c = sum du n_c,   dbias_c = sum du
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "layer_norm_call.h"

namespace fastattn {

using namespace cuda;

namespace {

// The forward's arguments and results and the gradients of these, dense.
struct Backward {
  const LayerNormLstmArgs& args;
  at::Tensor out, saved;            // (N, D H), flat
  at::Tensor grad_out, grad_cells;  // (N, D H), or undefined
  at::Tensor h0, c0;
  at::Tensor grad_h0, grad_c0;  // (D, B, H)
};

// One direction's S, du and G_h.
struct Recurrence {
  at::Tensor grad_sums, grad_squashed, grad_product;  // float32 (N, H, 4) and (N, H), (N, 4H)
};

at::Tensor dense_rows(const std::optional<at::Tensor>& tensor, const LstmShape& s) {
  return tensor ? tensor->contiguous().view({s.rows, s.directions * s.hidden}) : at::Tensor();
}

// float32 (B, H) of its own; zeros for none.
at::Tensor state_gradient(const std::optional<at::Tensor>& grad, const LayerNormLstmArgs& args, int64_t d) {
  const at::Tensor result = at::zeros({args.h0.size(1), args.h0.size(2)}, args.h0.options().dtype(at::kFloat));
  if (grad) result.copy_((*grad)[d]);
  return result;
}

// Rows join at their last step and stay as their first step leaves them.
Recurrence recur(
    const LayerNormCall& call, const Backward& backward, const LayerNormLstmGradients& grad, int64_t d) {
  const LstmShape& s = call.shape();
  const auto options = backward.args.input.options(), floats = options.dtype(at::kFloat);
  const Recurrence result{
      at::empty({s.rows, s.hidden, 4}, floats), at::empty({s.rows, s.hidden}, floats),
      at::empty({s.rows, 4 * s.hidden}, options)};
  const at::Tensor grad_hidden = state_gradient(grad.h_n, backward.args, d);
  const at::Tensor grad_cell = state_gradient(grad.c_n, backward.args, d);
  const at::Tensor grad_input = at::zeros({s.batch, s.hidden}, floats);
  LayerNormBackwardStep launch{};
  launch.weights = call.weights(d);
  launch.zoneout_h = call.hidden_zoneout(d);
  launch.zoneout_c = call.cell_zoneout(d);
  launch.mask = call.mask(d);
  launch.saved = call.saved(backward.saved, d);
  if (backward.grad_out.defined()) launch.grad_out = at_column(backward.grad_out, d * s.hidden);
  if (backward.grad_cells.defined()) launch.grad_cells = at_column(backward.grad_cells, d * s.hidden);
  launch.grad_input = grad_input.const_data_ptr<float>();
  launch.c0 = at_column(backward.c0, d * s.batch * s.hidden);
  launch.grad_hidden = grad_hidden.mutable_data_ptr<float>();
  launch.grad_cell = grad_cell.mutable_data_ptr<float>();
  launch.grad_sums = result.grad_sums.mutable_data_ptr<float>();
  launch.grad_squashed = result.grad_squashed.mutable_data_ptr<float>();
  launch.grad_product = result.grad_product.data_ptr();
  launch.grad_stride = s.directions * s.hidden;
  launch.hidden = s.hidden;
  for (int64_t step = s.steps - 1; step >= 0; --step) {
    const int64_t t = call.plain.step(d, step), onward = d == 1 ? -1 : 1;
    const Place here = call.place(t), later = call.place(t + onward), previous = call.place(t - onward);
    launch.first_row = here.first;
    launch.rows = here.rows;
    launch.later_row = later.first;
    launch.later_rows = later.rows;
    launch.previous_row = previous.first;
    launch.previous_rows = previous.rows;
    layer_norm_backward_step(call.plain.type, launch, call.plain.stream);
    multiply(
        grad_input.narrow(0, 0, here.rows), result.grad_product.narrow(0, here.first, here.rows),
        call.plain.directions[static_cast<size_t>(d)].w_hh);
  }
  const at::Tensor through_product = call.h_mask.defined() ? at::mul(grad_input, call.first_mask(d)) : grad_input;
  backward.grad_h0[d].copy_(at::add(grad_hidden, through_product));
  backward.grad_c0[d].copy_(grad_cell);
  return result;
}

// G_x.
at::Tensor grad_of_product(
    const LayerNormCall& call, const Backward& backward, const Recurrence& recurrence, int64_t d) {
  const LstmShape& s = call.shape();
  const LayerNormSaved saved = call.saved(backward.saved, d);
  const at::Tensor result = at::empty({s.rows, 4 * s.hidden}, backward.args.input.options());
  input_gradients(
      call.plain.type,
      {call.weights(d).gain_x, recurrence.grad_sums.const_data_ptr<float>(), saved.normal_x, saved.deviations,
       result.data_ptr(), s.rows, s.hidden},
      call.plain.stream);
  return result;
}

// m h_{t-1} of all rows, (N, H).
at::Tensor inputs_of_w_hh(const LayerNormCall& call, const Backward& backward, int64_t d) {
  const LstmShape& s = call.shape();
  const at::Tensor result = at::empty({s.rows, s.hidden}, backward.args.input.options());
  const Previous source{at_column(backward.out, d * s.hidden),
                        at_column(backward.h0, d * s.batch * s.hidden),
                        result.data_ptr(),
                        s.directions * s.hidden,
                        s.hidden,
                        call.plain.steps(),
                        d == 1,
                        call.mask(d)};
  previous_states(call.plain.type, source, call.plain.stream);
  return result;
}

// Gradients of gains and biases, appended to `grads` in the order of the operator.
void vector_gradients(
    const LayerNormCall& call, const Backward& backward, const Recurrence& recurrence, int64_t d,
    std::vector<at::Tensor>& grads) {
  const LstmShape& s = call.shape();
  const int64_t chunks = (s.rows + kChunkRows - 1) / kChunkRows;
  const at::Tensor partial = at::empty({chunks, 14, s.hidden}, backward.saved.options());
  column_sums(
      {recurrence.grad_sums.const_data_ptr<float>(), recurrence.grad_squashed.const_data_ptr<float>(),
       call.saved(backward.saved, d), partial.mutable_data_ptr<float>(), s.rows, s.hidden},
      call.plain.stream);
  const at::Tensor sums = at::sum(partial, {0});
  const auto of = [&](int64_t first, int64_t count) {
    const at::Tensor grad = at::empty({count * s.hidden}, backward.args.input.options());
    grad.copy_(sums.narrow(0, first, count).view({-1}));
    grads.push_back(grad);
  };
  of(0, 4);
  of(4, 4);
  of(12, 1);
  if (!call.vectors[static_cast<size_t>(d)].bias.defined()) return;
  of(8, 4);
  of(13, 1);
}

}  // namespace

LayerNormLstmBackward layer_norm_lstm_backward_cuda(
    const LayerNormLstmGradients& grad, const LayerNormLstmArgs& args, const at::Tensor& out, const at::Tensor& saved,
    bool input_grad) {
  const LstmShape s = layer_norm_lstm_shape(args);
  check_layer_norm_lstm_backward(s, grad, args, out, saved, saved_floats(s));
  const LayerNormCall call(args);
  const auto options = args.input.options();
  const Backward backward{
      args, dense_rows(out, s), saved, dense_rows(grad.out, s), dense_rows(grad.cells, s), args.h0.contiguous(),
      args.c0.contiguous(), at::empty({s.directions, s.batch, s.hidden}, options),
      at::empty({s.directions, s.batch, s.hidden}, options)};
  const at::Tensor input = args.input.reshape({s.rows, s.inputs});
  at::Tensor grad_input = at::empty({0}, options);
  std::vector<at::Tensor> grad_weights;
  for (int64_t d = 0; d < s.directions; ++d) {
    const Recurrence recurrence = recur(call, backward, grad, d);
    const at::Tensor grad_product = grad_of_product(call, backward, recurrence, d);
    grad_weights.push_back(at::mm(grad_product.t(), input));
    grad_weights.push_back(at::mm(recurrence.grad_product.t(), inputs_of_w_hh(call, backward, d)));
    vector_gradients(call, backward, recurrence, d, grad_weights);
    const at::Tensor& w_ih = call.plain.directions[static_cast<size_t>(d)].w_ih;
    if (input_grad) grad_input = d == 0 ? at::mm(grad_product, w_ih) : at::addmm(grad_input, grad_product, w_ih);
  }
  if (input_grad) grad_input = grad_input.view(args.input.sizes());
  return {grad_input, backward.grad_h0, backward.grad_c0, grad_weights};
}

}  // namespace fastattn
