// Python's view of the operators; positional, called by fastattn/kernels/attention/extension.py only.
#include <torch/csrc/utils/pybind.h>

#include <tuple>

#include "attention.h"
#include "instruction_set.h"
#include "lstm.h"

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

using fastattn::LstmArgs;
using Optional = std::optional<at::Tensor>;
using Tensors = std::vector<at::Tensor>;

fastattn::LstmForward lstm_forward(
    at::Tensor input, Optional batch_sizes, at::Tensor h0, at::Tensor c0, Tensors weights, bool save) {
  return fastattn::lstm_forward_cpu({input, batch_sizes, h0, c0, std::move(weights)}, save);
}

fastattn::LstmBackward lstm_backward(
    Optional grad_out, Optional grad_h_n, Optional grad_c_n, at::Tensor input, Optional batch_sizes, at::Tensor h0,
    at::Tensor c0, Tensors weights, at::Tensor out, at::Tensor gates, at::Tensor cells) {
  return fastattn::lstm_backward_cpu(
      {grad_out, grad_h_n, grad_c_n}, {input, batch_sizes, h0, c0, std::move(weights)}, out, gates, cells);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("attention_forward", &fastattn::attention_forward, NoGil());
  m.def("attention_backward", &fastattn::attention_backward, NoGil());
  m.def("attention_weights", &fastattn::attention_weights, NoGil());
  m.def("attention_weights_backward", &fastattn::attention_weights_backward, NoGil());
  m.def("lstm_forward", &lstm_forward, NoGil());
  m.def("lstm_backward", &lstm_backward, NoGil());
  m.def("instruction_sets", &fastattn::instruction_sets);
  m.def("use_instruction_set", &fastattn::use_instruction_set);
}
