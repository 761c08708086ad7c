"""The forward kernel: online softmax over tiles of keys (Milakov & Gimelshein 2018; Dao et al. 2022).

One program owns BLOCK_M queries of one head and walks over the keys they can see:

    m = -inf, l = 0
    m' = max(m, max_j S_ij),   a = exp(m - m'),   P_ij = exp(S_ij - m')
    l  = a l + sum_j P_ij,     O_i = a O_i + sum_j keep_ij P_ij v_j
    at the end   O_i / (l (1 - dropout_p)),   LSE_i = m + log l
"""

import triton
import triton.language as tl

from fastattn.kernels.attention.arguments import LENGTHS, Rows, Shape
from fastattn.kernels.attention.packing import from_row, number_of_row, rest_of_logsumexp, sequence
from fastattn.kernels.attention.primitives import (
    LN2,
    LOG2E,
    dropout_keep,
    exponential,
    key_range,
    last_full_key,
    load_rows,
    product_tile,
    score_tile,
    store_rows,
)


@triton.jit
def _walk_keys(
    output, total, maximum, product, queries, query_rows, begin, end, b, h, first_row, key, value, scale, masks,
    dropout, shape, F: tl.constexpr, EDGE: tl.constexpr, AHEAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fold the keys [begin, end) into (output, total, maximum).

    If AHEAD ``product`` is Q K^T of the first tile, and each pass starts that of the next one before its softmax:
    the tensor cores work meanwhile, for nothing after the last tile.
    """
    STAGES: tl.constexpr = F.edge_stages if EDGE and F.split else None
    for first_column in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        column = first_column + BLOCK_N if AHEAD else first_column
        started = _products(queries, query_rows, key, b, h, column, shape, F, DIM, BLOCK_D, BLOCK_M, BLOCK_N)
        if not AHEAD:
            product = started
        score, _ = score_tile(
            product, b, h, first_row, first_column, scale, masks, shape, F, EDGE, BLOCK_M, BLOCK_N, False
        )
        new_maximum = tl.maximum(maximum, tl.max(score, 1))
        # A row that has seen no key yet has maximum -inf: a finite pivot keeps exp(-inf - pivot) = 0 from being NaN.
        pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        decay = exponential(maximum - pivot, F)
        probability = exponential(score - pivot[:, None], F)
        total = total * decay + tl.sum(probability, 1)
        if dropout.seed is not None:
            keep = dropout_keep(dropout, b * shape.heads + h, first_row, first_column, BLOCK_M, BLOCK_N, False)
            probability = tl.where(keep, probability, 0.0)
        value_rows = Rows(value, b, h // shape.group, first_column, shape.columns)
        values = load_rows(value_rows, DIM, BLOCK_N, BLOCK_D)  # [BN, BD]
        output = output * decay[:, None]
        output = tl.dot(probability.to(values.dtype), values, output, input_precision=F.precision)
        maximum = new_maximum
        if AHEAD:
            product = started
    return output, total, maximum


@triton.jit
def _products(
    queries, query_rows, key, b, h, first_column, shape, F: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """<q_i, k_j> of a tile (BM, BN)."""
    key_rows = Rows(key, b, h // shape.group, first_column, shape.columns)
    keys = load_rows(key_rows, DIM, BLOCK_N, BLOCK_D)  # [BN, BD]
    return product_tile(queries, query_rows, keys, key_rows, F, DIM, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=LENGTHS)
def attention_forward(
    query, key, value, sinks, out, logsumexp, scale, masks, dropout, batches, heads, group, rows, columns, lower, upper,
    shift, pitch, key_pitch, packed,
    F: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """query (B, H, L, D), key and value (B, H / group, S, D) -> out (B, H, L, D), logsumexp (2, B, H, L) float32.

    With ``packed`` the tensors hold its sequences one behind another, B = 1.
    """
    shape = Shape(batches, heads, group, rows, columns, lower, upper, shift, pitch, key_pitch)
    tiles = tl.cdiv(shape.rows, BLOCK_M)
    program = tl.program_id(0)
    # The last rows see the most keys under a causal mask: start them first, so that none of them ends alone.
    first_row = (tiles - 1 - program % tiles) * BLOCK_M
    batch_head = program // tiles
    batch = batch_head // shape.heads
    h = (batch_head % shape.heads).to(tl.int64)
    b, shape, first_query, first_key = sequence(batch, shape, packed)
    if packed.query is not None:
        if first_row >= shape.rows:
            return
        query, out = from_row(query, first_query), from_row(out, first_query)
        key, value = from_row(key, first_key), from_row(value, first_key)
        logsumexp += first_query

    query_rows = Rows(query, b, h, first_row, shape.rows)
    queries = load_rows(query_rows, DIM, BLOCK_M, BLOCK_D)
    output = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)

    last_row = tl.minimum(first_row + BLOCK_M, shape.rows) - 1
    begin, end = key_range(batch, first_row, last_row, masks, shape, F, BLOCK_M, BLOCK_N)
    edge = begin
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if F.ahead:
        product = _products(queries, query_rows, key, b, h, begin, shape, F, DIM, BLOCK_D, BLOCK_M, BLOCK_N)
    if F.split:
        edge = last_full_key(begin, end, first_row, shape, F, BLOCK_N)
        output, total, maximum = _walk_keys(
            output, total, maximum, product, queries, query_rows, begin, edge, b, h, first_row, key, value, scale,
            masks, dropout, shape, F, False, F.ahead, DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    output, total, maximum = _walk_keys(
        output, total, maximum, product, queries, query_rows, edge, end, b, h, first_row, key, value, scale,
        masks, dropout, shape, F, True, F.ahead and not F.split, DIM, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    if sinks is not None:
        # A sink is one more key, of value 0, that every row sees: here, where it takes no registers from the loops.
        sink = tl.load(sinks + h).to(tl.float32)
        sink = tl.zeros([BLOCK_M], tl.float32) + (sink if F.natural else sink * LOG2E)
        last_maximum = tl.maximum(maximum, sink)
        pivot = tl.where(last_maximum == float("-inf"), 0.0, last_maximum)
        decay = exponential(maximum - pivot, F)
        total = total * decay + exponential(sink - pivot, F)
        output *= decay[:, None]
        maximum = last_maximum
    empty = total == 0.0
    safe_total = tl.where(empty, 1.0, total)
    output = output * (dropout.keep_scale / safe_total)[:, None]
    store_rows(Rows(out, b, h, first_row, shape.rows), output, DIM, BLOCK_M, BLOCK_D)
    logarithm = tl.log2(safe_total) * LN2
    high = maximum + logarithm if F.natural else maximum * LN2 + logarithm
    row = first_row + tl.arange(0, BLOCK_M)
    address = logsumexp + number_of_row(b, h, row, shape)
    tl.store(address, tl.where(empty, float("-inf"), high), mask=row < shape.rows)
    rest = tl.where(empty, 0.0, maximum - high + logarithm) if F.natural else tl.zeros([BLOCK_M], tl.float32)
    tl.store(address + rest_of_logsumexp(shape), rest, mask=row < shape.rows)
