// Python's view of the operators; positional, called through the modules fastattn/kernels/*/extension.py and their like.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <tuple>

#include "additive.h"
#include "attention.h"
#ifdef FASTATTN_CUDA
#include "cuda/paths.h"
#endif
#include "instruction_set.h"
#include "kept_memory.h"
#include "kv_cache.h"
#include "layer_norm_lstm.h"
#include "lstm.h"
#include "packed_attention.h"
#include "product.h"

namespace pybind11::detail {

// The problem comes as one tuple, its fields in the order of ProblemArgs.
template <>
struct type_caster<fastattn::ProblemArgs> {
  PYBIND11_TYPE_CASTER(fastattn::ProblemArgs, const_name("tuple"));

  bool load(handle source, bool convert) {
    using Tensor = std::optional<at::Tensor>;
    using Int = std::optional<int64_t>;
    using Fields =
        std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, double, double, double, int64_t, Int, Int>;
    make_caster<Fields> fields;
    if (!fields.load(source, convert)) return false;
    value = std::apply(
        [](auto&&... field) { return fastattn::ProblemArgs{std::move(field)...}; }, cast_op<Fields>(std::move(fields)));
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

using Optional = std::optional<at::Tensor>;
using Int = std::optional<int64_t>;

// Whether a mode takes part in each call of an operator, also one that traces before autograd.
bool in_a_mode() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::PreDispatch);
}

// Whether all are torch.Tensor or torch.nn.Parameter, no subclass, dense, of one dtype, on one device, and their numbers
// are what their memory holds: not to be negated, no zeros without memory, in no transform of torch.func. Keys that are
// not known here make it false.
bool plain(const pybind11::args& tensors) {
  constexpr c10::DispatchKeySet usual(
      {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA,
       c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA, c10::DispatchKey::ADInplaceOrView});
  const at::Tensor* first = nullptr;
  for (const pybind11::handle object : tensors) {
    if (!THPVariable_CheckExact(object.ptr())) return false;
    const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
    if (!first) first = &tensor;
    if (tensor.scalar_type() != first->scalar_type() || tensor.device() != first->device() ||
        tensor.layout() != at::kStrided || !usual.has_all(tensor.key_set()))
      return false;
  }
  return true;
}

std::tuple<at::Tensor, at::Tensor> packed_attention(
    at::Tensor query, at::Tensor key, at::Tensor value, at::Tensor cu_seq_q, at::Tensor cu_seq_k, Optional seqused_k,
    int64_t max_q, int64_t max_k, double scale, Int left, Int right) {
  return fastattn::packed_attention(query, key, value, {cu_seq_q, cu_seq_k, seqused_k, max_q, max_k, scale, left, right});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_attention_backward(
    Optional grad_out, Optional grad_logsumexp, at::Tensor query, at::Tensor key, at::Tensor value, at::Tensor out,
    at::Tensor logsumexp, at::Tensor cu_seq_q, at::Tensor cu_seq_k, Optional seqused_k, int64_t max_q, int64_t max_k,
    double scale, Int left, Int right) {
  return fastattn::packed_attention_backward(
      grad_out, grad_logsumexp, query, key, value, out, logsumexp,
      {cu_seq_q, cu_seq_k, seqused_k, max_q, max_k, scale, left, right});
}

at::Tensor additive_scores(
    at::Tensor query, at::Tensor key, at::Tensor weight, Optional coverage, Optional coverage_weight, Optional mask) {
  return fastattn::additive_scores({query, key, weight, coverage, coverage_weight, mask});
}

fastattn::AdditiveGradients additive_scores_backward(
    at::Tensor dscores, at::Tensor query, at::Tensor key, at::Tensor weight, Optional coverage,
    Optional coverage_weight, Optional mask, bool coverage_grad) {
  return fastattn::additive_scores_backward(
      dscores, {query, key, weight, coverage, coverage_weight, mask}, coverage_grad);
}

void kv_cache_append(
    at::Tensor key, at::Tensor value, at::Tensor new_key, at::Tensor new_value, at::Tensor lengths, Optional table) {
  fastattn::kv_cache_append({key, value, lengths, table}, new_key, new_value);
}

std::tuple<at::Tensor, at::Tensor> kv_cache_attention(
    at::Tensor query, at::Tensor key, at::Tensor value, at::Tensor lengths, Optional table, Optional slopes,
    Optional sinks, double scale, double softcap, Int left, Int right, int64_t appended) {
  return fastattn::kv_cache_attention(
      query, {key, value, lengths, table}, {slopes, sinks, scale, softcap, left, right}, appended);
}

// The LSTM computes with torch's operators among its own kernels: they must not record a graph, nor be given other types
// by autocast.
struct PlainOperators {
  at::AutoDispatchBelowADInplaceOrView no_graph;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

using Tensors = std::vector<at::Tensor>;

fastattn::LstmForward lstm_forward(
    at::Tensor input, Optional batch_sizes, at::Tensor h0, at::Tensor c0, Tensors weights, bool save) {
  return fastattn::lstm_forward_cpu({input, batch_sizes, h0, c0, std::move(weights)}, save);
}

fastattn::LstmBackward lstm_backward(
    Optional grad_out, Optional grad_h_n, Optional grad_c_n, at::Tensor input, Optional batch_sizes, at::Tensor h0,
    at::Tensor c0, Tensors weights, at::Tensor out, at::Tensor gates, at::Tensor cells, bool input_grad,
    bool weights_grad) {
  return fastattn::lstm_backward_cpu(
      {grad_out, grad_h_n, grad_c_n}, {input, batch_sizes, h0, c0, std::move(weights)}, out, gates, cells,
      {input_grad, weights_grad});
}

fastattn::LstmStepBackward lstm_step_backward(
    Optional grad_out, Optional grad_h_n, Optional grad_c_n, at::Tensor input, at::Tensor h0, at::Tensor c0,
    Tensors weights, at::Tensor gates, at::Tensor cells, bool input_grad) {
  return fastattn::lstm_step_backward_cpu(
      {grad_out, grad_h_n, grad_c_n}, {input, {}, h0, c0, std::move(weights)}, gates, cells, input_grad);
}

fastattn::LstmCellForward lstm_cell_forward(at::Tensor input, at::Tensor h0, at::Tensor c0, Tensors weights, bool save) {
  return fastattn::lstm_cell_forward_cpu({input, {}, h0, c0, std::move(weights)}, save);
}

// The arguments that both operators share come as one tuple, in the order of LayerNormLstmArgs.
using LayerNormFields = std::tuple<
    at::Tensor, Optional, at::Tensor, at::Tensor, Tensors, Optional, Optional, Optional, double, double, double>;

fastattn::LayerNormLstmArgs layer_norm_args(LayerNormFields fields) {
  return std::apply(
      [](auto&&... field) { return fastattn::LayerNormLstmArgs{std::move(field)...}; }, std::move(fields));
}

// In the order of LayerNormLstmGradients.
using LayerNormGradients = std::tuple<Optional, Optional, Optional, Optional>;

fastattn::LayerNormLstmGradients layer_norm_gradients(LayerNormGradients grads) {
  return std::apply(
      [](auto&&... grad) { return fastattn::LayerNormLstmGradients{std::move(grad)...}; }, std::move(grads));
}

fastattn::LayerNormLstmForward layer_norm_lstm_forward(LayerNormFields args, bool save, bool all_cells) {
  return fastattn::layer_norm_lstm_forward_cpu(layer_norm_args(std::move(args)), save, all_cells);
}

fastattn::LayerNormLstmBackward layer_norm_lstm_backward(
    LayerNormGradients grads, LayerNormFields args, at::Tensor out, at::Tensor saved, bool input_grad) {
  return fastattn::layer_norm_lstm_backward_cpu(
      layer_norm_gradients(std::move(grads)), layer_norm_args(std::move(args)), out, saved, input_grad);
}

#ifdef FASTATTN_CUDA
fastattn::LayerNormLstmForward layer_norm_lstm_forward_cuda(LayerNormFields args, bool save, bool all_cells) {
  return fastattn::layer_norm_lstm_forward_cuda(layer_norm_args(std::move(args)), save, all_cells);
}

fastattn::LayerNormLstmBackward layer_norm_lstm_backward_cuda(
    LayerNormGradients grads, LayerNormFields args, at::Tensor out, at::Tensor saved, bool input_grad) {
  return fastattn::layer_norm_lstm_backward_cuda(
      layer_norm_gradients(std::move(grads)), layer_norm_args(std::move(args)), out, saved, input_grad);
}

fastattn::LstmForward lstm_forward_cuda(
    at::Tensor input, Optional batch_sizes, at::Tensor h0, at::Tensor c0, Tensors weights, bool save) {
  return fastattn::lstm_forward_cuda({input, batch_sizes, h0, c0, std::move(weights)}, save);
}

fastattn::LstmBackward lstm_backward_cuda(
    Optional grad_out, Optional grad_h_n, Optional grad_c_n, at::Tensor input, Optional batch_sizes, at::Tensor h0,
    at::Tensor c0, Tensors weights, at::Tensor out, at::Tensor gates, at::Tensor cells, bool, bool) {
  return fastattn::lstm_backward_cuda(  // all gradients, whatever is wanted
      {grad_out, grad_h_n, grad_c_n}, {input, batch_sizes, h0, c0, std::move(weights)}, out, gates, cells);
}

fastattn::LstmLayersForward lstm_layers_forward_cuda(
    at::Tensor input, Optional batch_sizes, at::Tensor h0, at::Tensor c0, Tensors weights, bool save) {
  return fastattn::lstm_layers_forward_cuda({input, batch_sizes, h0, c0, std::move(weights)}, save);
}

fastattn::LstmBackward lstm_layers_backward_cuda(
    Optional grad_out, Optional grad_h_n, Optional grad_c_n, at::Tensor input, Optional batch_sizes, at::Tensor h0,
    at::Tensor c0, Tensors weights, at::Tensor out, at::Tensor gates, at::Tensor cells, at::Tensor states) {
  return fastattn::lstm_layers_backward_cuda(
      {grad_out, grad_h_n, grad_c_n}, {input, batch_sizes, h0, c0, std::move(weights)}, out, gates, cells, states);
}
#endif

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;
  using Plain = pybind11::call_guard<pybind11::gil_scoped_release, PlainOperators>;
  m.def("attention_forward", &fastattn::attention_forward, NoGil());
  m.def("attention_backward", &fastattn::attention_backward, NoGil());
  m.def("attention_weights", &fastattn::attention_weights, NoGil());
  m.def("attention_weights_backward", &fastattn::attention_weights_backward, NoGil());
  m.def("packed_attention", &packed_attention, NoGil());
  m.def("packed_attention_backward", &packed_attention_backward, NoGil());
  m.def("additive_scores", &additive_scores, Plain());
  m.def("additive_scores_backward", &additive_scores_backward, Plain());
  m.def("kv_cache_append", &kv_cache_append, NoGil());
  m.def("kv_cache_attention", &kv_cache_attention, NoGil());
  m.def("lstm_forward", &lstm_forward, Plain());
  const auto backward = [&](const char* name, auto function) {
    using namespace pybind11::literals;
    m.def(name, function, Plain(), "grad_out"_a, "grad_h_n"_a, "grad_c_n"_a, "input"_a, "batch_sizes"_a, "h0"_a,
          "c0"_a, "weights"_a, "out"_a, "gates"_a, "cells"_a, "input_grad"_a = true, "weights_grad"_a = true);
  };
  backward("lstm_backward", &lstm_backward);
  m.def("lstm_step_backward", &lstm_step_backward, Plain());
  m.def("lstm_cell_forward", &lstm_cell_forward, Plain());
  m.def("layer_norm_lstm_forward", &layer_norm_lstm_forward, Plain());
  m.def("layer_norm_lstm_backward", &layer_norm_lstm_backward, Plain());
  m.def("least_rows_of_own_products", &fastattn::least_rows_of_own_products);
  m.def("mm", &fastattn::mm, Plain());
  m.def("mm_both", &fastattn::mm_both, Plain());
  m.def("linear", &fastattn::linear, Plain());
  m.def("in_a_mode", &in_a_mode);
  m.def("profiled", &at::hasCallbacks);  // by whatever hears of each call
  m.def("plain", &plain);
  m.def("release_kept_memory", &fastattn::release_kept_memory);
  m.def("instruction_sets", &fastattn::instruction_sets);
  m.def("use_instruction_set", &fastattn::use_instruction_set);
#ifdef FASTATTN_CUDA
  m.def("lstm_forward_cuda", &lstm_forward_cuda, Plain());
  backward("lstm_backward_cuda", &lstm_backward_cuda);
  m.def("lstm_layers_forward_cuda", &lstm_layers_forward_cuda, Plain());
  m.def("lstm_layers_backward_cuda", &lstm_layers_backward_cuda, Plain());
  m.def("layer_norm_lstm_forward_cuda", &layer_norm_lstm_forward_cuda, Plain());
  m.def("layer_norm_lstm_backward_cuda", &layer_norm_lstm_backward_cuda, Plain());
  m.def("lstm_cuda_allow_persistent", &fastattn::cuda::allow_persistent);
  m.def("lstm_cuda_persistent", &fastattn::cuda::persistent);
  m.def("lstm_cuda_chunk_steps", &fastattn::cuda::set_chunk_steps);
  m.def("lstm_cuda_layers_together", &fastattn::cuda::layers_together);
#endif
}
