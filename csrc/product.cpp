#include "product.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <limits>

#include "kept_memory.h"
#include "panels.h"
#include "split.h"
#include "tensor_operand.h"

namespace fastattn {

// left (M, K) right (N, K)^T plus a bias (N) where it is defined, to `out`, or to a new tensor where that is not defined;
// not at all, and false, where torch's product is the one to take.
static bool own_product(at::Tensor& out, const at::Tensor& left, const at::Tensor& right, const at::Tensor& bias) {
  if (left.dim() != 2 || right.dim() != 2) return false;
  const bool split = can_split(left, right);
  if (!split && !worth_panels(left, right)) return false;
  if (!out.defined()) out = kept_empty({left.size(0), right.size(0)}, left.options());
  if (split)
    split_product(out, left, right, bias);
  else
    panel_products(left, {{out, right, bias}});
  return true;
}

at::Tensor mm(const at::Tensor& left, const at::Tensor& right) {
  at::Tensor out;
  return right.dim() == 2 && own_product(out, left, right.t(), {}) ? out : at::mm(left, right);
}

std::pair<at::Tensor, at::Tensor> mm_both(const at::Tensor& left, const at::Tensor& first, const at::Tensor& second) {
  const auto by_panels = [&](const at::Tensor& right) {
    return right.dim() == 2 && left.dim() == 2 && !can_split(left, right.t()) && worth_panels(left, right.t());
  };
  if (!by_panels(first) || !by_panels(second)) return {fastattn::mm(left, first), fastattn::mm(left, second)};
  const auto out = [&](const at::Tensor& right) {
    return kept_empty({left.size(0), right.size(1)}, left.options());
  };
  std::pair<at::Tensor, at::Tensor> both{out(first), out(second)};
  panel_products(left, {{both.first, first.t(), {}}, {both.second, second.t(), {}}});
  return both;
}

void mm_out(at::Tensor& out, const at::Tensor& left, const at::Tensor& right) {
  if (!own_product(out, left, right.t(), {})) at::mm_out(out, left, right);
}

void add_mm(at::Tensor& out, const at::Tensor& left, const at::Tensor& right) {
  if (!out.defined())
    out = fastattn::mm(left, right);
  else if (worth_panels(left, right.t()))
    panel_products(left, {{out, right.t(), {}}}, true);
  else
    at::addmm_out(out, out, left, right);
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) {
  const bool per_column = weight.dim() == 2 && bias.dim() == 1 && bias.size(0) == weight.size(0) &&
                          has_floats(bias);
  at::Tensor out;
  return per_column && own_product(out, input, weight, bias) ? out : at::addmm(bias, input, weight.t());
}

int64_t least_rows_of_own_products() {
  if (preferred_panels() == Panels::most) return 1;
  return has_split_products() || preferred_panels() == Panels::large ? 512 : std::numeric_limits<int64_t>::max();
}

}  // namespace fastattn
