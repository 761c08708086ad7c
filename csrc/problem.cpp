#include "problem.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_map>

namespace fastattn {

static Type type_of(const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kBool: return Type::boolean;
    case at::kHalf: return Type::half;
    case at::kBFloat16: return Type::bfloat16;
    case at::kFloat: return Type::single;
    case at::kDouble: return Type::twice;
    default: TORCH_CHECK_TYPE(false, name, ": got dtype ", tensor.scalar_type(), ", expected bool or a float type");
  }
}

Tensor4 tensor4(const at::Tensor& tensor) {
  Tensor4 result;
  result.data = tensor.data_ptr();
  result.type = type_of("tensor", tensor);
  for (int64_t axis = 0; axis < 4; ++axis) result.stride[axis] = tensor.size(axis) == 1 ? 0 : tensor.stride(axis);
  return result;
}

Tensor4 from_row(Tensor4 tensor, int64_t row) {
  tensor.data = static_cast<char*>(tensor.data) + element_size(tensor.type) * row * tensor.stride[2];
  return tensor;
}

static void check_cpu(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(
      tensor.device().is_cpu() && tensor.layout() == at::kStrided, name, ": got a ", tensor.layout(), " tensor on ",
      tensor.device(), ", expected a strided one on the CPU");
}

std::vector<int64_t> integers(const char* name, const at::Tensor& tensor) {
  check_cpu(name, tensor);
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kInt || type == at::kLong, name, ": got dtype ", type, ", expected int32 or int64");
  const at::Tensor dense = tensor.to(at::kLong).contiguous();
  const int64_t* from = dense.const_data_ptr<int64_t>();
  return {from, from + dense.numel()};
}

void check_tensor(const char* name, const at::Tensor& tensor, at::IntArrayRef shape, at::ScalarType type) {
  check_cpu(name, tensor);
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, ": got shape ", tensor.sizes(), ", expected ", shape);
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, ": got dtype ", tensor.scalar_type(), ", expected ", type);
}

void check_floating(const char* name, const at::Tensor& tensor, at::IntArrayRef shape) {
  check_cpu(name, tensor);
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, ": got shape ", tensor.sizes(), ", expected ", shape);
  TORCH_CHECK_TYPE(at::isFloatingType(tensor.scalar_type()), name, ": got dtype ", tensor.scalar_type());
  type_of(name, tensor);
}

static void check_inputs(const at::Tensor& query, const at::Tensor& key, bool cached) {
  check_cpu("query", query);
  TORCH_CHECK_VALUE(query.dim() == 4, "query: got shape ", query.sizes(), ", expected (B, H, L, D)");
  const auto type = query.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kHalf || type == at::kBFloat16, "query: got dtype ", type,
      ", expected float32, float16 or bfloat16");
  TORCH_CHECK_VALUE(query.size(3) >= 1, "query: got head dimension 0");
  check_cpu("key", key);
  TORCH_CHECK_VALUE(
      key.dim() == 4 && (cached || key.size(0) == query.size(0)) && key.size(3) == query.size(3), "key: got shape ", key.sizes(),
      ", expected (", query.size(0), ", Hkv, S, ", query.size(3), ")");
  TORCH_CHECK_TYPE(key.scalar_type() == type, "key: got dtype ", key.scalar_type(), ", expected ", type);
  const int64_t heads = query.size(1), key_heads = key.size(1);
  TORCH_CHECK_VALUE(
      key_heads == 0 ? heads == 0 : heads % key_heads == 0, "key: got ", key_heads, " heads, not a divisor of query's ",
      heads);
}

static void check_masks(const ProblemArgs& args, at::IntArrayRef scores) {
  if (args.attn_mask) {
    const at::Tensor& mask = *args.attn_mask;
    check_cpu("attn_mask", mask);
    type_of("attn_mask", mask);
    bool fits = mask.dim() == 4;
    for (int64_t axis = 0; fits && axis < 4; ++axis) fits = mask.size(axis) == 1 || mask.size(axis) == scores[axis];
    TORCH_CHECK_VALUE(fits, "attn_mask: got shape ", mask.sizes(), ", expected one that broadcasts to ", scores);
  }
  if (args.key_padding_mask) {
    const at::Tensor& mask = *args.key_padding_mask;
    check_cpu("key_padding_mask", mask);
    type_of("key_padding_mask", mask);
    TORCH_CHECK_VALUE(
        mask.dim() == 2 && mask.size(0) == scores[0] && mask.size(1) == scores[3], "key_padding_mask: got shape ",
        mask.sizes(), ", expected (", scores[0], ", ", scores[3], ")");
  }
}

static void check_segments(const ProblemArgs& args, at::IntArrayRef scores) {
  TORCH_CHECK_VALUE(
      args.segment_query.has_value() == args.segment_key.has_value(),
      "segment_query, segment_key: got one of them, expected both or none");
  if (!args.segment_query) return;
  const at::ScalarType type = args.segment_query->scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kInt || type == at::kLong, "segment_query: got dtype ", type, ", expected int32 or int64");
  check_tensor("segment_query", *args.segment_query, {scores[0], scores[2]}, type);
  check_tensor("segment_key", *args.segment_key, {scores[0], scores[3]}, type);
}

static void check_arguments(const ProblemArgs& args, at::IntArrayRef scores) {
  check_masks(args, scores);
  check_segments(args, scores);
  if (args.alibi_slopes) {
    const at::Tensor& slopes = *args.alibi_slopes;
    const int64_t batches = slopes.dim() == 2 && slopes.size(0) == 1 ? 1 : scores[0];
    check_tensor("alibi_slopes", slopes, {batches, scores[1]}, at::kFloat);
  }
  TORCH_CHECK_VALUE(
      args.softcap >= 0.0 && std::isfinite(args.softcap), "softcap: got ", args.softcap,
      ", expected a positive finite number, or 0 for none");
  TORCH_CHECK_VALUE(
      args.dropout_p >= 0.0 && args.dropout_p <= 1.0, "dropout_p: got ", args.dropout_p, ", expected 0 to 1");
  if (args.dropout_p > 0.0) {
    TORCH_CHECK_VALUE(args.seed, "seed: got None, expected a tensor: dropout_p is ", args.dropout_p);
    check_tensor("seed", *args.seed, {1}, at::kLong);
  }
}

// The padding mask as addends, and for each batch the range of its keys that take part.
static void read_padding(OwnedProblem& owned, const std::optional<at::Tensor>& mask) {
  Problem& p = owned.problem;
  constexpr float masked = -std::numeric_limits<float>::infinity();
  owned.key_begin.assign(p.batch, 0);
  owned.key_end.assign(p.batch, p.keys);
  p.key_begin = owned.key_begin.data();
  p.key_end = owned.key_end.data();
  if (!mask) return;
  owned.key_bias = mask->scalar_type() == at::kBool
                       ? at::zeros({p.batch, p.keys}, at::kFloat).masked_fill_(mask->logical_not(), masked)
                       : mask->to(at::kFloat).contiguous();
  p.key_bias = owned.key_bias.const_data_ptr<float>();
  for (int64_t b = 0; b < p.batch; ++b) {
    const float* bias = p.key_bias + b * p.keys;
    int64_t &begin = owned.key_begin[b], &end = owned.key_end[b];
    while (begin < end && bias[begin] == masked) ++begin;
    while (begin < end && bias[end - 1] == masked) --end;
  }
}

// The segments of all batches as numbers from 0 on, -1 for a query's id that no key has, and the keys of each row's.
// Ids stand in any order; equal neighbours, the usual case, are looked up once.
static void read_segments(OwnedProblem& owned, const at::Tensor& query_ids, const at::Tensor& key_ids) {
  struct Segment {
    int32_t number;
    int64_t begin, end;
  };
  Problem& p = owned.problem;
  const at::Tensor dense_query = query_ids.to(at::kLong).contiguous(), dense_key = key_ids.to(at::kLong).contiguous();
  owned.segment_query = at::empty({p.batch, p.rows}, at::kInt);
  owned.segment_key = at::empty({p.batch, p.keys}, at::kInt);
  owned.segment_begin = at::empty({p.batch, p.rows}, at::kLong);
  owned.segment_end = at::empty({p.batch, p.rows}, at::kLong);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t* ids = dense_key.const_data_ptr<int64_t>() + b * p.keys;
    int32_t* numbers = owned.segment_key.data_ptr<int32_t>() + b * p.keys;
    std::unordered_map<int64_t, Segment> segments;
    Segment* segment = nullptr;
    for (int64_t j = 0; j < p.keys; ++j) {
      const Segment unseen{static_cast<int32_t>(segments.size()), j, j};
      if (j == 0 || ids[j] != ids[j - 1]) segment = &segments.try_emplace(ids[j], unseen).first->second;
      segment->end = j + 1;
      numbers[j] = segment->number;
    }
    const Segment none{-1, p.keys, 0};
    ids = dense_query.const_data_ptr<int64_t>() + b * p.rows;
    numbers = owned.segment_query.data_ptr<int32_t>() + b * p.rows;
    int64_t* begin = owned.segment_begin.data_ptr<int64_t>() + b * p.rows;
    int64_t* end = owned.segment_end.data_ptr<int64_t>() + b * p.rows;
    const Segment* own = &none;
    for (int64_t i = 0; i < p.rows; ++i) {
      if (i == 0 || ids[i] != ids[i - 1]) {
        const auto found = segments.find(ids[i]);
        own = found == segments.end() ? &none : &found->second;
      }
      numbers[i] = own->number;
      begin[i] = own->begin;
      end[i] = own->end;
    }
  }
  p.segment_query = owned.segment_query.const_data_ptr<int32_t>();
  p.segment_key = owned.segment_key.const_data_ptr<int32_t>();
  p.segment_begin = owned.segment_begin.const_data_ptr<int64_t>();
  p.segment_end = owned.segment_end.const_data_ptr<int64_t>();
}

OwnedProblem::OwnedProblem(
    const at::Tensor& query, const at::Tensor& key, const ProblemArgs& args, std::optional<int64_t> cached)
    : problem{} {
  check_inputs(query, key, cached.has_value());
  Problem& p = problem;
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.rows = query.size(2);
  p.dim = query.size(3);
  p.key_heads = key.size(1);
  p.keys = cached.value_or(key.size(2));
  check_arguments(args, {p.batch, p.heads, p.rows, p.keys});
  p.scale = static_cast<float>(args.scale);
  // Far from any score a cap does nothing, or makes all scores 0: clamped, it and its inverse are finite floats.
  p.softcap = args.softcap > 0.0 ? static_cast<float>(std::clamp(args.softcap, 1e-30, 1e30)) : 0.0f;
  p.shift = args.shift;
  const int64_t open = p.rows + p.keys;
  p.lower = std::clamp(args.lower.value_or(-open), -open, open);
  p.upper = std::clamp(args.upper.value_or(open), -open, open);
  p.query = tensor4(query);
  p.key = tensor4(key);
  if (args.attn_mask) p.attn_mask = tensor4(*args.attn_mask);
  if (args.alibi_slopes) {
    alibi_slopes = args.alibi_slopes->contiguous();
    p.alibi_slopes = alibi_slopes.const_data_ptr<float>();
    p.alibi_batch = alibi_slopes.size(0) == 1 ? 0 : p.heads;
  }
  if (args.dropout_p > 0.0) p.seed = static_cast<uint64_t>(*args.seed->const_data_ptr<int64_t>());
  p.drop_below = static_cast<uint32_t>(std::ceil(args.dropout_p * 16777216.0));
  p.keep_scale = args.dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - args.dropout_p)) : 0.0f;
  read_padding(*this, args.key_padding_mask);
  if (args.segment_query) read_segments(*this, *args.segment_query, *args.segment_key);
}

at::Tensor add_splits(const at::Tensor& parts) {
  at::Tensor sum = parts[0];
  for (int64_t split = 1; split < parts.size(0); ++split) sum.add_(parts[split]);
  return sum;
}

at::Tensor empty_heads_last(const at::Tensor& like) {
  // Not a transposed tensor, which would be a view: one made without gradients can't be changed in place with them.
  const int64_t heads = like.size(1), rows = like.size(2), features = like.size(3), row = heads * features;
  return at::empty_strided({like.size(0), heads, rows, features}, {rows * row, features, row, 1}, like.options());
}

}  // namespace fastattn
