"""The kernel that walks over the other side: the gradient of the queries, and the same of the keys.

    h_ijd = dS_ij (1 - tanh(x_ijd)^2),   x_ijd = q_id + k_jd + c_ij wc_d
    dq_id = w_d sum_j h_ijd,             dk_jd = w_d sum_i h_ijd
    dw_d  = sum_ij dS_ij tanh(x_ijd),    dwc_d = w_d sum_ij c_ij h_ijd

One program owns a tile of queries by features and takes one key after the other, or a tile of keys and takes the
queries: the sums run inside a thread. The sums for dw and dwc of each tile are stored and added afterwards, so that
the result is the same bits at every run.
"""

# Compiled from their source by Triton: Python's types say nothing about these functions.
import triton
import triton.language as tl

from fastattn.kernels.additive.primitives import start, tanh_slope


@triton.jit
def additive_gradient(
    own, other, weight, coverage, coverage_weight, dscores, end, grad, dweight, dcoverage_weight, owns, others,
    features, OWN_KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """own (B, owns, D), other (B, others, D) -> grad (B, owns, D): queries and keys, or keys and queries.

    coverage and dscores (B, owns, others); end (B), one past the last key, or absent. dweight and dcoverage_weight
    (B * tiles of own, D) float32, one line for each tile; both absent, or dcoverage_weight alone.
    """
    own_tiles = tl.cdiv(owns, BLOCK_M)
    feature_tiles = tl.cdiv(features, BLOCK_D)
    program = tl.program_id(0)
    first_feature = program % feature_tiles * BLOCK_D
    first = program // feature_tiles % own_tiles * BLOCK_M
    batch = program // feature_tiles // own_tiles
    b = batch.to(tl.int64)
    place = first + tl.arange(0, BLOCK_M)
    feature = first_feature + tl.arange(0, BLOCK_D)
    inside = place < owns
    inside_features = feature < features
    both = inside[:, None] & inside_features[None, :]

    last = others
    seen = both
    if end is not None:
        limit = tl.load(end + batch)
        last = tl.where(first < limit, others, 0) if OWN_KEYS else limit
        if OWN_KEYS:
            seen = both & (place < limit)[:, None]  # whatever stands in the padding, its gradient is 0

    mine = tl.load(start(own, b, place[:, None], feature[None, :]), mask=seen, other=0.0).to(tl.float32)
    share = tl.zeros([BLOCK_D], tl.float32)
    if coverage.pointer is not None:
        share = tl.load(coverage_weight + feature, mask=inside_features, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    of_weight = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    of_coverage = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for index in tl.range(0, last):
        theirs = tl.load(start(other, b, index, feature), mask=inside_features, other=0.0).to(tl.float32)
        dscore = tl.load(start(dscores, b, place, index), mask=inside, other=0.0)
        argument = mine + theirs[None, :]  # [BM, BD]
        if coverage.pointer is not None:
            covered = tl.load(start(coverage, b, place, index), mask=inside, other=0.0).to(tl.float32)
            argument += covered[:, None] * share[None, :]
        tanh, slope = tanh_slope(argument)
        slope *= dscore[:, None]
        total += slope
        if dweight is not None:
            of_weight += dscore[:, None] * tanh
        if dcoverage_weight is not None:
            of_coverage += covered[:, None] * slope

    factor = tl.load(weight + feature, mask=inside_features, other=0.0).to(tl.float32)
    address = start(grad, b, place[:, None], feature[None, :])
    tl.store(address, (total * factor[None, :]).to(grad.pointer.dtype.element_ty), mask=both)
    line = (program // feature_tiles).to(tl.int64) * features + feature
    if dweight is not None:
        tl.store(dweight + line, tl.sum(of_weight, 0), mask=inside_features)
    if dcoverage_weight is not None:
        tl.store(dcoverage_weight + line, tl.sum(of_coverage, 0) * factor, mask=inside_features)
