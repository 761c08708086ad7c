// The driver of both backwards: checks, allocation, tasks, and the sums over splits.
#include "attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

namespace fastattn {

namespace {

// What both backwards share: the gradients of query, key and masks and where their partial sums stand.
struct Gradient {
  Backward task{};
  at::Tensor dquery, dquery_parts, dkey;
  at::Tensor dmask, dpadding_parts;  // float32
  std::optional<at::Tensor> attn_mask, key_padding_mask;

  Gradient(const OwnedProblem& owned, const at::Tensor& query, const at::Tensor& key, const ProblemArgs& args,
           bool attn_mask_grad, bool padding_grad) {
    task.problem = owned.problem;
    const Problem& p = task.problem;
    const auto floats = query.options().dtype(at::kFloat);
    dquery = empty_heads_last(query);
    dkey = empty_heads_last(key);
    if (attn_mask_grad && args.attn_mask) {
      attn_mask = args.attn_mask;
      dmask = at::zeros(attn_mask->sizes(), floats);
      task.dmask = tensor4(dmask);
      task.mask_over_batch = attn_mask->size(0) == 1;
      task.mask_over_heads = attn_mask->size(1) == 1;
    }
    const bool sums_over_keys = attn_mask && attn_mask->size(3) == 1;
    task.splits = sums_over_keys ? 1 : backward_splits(task.sets(), p.keys);
    if (task.splits > 1) {
      dquery_parts = at::empty({task.splits, p.batch, p.heads, p.rows, p.dim}, floats);
      task.dquery = tensor4(dquery_parts[0]);
      task.dquery_split = dquery_parts.stride(0);
    } else {
      task.dquery = tensor4(dquery);
    }
    task.dkey = tensor4(dkey);
    if (padding_grad && args.key_padding_mask) {
      key_padding_mask = args.key_padding_mask;
      dpadding_parts = at::empty({p.batch, p.key_heads, p.keys}, floats);
      task.dpadding = dpadding_parts.data_ptr<float>();
    }
  }

  // Runs the tasks and adds the partial sums; torch adds along an axis in a fixed order.
  Gradients run(const at::Tensor& third) {
    const Problem& p = task.problem;
    const Kernels& k = kernels();
    if (p.heads > 0) {
      run_tasks(task.tasks(), k.backward_scratch(task), [&](int64_t index, float* scratch) {
        k.backward_task(task, index, scratch);
      });
    } else {  // keys that no query sees
      for (const at::Tensor& unwritten : {dkey, third, dpadding_parts})
        if (unwritten.defined()) unwritten.zero_();
    }
    if (task.splits > 1) dquery.copy_(add_splits(dquery_parts));
    std::vector<at::Tensor> dmasks;
    if (attn_mask) dmasks.push_back(dmask.to(attn_mask->scalar_type()));
    if (key_padding_mask) dmasks.push_back(dpadding_parts.sum(1).to(key_padding_mask->scalar_type()));
    return {dquery, dkey, third, dmasks};
  }
};

}  // namespace

Gradients attention_backward(
    const std::optional<at::Tensor>& grad_out, const std::optional<at::Tensor>& grad_logsumexp,
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
    const at::Tensor& logsumexp, const ProblemArgs& args, bool attn_mask_grad, bool padding_grad) {
  const OwnedProblem owned(query, key, args);
  const auto logsumexp_sizes = logsumexp_shape(owned.problem);
  check_tensor("value", value, key.sizes(), query.scalar_type());
  check_tensor("out", out, query.sizes(), query.scalar_type());
  check_tensor("logsumexp", logsumexp, logsumexp_sizes, at::kFloat);
  if (grad_out) check_floating("grad_out", *grad_out, query.sizes());
  if (grad_logsumexp) check_floating("grad_logsumexp", *grad_logsumexp, logsumexp_sizes);

  Gradient gradient(owned, query, key, args, attn_mask_grad, padding_grad);
  Backward& t = gradient.task;
  at::Tensor dvalue = empty_heads_last(value);
  const at::Tensor dense_logsumexp = logsumexp.contiguous();
  t.logsumexp = dense_logsumexp.const_data_ptr<float>();
  at::Tensor dense_grad_logsumexp;
  if (grad_logsumexp) {
    dense_grad_logsumexp = grad_logsumexp->select(0, 0).to(at::kFloat).contiguous();
    t.grad_logsumexp = dense_grad_logsumexp.const_data_ptr<float>();
  }
  if (grad_out) {
    t.grad_out = tensor4(*grad_out);
    t.out = tensor4(out);
    t.value = tensor4(value);
    t.dvalue = tensor4(dvalue);
  } else {
    dvalue.zero_();
  }
  return gradient.run(dvalue);
}

Gradients attention_weights_backward(
    const at::Tensor& grad_weights, const at::Tensor& query, const at::Tensor& key, const at::Tensor& logsumexp,
    const ProblemArgs& args, bool average, bool attn_mask_grad, bool padding_grad) {
  const OwnedProblem owned(query, key, args);
  const Problem& p = owned.problem;
  check_tensor("logsumexp", logsumexp, logsumexp_shape(p), at::kFloat);
  if (average)
    check_floating("grad_weights", grad_weights, {p.batch, p.rows, p.keys});
  else
    check_floating("grad_weights", grad_weights, {p.batch, p.heads, p.rows, p.keys});

  Gradient gradient(owned, query, key, args, attn_mask_grad, padding_grad);
  Backward& t = gradient.task;
  const at::Tensor dense_logsumexp = logsumexp.contiguous();
  t.logsumexp = dense_logsumexp.const_data_ptr<float>();
  t.grad_weights = tensor4(average ? grad_weights.unsqueeze(1) : grad_weights);
  t.grad_weights_scale = average ? 1.0f / static_cast<float>(p.heads) : 1.0f;
  // The gradient counts in the first part of the logsumexp only.
  at::Tensor dlogsumexp = at::zeros(logsumexp_shape(p), dense_logsumexp.options());
  at::Tensor number = dlogsumexp[0];
  const at::Tensor parts =
      t.splits == 1 ? number : at::empty({t.splits, p.batch, p.heads, p.rows}, number.options());
  t.dlogsumexp = parts.data_ptr<float>();
  Gradients result = gradient.run(dlogsumexp);
  for (int64_t split = 0; t.splits > 1 && split < t.splits; ++split) number.add_(parts[split]);
  return result;
}

}  // namespace fastattn
