// The operators of fastattn/kv_cache_op.py for the CPU: float32, float16 and bfloat16.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fastattn {

// What a cache of keys and values is. key, value: (B, G, S, D), or (pages, G, page size, D) with a block_table
// (B, max_pages) and a page size that is a multiple of 16. lengths (B): tokens of each sequence. lengths and block_table
// are int32 or int64.
struct CacheArgs {
  at::Tensor key, value, lengths;
  std::optional<at::Tensor> block_table;
};

// Writes new_key, new_value (B, G, T, D) behind the tokens of each sequence, in place. Any float type.
//
// Both operators throw c10::Error unless the arguments fit together, every sequence has room for T more tokens
// (`appended` in the attention), and the pages of its tokens are pages of the pool.
void kv_cache_append(const CacheArgs& cache, const at::Tensor& new_key, const at::Tensor& new_value);

// What decides the scores besides the cache; see fastattn/kv_cache.py.
struct CacheScoring {
  std::optional<at::Tensor> alibi_slopes;  // (B or 1, H) float
  std::optional<at::Tensor> sinks;         // (H) floating
  double scale = 1.0, softcap = 0.0;
  std::optional<int64_t> left, right;  // keys from position - left to position + right take part
};

// out (B, H, L, D) and logsumexp (B, H, L) float of query (B, H, L, D), its last row at the last token, `appended` of
// which lengths does not count.
std::tuple<at::Tensor, at::Tensor> kv_cache_attention(
    const at::Tensor& query, const CacheArgs& cache, const CacheScoring& scoring, int64_t appended);

}  // namespace fastattn
