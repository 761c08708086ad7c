// A cache of keys and values on the CPU: its checks, appending to it, and attention to it.
#include "kv_cache.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "attend.h"
#include "problem.h"

namespace fastattn {

namespace {

// A cache whose arguments fit together, and where its tokens are.
struct Cache {
  at::Tensor key, value;
  std::vector<int64_t> lengths;  // tokens of each sequence
  std::vector<int64_t> table;    // (B, table_row) pages, as many as the longest sequence has; or empty
  int64_t heads, page_size, table_row, room;
  bool paged;

  // Lengths become those after `appended` more tokens.
  Cache(const CacheArgs& args, int64_t batch, int64_t appended)
      : key(args.key), value(args.value), table_row(0), paged(args.block_table.has_value()) {
    TORCH_CHECK_VALUE(key.dim() == 4, "key_cache: got shape ", key.sizes(), ", expected (B, Hkv, S, D) or pages of it");
    check_tensor("key_cache", key, key.sizes(), key.scalar_type());
    check_tensor("value_cache", value, {key.size(0), key.size(1), key.size(2), value.size(-1)}, key.scalar_type());
    heads = key.size(1);
    page_size = room = key.size(2);
    check_tensor("cache_lengths", args.lengths, {batch}, args.lengths.scalar_type());
    lengths = integers("cache_lengths", args.lengths);
    if (paged) {
      const at::Tensor& pages = *args.block_table;
      TORCH_CHECK_VALUE(pages.dim() == 2, "block_table: got shape ", pages.sizes(), ", expected (B, max_pages)");
      check_tensor("block_table", pages, {batch, pages.size(1)}, pages.scalar_type());
      TORCH_CHECK_VALUE(
          page_size >= kPad && page_size % kPad == 0, "key_cache: got a page size of ", page_size,
          " tokens, allowed are multiples of ", kPad);
      room = pages.size(1) * page_size;
    } else {
      TORCH_CHECK_VALUE(key.size(0) == batch, "key_cache: got batch size ", key.size(0), ", expected ", batch);
    }
    check_lengths(appended);
    for (int64_t& length : lengths) length += appended;
    if (paged) read_table(*args.block_table);
  }

  int64_t longest() const { return lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end()); }

  // The messages are those of fastattn/debug.py.
  void check_lengths(int64_t appended) const {
    TORCH_CHECK_VALUE(appended >= 0, "appended: got ", appended, ", expected at least 0");
    if (lengths.empty()) return;
    const auto [low, high] = std::minmax_element(lengths.begin(), lengths.end());
    TORCH_CHECK_VALUE(
        *low >= 0 && *high <= room - appended, "cache_lengths: got lengths from ", *low, " to ", *high, " and ", appended,
        " new tokens, allowed are 0 to ", room, ", the tokens a sequence of the cache has room for");
  }

  // A table has room for the longest sequence there may ever be, and takes as long to read as a short one to attend to.
  void read_table(const at::Tensor& pages) {
    table_row = (longest() + page_size - 1) / page_size;
    table = integers("block_table", pages.narrow(1, 0, table_row));
    for (size_t b = 0; b < lengths.size(); ++b)
      for (int64_t place = 0; place * page_size < lengths[b]; ++place) {
        const int64_t page = table[b * table_row + place];
        TORCH_CHECK_VALUE(
            page >= 0 && page < key.size(0), "block_table: got page ", page, " at [", b, ", ", place,
            "], allowed are 0 to ", key.size(0) - 1, ", the pages of the pool");
      }
  }
};

void check_rows(const char* name, const at::Tensor& cache) {
  TORCH_CHECK_VALUE(
      cache.stride(3) == 1 || cache.size(3) == 1, name, ": got stride ", cache.stride(3),
      " in the last dimension, expected it contiguous");
}

void write(const Cache& cache, const at::Tensor& to, const at::Tensor& tokens) {
  const at::Tensor from = tokens.stride(3) == 1 ? tokens : tokens.contiguous();
  const int64_t size = to.element_size(), count = from.size(2), bytes = from.size(3) * size;
  if (from.numel() == 0) return;
  char* base = static_cast<char*>(to.data_ptr());
  const char* source = static_cast<const char*>(from.const_data_ptr());
  constexpr int64_t few = 1 << 16;  // bytes that a thread is not asked for
  const int64_t grain = std::max<int64_t>(1, few / (count * bytes));
  at::parallel_for(0, from.size(0) * cache.heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / cache.heads, g = i % cache.heads;
      for (int64_t t = 0; t < count; ++t) {
        int64_t page = b, row = cache.lengths[b] - count + t;
        if (cache.paged) {
          page = cache.table[b * cache.table_row + row / cache.page_size];
          row %= cache.page_size;
        }
        std::memcpy(
            base + size * (page * to.stride(0) + g * to.stride(1) + row * to.stride(2)),
            source + size * (b * from.stride(0) + g * from.stride(1) + t * from.stride(2)), bytes);
      }
    }
  });
}

}  // namespace

void kv_cache_append(const CacheArgs& args, const at::Tensor& new_key, const at::Tensor& new_value) {
  TORCH_CHECK_VALUE(new_key.dim() == 4, "new_key: got shape ", new_key.sizes(), ", expected (B, Hkv, T, D)");
  const int64_t batch = new_key.size(0), tokens = new_key.size(2);
  const Cache cache(args, batch, tokens);
  check_tensor("new_key", new_key, {batch, cache.heads, tokens, cache.key.size(3)}, cache.key.scalar_type());
  check_tensor("new_value", new_value, {batch, cache.heads, tokens, cache.value.size(3)}, cache.key.scalar_type());
  check_rows("key_cache", cache.key);
  check_rows("value_cache", cache.value);
  write(cache, cache.key, new_key);
  write(cache, cache.value, new_value);
}

std::tuple<at::Tensor, at::Tensor> kv_cache_attention(
    const at::Tensor& query, const CacheArgs& args, const CacheScoring& scoring, int64_t appended) {
  TORCH_CHECK_VALUE(query.dim() == 4, "query: got shape ", query.sizes(), ", expected (B, H, L, D)");
  Cache cache(args, query.size(0), appended);
  check_tensor("value_cache", cache.value, cache.key.sizes(), cache.key.scalar_type());
  ProblemArgs of_a_token;  // each sequence shifts these to its last one
  of_a_token.alibi_slopes = scoring.alibi_slopes;
  of_a_token.scale = scoring.scale;
  of_a_token.softcap = scoring.softcap;
  of_a_token.see(scoring.left, scoring.right);
  OwnedProblem owned(query, cache.key, of_a_token, cache.longest());
  Problem& p = owned.problem;
  p.key_end = cache.lengths.data();

  at::Tensor out = empty_heads_last(query), sinks;
  at::Tensor logsumexp = at::empty(logsumexp_shape(p), query.options().dtype(at::kFloat));
  if (p.heads == 0) return {out, logsumexp.select(0, 0)};
  Direct direct{};
  direct.problem = p;
  direct.value = tensor4(cache.value);
  if (scoring.sinks) {
    check_floating("sinks", *scoring.sinks, {p.heads});
    sinks = scoring.sinks->to(at::kFloat).contiguous();
    direct.sinks = sinks.const_data_ptr<float>();
  }
  direct.out = tensor4(out);
  direct.logsumexp = logsumexp.data_ptr<float>();
  direct.lengths = cache.lengths.data();
  if (cache.paged) {
    direct.table = cache.table.data();
    direct.table_row = cache.table_row;
    direct.page_size = cache.page_size;
  }
  attend_directly(direct);
  return {out, logsumexp.select(0, 0)};
}

}  // namespace fastattn
