// Attention of sequences packed one behind another, on the CPU: each is a problem of its own, on a part of the tensors.
#include "packed_attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "attend.h"
#include "problem.h"

namespace fastattn {

namespace {

// Longer sequences run one after another with all threads, shorter ones side by side.
constexpr int64_t kLongRows = 256;
// Scores of a head, and multiplications of Q K^T, beyond which a sequence is as long: one query of many keys, or too few
// sequences for the threads.
constexpr int64_t kLongScores = kLongRows * kLongRows, kLongProducts = int64_t{1} << 20;

// (T, H, D) as (1, H, T, D).
at::Tensor one_batch(const char* name, const at::Tensor& packed) {
  TORCH_CHECK_VALUE(packed.dim() == 3, name, ": got shape ", packed.sizes(), ", expected (T, H, D)");
  return packed.transpose(0, 1).unsqueeze(0);
}

ProblemArgs of_a_token(const PackedArgs& args) {
  ProblemArgs result;
  result.scale = args.scale;
  result.see(args.left, args.right);
  return result;
}

// [0, ..., total], ascending by `longest` at most. The messages are those of fastattn/debug.py.
std::vector<int64_t> boundaries(
    const char* name, const at::Tensor& cu_seq, int64_t total, const char* longest_name, int64_t longest) {
  TORCH_CHECK_VALUE(
      cu_seq.dim() == 1 && cu_seq.numel() > 0, name, ": got shape ", cu_seq.sizes(), ", expected (N + 1,)");
  std::vector<int64_t> bounds = integers(name, cu_seq);
  TORCH_CHECK_VALUE(bounds[0] == 0, name, ": got first boundary ", bounds[0], ", expected 0");
  int64_t most = 0;
  for (size_t n = 1; n < bounds.size(); ++n) {
    TORCH_CHECK_VALUE(
        bounds[n] >= bounds[n - 1], name, ": got ", bounds[n - 1], " before ", bounds[n], " at position ", n - 1,
        ", expected ascending");
    most = std::max(most, bounds[n] - bounds[n - 1]);
  }
  TORCH_CHECK_VALUE(
      bounds.back() == total, name, ": got last boundary ", bounds.back(),
      ", expected the number of packed tokens, ", total);
  TORCH_CHECK_VALUE(
      most <= longest, longest_name, ": got ", longest, ", expected at least the longest sequence, ", most);
  return bounds;
}

// The sequences of a pack.
struct Pack {
  at::Tensor query, key, value;  // (1, H, T, D)
  OwnedProblem whole;            // as if all queries and keys were one sequence
  std::vector<int64_t> query_bounds, key_bounds, used;
  Tensor4 value4;

  Pack(const at::Tensor& packed_query, const at::Tensor& packed_key, const at::Tensor& packed_value,
       const PackedArgs& args)
      : query(one_batch("query", packed_query)), key(one_batch("key", packed_key)),
        value(one_batch("value", packed_value)), whole(query, key, of_a_token(args)),
        query_bounds(boundaries("cu_seq_q", args.cu_seq_q, query.size(2), "max_q", args.max_q)),
        key_bounds(boundaries("cu_seq_k", args.cu_seq_k, key.size(2), "max_k", args.max_k)) {
    check_tensor("value", value, key.sizes(), query.scalar_type());
    TORCH_CHECK_VALUE(
        query_bounds.size() == key_bounds.size(), "cu_seq_k: got ", key_bounds.size() - 1, " sequences, expected ",
        query_bounds.size() - 1);
    if (args.seqused_k) {
      check_tensor("seqused_k", *args.seqused_k, {count()}, args.seqused_k->scalar_type());
      used = integers("seqused_k", *args.seqused_k);
    }
    for (int64_t n = 0; n < count(); ++n) {
      const int64_t keys = key_bounds[n + 1] - key_bounds[n];
      if (!args.seqused_k) used.push_back(keys);
      TORCH_CHECK_VALUE(
          used[n] >= 0 && used[n] <= keys, "seqused_k: got ", used[n], " for sequence ", n, ", allowed are 0 to its ",
          keys, " keys");
    }
    value4 = tensor4(value);
  }

  int64_t count() const { return static_cast<int64_t>(query_bounds.size()) - 1; }
  int64_t rows(int64_t n) const { return query_bounds[n + 1] - query_bounds[n]; }

  bool runs_alone(int64_t n) const {
    const int64_t scores = rows(n) * used[n], products = scores * whole.problem.heads * whole.problem.dim;
    return rows(n) > kLongRows || scores > kLongScores || (count() < at::get_num_threads() && products > kLongProducts);
  }

  // Rows of a tensor (1, H, Tq, D) or (1, G, Tk, D) of sequence n on.
  Tensor4 of_queries(const Tensor4& t, int64_t n) const { return from_row(t, query_bounds[n]); }
  Tensor4 of_keys(const Tensor4& t, int64_t n) const { return from_row(t, key_bounds[n]); }

  // The last query of a sequence stands at its last key.
  Problem problem(int64_t n) const {
    static constexpr int64_t first = 0;
    Problem p = whole.problem;
    p.rows = rows(n);
    p.keys = used[n];
    const int64_t shift = p.keys - p.rows;
    p.shift += shift;
    p.lower += shift;
    p.upper += shift;
    p.query = of_queries(p.query, n);
    p.key = of_keys(p.key, n);
    p.key_begin = &first;
    p.key_end = &used[n];
    return p;
  }

  // A part (H, rows) of sequence n, between its own memory and its place in (H, Tq).
  template <class F>
  void for_rows(int64_t n, F f) const {
    const int64_t length = rows(n);
    for (int64_t h = 0; h < whole.problem.heads; ++h)
      for (int64_t i = 0; i < length; ++i) f(h * length + i, h * whole.problem.rows + query_bounds[n] + i);
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> packed_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const PackedArgs& args) {
  const Pack pack(query, key, value, args);
  const int64_t tokens = query.size(0), heads = query.size(1);
  const at::Tensor out = at::empty(query.sizes(), query.options());
  const at::Tensor logsumexp = at::empty({2, heads, tokens}, query.options().dtype(at::kFloat));
  const Tensor4 out4 = tensor4(one_batch("out", out));
  float* const to = logsumexp.data_ptr<float>();
  const Floats parts(2 * heads * tokens);  // (2, H, rows) of each sequence

  const auto attend_sequence = [&](int64_t n) {
    const int64_t size = heads * pack.rows(n);
    Forward f{};
    f.problem = pack.problem(n);
    f.value = pack.of_keys(pack.value4, n);
    f.out = pack.of_queries(out4, n);
    f.logsumexp = parts + 2 * heads * pack.query_bounds[n];
    attend(f);
    pack.for_rows(n, [&](int64_t own, int64_t place) {
      to[place] = f.logsumexp[own];
      to[heads * tokens + place] = f.logsumexp[size + own];
    });
  };
  std::vector<int64_t> side_by_side;
  for (int64_t n = 0; n < pack.count(); ++n) {
    if (pack.runs_alone(n)) {
      attend_sequence(n);
    } else if (size_t(heads) * pack.rows(n) > 0) {
      side_by_side.push_back(n);
    }
  }
  run_tasks(side_by_side.size(), 0, [&](int64_t task, float*) { attend_sequence(side_by_side[task]); });
  return {out, logsumexp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_attention_backward(
    const std::optional<at::Tensor>& grad_out, const std::optional<at::Tensor>& grad_logsumexp,
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
    const at::Tensor& logsumexp, const PackedArgs& args) {
  const Pack pack(query, key, value, args);
  const int64_t tokens = query.size(0), heads = query.size(1), key_heads = key.size(1);
  check_tensor("out", out, query.sizes(), query.scalar_type());
  check_tensor("logsumexp", logsumexp, {2, heads, tokens}, at::kFloat);
  if (grad_out) check_floating("grad_out", *grad_out, query.sizes());
  if (grad_logsumexp) check_floating("grad_logsumexp", *grad_logsumexp, {2, heads, tokens});

  const at::Tensor dquery = at::empty(query.sizes(), query.options());
  // What no query sees has gradient 0: all keys without a head of queries, those beyond seqused_k, and values where only
  // the logsumexp has one.
  const bool all_keys = heads > 0 && !args.seqused_k;
  const auto keys_gradient = [&](const at::Tensor& like, bool written) {
    return written ? at::empty(like.sizes(), like.options()) : at::zeros(like.sizes(), like.options());
  };
  const at::Tensor dkey = keys_gradient(key, all_keys);
  const at::Tensor dvalue = keys_gradient(value, grad_out && all_keys);
  const at::Tensor dense_logsumexp = logsumexp.contiguous();
  at::Tensor dense_grad_logsumexp;
  if (grad_logsumexp) dense_grad_logsumexp = grad_logsumexp->select(0, 0).to(at::kFloat).contiguous();
  Backward whole{};
  whole.dquery = tensor4(one_batch("dquery", dquery));
  whole.dkey = tensor4(one_batch("dkey", dkey));
  if (grad_out) {
    whole.grad_out = tensor4(one_batch("grad_out", *grad_out));
    whole.out = tensor4(one_batch("out", out));
    whole.value = pack.value4;
    whole.dvalue = tensor4(one_batch("dvalue", dvalue));
  }
  const Floats parts(3 * heads * tokens);  // logsumexp (2, H, rows) and its gradient (H, rows) of each sequence
  std::vector<Backward> side_by_side;
  const Kernels& k = kernels();
  int64_t scratch_floats = 0;
  // A sequence whose keys are split, as those of a dense call are, makes tasks enough on its own.
  const auto run_split = [&](Backward t, int64_t n) {
    const at::Tensor splits =
        at::empty({t.splits, heads, pack.rows(n), query.size(2)}, query.options().dtype(at::kFloat));
    t.dquery = tensor4(splits[0].unsqueeze(0));
    t.dquery_split = splits.stride(0);
    run_tasks(t.tasks(), k.backward_scratch(t), [&](int64_t task, float* scratch) {
      k.backward_task(t, task, scratch);
    });
    dquery.narrow(0, pack.query_bounds[n], pack.rows(n)).copy_(add_splits(splits).transpose(0, 1));
  };
  for (int64_t n = 0; n < pack.count() && heads > 0; ++n) {
    const int64_t size = heads * pack.rows(n);
    float* own = parts + 3 * heads * pack.query_bounds[n];
    Backward t = whole;
    t.problem = pack.problem(n);
    t.logsumexp = own;
    if (grad_logsumexp) t.grad_logsumexp = own + 2 * size;
    const float* from = dense_logsumexp.const_data_ptr<float>();
    const float* gradient = grad_logsumexp ? dense_grad_logsumexp.const_data_ptr<float>() : nullptr;
    pack.for_rows(n, [&](int64_t i, int64_t place) {
      own[i] = from[place];
      own[size + i] = from[heads * tokens + place];
      if (gradient) own[2 * size + i] = gradient[place];
    });
    for (Tensor4* queries : {&t.dquery, &t.grad_out, &t.out})
      if (queries->data) *queries = pack.of_queries(*queries, n);
    for (Tensor4* keys : {&t.dkey, &t.value, &t.dvalue})
      if (keys->data) *keys = pack.of_keys(*keys, n);
    t.splits = backward_splits(key_heads, t.problem.keys);
    if (t.splits > 1) {
      run_split(t, n);
      continue;
    }
    side_by_side.push_back(t);
    scratch_floats = std::max(scratch_floats, k.backward_scratch(t));
  }
  run_tasks(side_by_side.size() * key_heads, scratch_floats, [&](int64_t task, float* scratch) {
    k.backward_task(side_by_side[task / key_heads], task % key_heads, scratch);
  });
  return {dquery, dkey, dvalue};
}

}  // namespace fastattn
