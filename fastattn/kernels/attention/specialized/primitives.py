"""What the kernels of specialised warps share: rings of tiles with their barriers, the layouts of wgmma, and masks.

A producer warp has the copy engine (TMA) fetch tiles into rings of STAGES places; each consumer, a warp group that owns
64 rows, computes and hands a place back when it has read it.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from fastattn.kernels.attention.primitives import LOG2E

# triton 3.6 calls them by other names.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
# Queries of a consumer, the rows of a wgmma; and consumers of a program. A third one would leave each 160 registers.
ROWS = gl.constexpr(64)
CONSUMERS = gl.constexpr(2)


class Ring(NamedTuple):
    """STAGES tiles; of each place a barrier that it is filled, and one that all consumers have read it."""

    tiles: Any
    filled: Any
    read: Any


class Work(NamedTuple):
    """Queries from ``first_row`` on of head h of batch b, and ``tiles`` of keys from ``begin`` on.

    Of the keys [``first_key``, ``end_key``) take part. Counted from the last one, padding has holes in tiles before
    ``solid``, the end or the upper bound cuts tiles before ``whole``, the start or the lower bound from ``cut`` on.
    """

    b: Any
    h: Any
    first_row: Any
    first_key: Any
    end_key: Any
    begin: Any
    tiles: Any
    solid: Any
    whole: Any
    cut: Any


@gluon.constexpr_function
def accumulator(columns):
    """The layout in which a warp group holds a product of 64 rows."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def new_barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """Barriers of STAGES places, each of which waits for COUNT arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(STAGES):
        mbarrier.init(barriers.index(place), count=COUNT)
    hopper.fence_async_shared()  # the copy engine sees them
    return barriers


@gluon.jit
def new_ring(rows, BLOCK_D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr):
    """A ring for tiles of BLOCK rows that the descriptor ``rows`` reads."""
    tiles = gl.allocate_shared_memory(rows.dtype, [STAGES, 1, 1, BLOCK, BLOCK_D], rows.layout)
    return Ring(tiles, new_barriers(STAGES, 1), new_barriers(STAGES, CONSUMERS))


@gluon.jit
def place_of(tile, STAGES: gl.constexpr):
    """Place in the ring of a tile, by its number, and the parity of its barriers' phase."""
    return tile % STAGES, (tile // STAGES) & 1


@gluon.jit
def fetch(rows, ring, tile, batch, head, row, STAGES: gl.constexpr, BYTES: gl.constexpr):
    """Have a tile fetched when all consumers have read the one in its place."""
    place, phase = place_of(tile, STAGES)
    mbarrier.wait(ring.read.index(place), phase ^ 1)
    mbarrier.expect(ring.filled.index(place), BYTES)
    load_tile(rows, [batch, head, row, 0], ring.filled.index(place), ring.tiles.index(place))


@gluon.jit
def load_owned(rows, memory, arrived, batch, head, first):
    """Have the rows of all consumers fetched, from row ``first`` on."""
    for consumer in gl.static_range(CONSUMERS):
        load_tile(rows, [batch, head, first + consumer * ROWS, 0], arrived, memory.index(consumer))


@gluon.jit
def store_owned(rows, sums, memory, batch, head, first, BLOCK_D: gl.constexpr):
    """Have a consumer's sums written, by way of memory that nobody reads any more; to be waited for.

    What lies past the end of the tensor is not written.
    """
    memory.reshape([ROWS, BLOCK_D]).store(sums.to(memory.dtype))
    hopper.fence_async_shared()
    store_tile(rows, [batch, head, first, 0], memory)


@gluon.jit
def start_product(left, right, BLOCK_D: gl.constexpr, BLOCK: gl.constexpr):
    """<left_i, right_j> (ROWS, BLOCK) of tiles of rows in shared memory; to be waited for."""
    nothing = gl.zeros([ROWS, BLOCK], gl.float32, accumulator(BLOCK))
    columns = right.reshape([BLOCK, BLOCK_D]).permute((1, 0))
    return hopper.warpgroup_mma(left.reshape([ROWS, BLOCK_D]), columns, nothing, use_acc=False, is_async=True)


@gluon.jit
def start_sum(sums, weights, rows, BLOCK_D: gl.constexpr, BLOCK: gl.constexpr):
    """sums_i + sum_j weights_ij rows_j (ROWS, BD) of an ``operand`` and a tile of rows; to be waited for."""
    return hopper.warpgroup_mma(weights, rows.reshape([BLOCK, BLOCK_D]), sums, is_async=True)


@gluon.jit
def load_pivot(logsumexp, row, shape):
    """What to subtract from scores in units of log 2; +inf, so that exp is 0, of rows without keys or past the end."""
    high = gl.load(logsumexp + row, mask=row < shape.rows, other=float("-inf"))
    return gl.where(high == float("-inf"), float("inf"), high * LOG2E)


@gluon.jit
def operand(product, like, COLUMNS: gl.constexpr):
    """A product in the dtype of ``like``, as the first operand of one with COLUMNS: no number changes its thread."""
    layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulator(COLUMNS), k_width=2)
    return gl.convert_layout(product.to(like.dtype), layout)


@gluon.jit
def by_row(rows, COLUMNS: gl.constexpr):
    """One number for each row, to multiply a product of COLUMNS with."""
    return gl.convert_layout(rows, gl.SliceLayout(1, accumulator(COLUMNS)))[:, None]


@gluon.jit
def work_of_program(masks, shape, F: gl.constexpr, BLOCK_N: gl.constexpr):
    """What this program computes; for queries that see no key one tile, all of it masked."""
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    blocks = gl.cdiv(shape.rows, BLOCK_M)
    program = gl.program_id(0)
    # The last rows see the most keys under a causal mask: start them first, so that none of them ends alone.
    first_row = (blocks - 1 - program % blocks) * BLOCK_M
    last_row = gl.minimum(first_row + BLOCK_M, shape.rows) - 1
    batch_head = program // blocks
    b = batch_head // shape.heads
    first_key = 0
    end_key = shape.columns
    holes = 0
    if masks.padding is not None:
        first_key = gl.load(masks.start + b)
        end_key = gl.load(masks.end + b)
        holes = gl.load(masks.holes + b)
    begin = first_key  # of the keys that any row sees, then of those that all see
    end = end_key
    whole_begin = first_key
    whole_end = end_key
    if F.has_lower:
        begin = gl.maximum(begin, first_row + shape.lower)
        whole_begin = gl.maximum(whole_begin, last_row + shape.lower)
    if F.has_upper:
        end = gl.minimum(end, last_row + shape.upper + 1)
        whole_end = gl.minimum(end, first_row + shape.upper + 1)
    begin = begin // BLOCK_N * BLOCK_N
    tiles = gl.maximum(gl.cdiv(end - begin, BLOCK_N), 1)
    solid = 1 + holes * (tiles - 1)
    whole = gl.maximum(tiles - gl.maximum(whole_end - begin, 0) // BLOCK_N, solid)
    cut = gl.maximum(tiles - gl.cdiv(gl.maximum(whole_begin - begin, 0), BLOCK_N), whole)
    return Work(b, batch_head % shape.heads, first_row, first_key, end_key, begin, tiles, solid, whole, cut)


@gluon.jit
def taking_part(
    score, row, work, tile, masks, shape, F: gl.constexpr, HOLES: gl.constexpr, UPPER: gl.constexpr,
    LOWER: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """-inf where there is no key, or padding or the band excludes it: by what may cut this tile.

    A row compares all columns with one bound of its own: differences of rows and columns would take a register each
    (468 bytes spilled at head dimension 128).
    """
    rows: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_N))
    column = work.begin + (work.tiles - 1 - tile) * BLOCK_N
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, accumulator(BLOCK_N)))
    if HOLES and masks.padding is not None:
        start = masks.padding + gl.cast(work.b, gl.int64) * masks.padding_batch
        start += gl.cast(column, gl.int64) * masks.padding_column
        inside = columns < shape.columns - column
        value = gl.load(start + columns * masks.padding_column, mask=inside, other=0)
        score = gl.where((value != 0)[None, :], score, float("-inf"))
    columns = columns[None, :]
    if UPPER:
        last = gl.zeros([ROWS], gl.int32, rows) + (work.end_key - 1 - column)
        if F.has_upper:
            last = gl.minimum(last, row + (shape.upper - column))
        score = gl.where(columns <= last[:, None], score, float("-inf"))
    if LOWER and (F.has_lower or masks.padding is not None):
        first = gl.zeros([ROWS], gl.int32, rows) + (work.first_key - column)
        if F.has_lower:
            first = gl.maximum(first, row + (shape.lower - column))
        score = gl.where(columns >= first[:, None], score, float("-inf"))
    return score
