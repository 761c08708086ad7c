// The driver of additive attention's scores: checks, allocation, tasks, and the sums over splits.
#include "additive.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "additive_cpu.h"
#include "problem.h"

namespace fastattn {

namespace {

// Enough tasks for the cores of a small machine even for one batch; more would cost memory for partial sums.
constexpr int64_t kTasks = 16, kLeastSplitKeys = 64;

// (B, T, X) as (B, 1, T, X).
at::Tensor one_head(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.dim() == 3, name, ": got shape ", tensor.sizes(), ", expected three dimensions");
  return tensor.unsqueeze(1);
}

// An AdditiveProblem and the memory its pointers refer to.
struct Owned {
  AdditiveProblem problem{};
  at::Tensor weight, coverage_weight, mask;

  explicit Owned(const AdditiveArgs& args) {
    AdditiveProblem& p = problem;
    const at::Tensor query = one_head("query", args.query), key = one_head("key", args.key);
    const auto type = query.scalar_type();
    TORCH_CHECK_TYPE(
        type == at::kFloat || type == at::kHalf || type == at::kBFloat16, "query: got dtype ", type,
        ", expected float32, float16 or bfloat16");
    p.batch = query.size(0);
    p.rows = query.size(2);
    p.features = query.size(3);
    p.keys = key.size(2);
    check_tensor("query", query, query.sizes(), type);
    check_tensor("key", key, {p.batch, 1, p.keys, p.features}, type);
    p.query = tensor4(query);
    p.key = tensor4(key);
    weight = padded("weight", args.weight, type);
    p.weight = weight.const_data_ptr<float>();
    TORCH_CHECK_VALUE(
        args.coverage.has_value() == args.coverage_weight.has_value(),
        "coverage, coverage_weight: got one of them, expected both or none");
    if (args.coverage) {
      const at::Tensor coverage = one_head("coverage", *args.coverage);
      check_floating("coverage", coverage, {p.batch, 1, coverage.size(2) == 1 ? 1 : p.rows, p.keys});
      p.coverage = tensor4(coverage);
      coverage_weight = padded("coverage_weight", *args.coverage_weight, type);
      p.coverage_weight = coverage_weight.const_data_ptr<float>();
    }
    if (args.mask) {
      check_tensor("key_padding_mask", *args.mask, {p.batch, p.keys}, at::kBool);
      mask = args.mask->contiguous();
      p.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
    }
  }

 private:
  at::Tensor padded(const char* name, const at::Tensor& vector, at::ScalarType type) const {
    check_tensor(name, vector, {problem.features}, type);
    at::Tensor result = at::zeros({problem.padded()}, at::kFloat);
    result.narrow(0, 0, problem.features).copy_(vector);
    return result;
  }
};

}  // namespace

at::Tensor additive_scores(const AdditiveArgs& args) {
  const Owned owned(args);
  const AdditiveProblem& p = owned.problem;
  const at::Tensor scores = at::empty({p.batch, p.rows, p.keys}, args.query.options().dtype(at::kFloat));
  const AdditiveScores f{p, scores.data_ptr<float>()};
  const AdditiveKernels& k = *kernels().additive;
  run_tasks(f.tasks(), k.scores_scratch(f), [&](int64_t task, float* scratch) { k.scores(f, task, scratch); });
  return scores;
}

AdditiveGradients additive_scores_backward(const at::Tensor& dscores, const AdditiveArgs& args, bool coverage_grad) {
  const Owned owned(args);
  const AdditiveProblem& p = owned.problem;
  check_tensor("dscores", dscores, {p.batch, p.rows, p.keys}, at::kFloat);
  const auto floats = args.query.options().dtype(at::kFloat);
  const at::Tensor dense_dscores = dscores.contiguous(), dkey = at::empty(args.key.sizes(), args.key.options());

  AdditiveGradient g{};
  g.problem = p;
  const int64_t most = std::max<int64_t>(1, (p.keys + kLeastSplitKeys - 1) / kLeastSplitKeys);
  g.splits = p.batch > 0 ? std::clamp<int64_t>(kTasks / p.batch, 1, most) : 1;
  const at::Tensor queries = at::empty({g.splits, p.batch, p.rows, p.padded()}, floats);
  const at::Tensor weights = at::empty({g.splits, p.batch, p.padded()}, floats);
  at::Tensor coverage_weights, dcoverage;
  g.dscores = dense_dscores.const_data_ptr<float>();
  g.dquery = queries.data_ptr<float>();
  g.dkey = tensor4(one_head("key", dkey));
  g.dweight = weights.data_ptr<float>();
  if (args.coverage) {
    coverage_weights = at::empty(weights.sizes(), floats);
    g.dcoverage_weight = coverage_weights.data_ptr<float>();
    if (coverage_grad) {
      dcoverage = at::empty({p.batch, p.rows, p.keys}, floats);
      g.dcoverage = dcoverage.data_ptr<float>();
    }
  }
  const AdditiveKernels& k = *kernels().additive;
  run_tasks(g.tasks(), k.gradient_scratch(g), [&](int64_t task, float* scratch) { k.gradient(g, task, scratch); });

  // New tensors, which do not keep the partial sums.
  const auto type = args.query.scalar_type();
  const auto of_features = [&](const at::Tensor& sum) { return sum.narrow(-1, 0, p.features); };
  const auto vector = [&](const at::Tensor& parts) { return of_features(add_splits(parts)).sum(0); };
  const at::Tensor weight = of_features(owned.weight);
  std::vector<at::Tensor> more;
  if (args.coverage) more.push_back(vector(coverage_weights).mul_(weight).to(type));
  if (dcoverage.defined())
    more.push_back(dcoverage.sum_to_size(args.coverage->sizes()).to(args.coverage->scalar_type()));
  return {of_features(add_splits(queries)).mul(weight).to(type), dkey, vector(weights).to(type), more};
}

}  // namespace fastattn
