"""Float32 products by three bfloat16 parts (csrc/split_cpu.h): in float32's error, or torch's own."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable, Iterator

import instruction_sets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lstm_op import eager
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import testing_lstm
from fastattn.modules.linear import linear
from fastattn.testing_lstm import LstmCase

_C = pytest.importorskip("fastattn._C")

# The processor's own, where it has AMX, and the emulation that every processor has.
SETS = [name for name in instruction_sets.ALL if name in ("avx512+amx", "portable+split")]


@pytest.fixture(params=SETS)
def split(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from instruction_sets.chosen(request.param)


def drawn(
    rows: int, columns: int, depth: int, turned: tuple[bool, bool], seed: int, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Operands (rows, depth) and (depth, columns), each dense along its rows or, where turned, along its columns."""
    torch.manual_seed(seed)
    left, right = torch.randn(rows, depth) * scale, torch.randn(depth, columns) * scale
    return left.t().contiguous().t() if turned[0] else left, right.t().contiguous().t() if turned[1] else right


def errors(left: Tensor, right: Tensor) -> tuple[float, float]:
    """Root mean square errors against float64 of ours and of torch's product."""
    exact = left.double() @ right.double()
    ours, theirs = _C.mm(left, right), left @ right
    return tuple((result - exact).square().mean().sqrt().item() for result in (ours, theirs))  # type: ignore[return-value]


def is_split(left: Tensor, right: Tensor) -> bool:
    """Whether these are not torch's bits."""
    return not torch.equal(_C.mm(left, right), left @ right)


@pytest.mark.usefixtures("split")
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(512, 560),
    columns=st.integers(192, 230),
    depth=st.one_of(st.integers(32, 140), st.sampled_from((255, 641, 768))),
    turned=st.tuples(st.booleans(), st.booleans()),
    scale=st.sampled_from((1.0, 1e-9, 3e-12, 1e9)),
    seed=st.integers(0, 2**31),
)
def test_error_of_float32(
    rows: int, columns: int, depth: int, turned: tuple[bool, bool], scale: float, seed: int
) -> None:
    left, right = drawn(rows, columns, depth, turned, seed, scale)
    assert is_split(left, right)
    ours, theirs = errors(left, right)
    assert ours <= 2 * theirs


@pytest.mark.usefixtures("split")
def test_exact_where_float32_is() -> None:
    """Integers of 12 bits: every product and every sum is a float32, and the parts are exact."""
    left, right = torch.randint(-(2**11), 2**11, (512, 64)).float(), torch.randint(-1, 2, (64, 192)).float()
    assert torch.equal(_C.mm(left, right), left @ right)


@pytest.mark.usefixtures("split")
def test_a_view_and_a_bias() -> None:
    wide = torch.randn(512, 200)
    left, weight, bias = wide[:, 40:140], torch.randn(210, 100), torch.randn(210)
    exact = left.double() @ weight.double().t() + bias.double()
    difference = (_C.linear(left, weight, bias) - exact).abs().max().item()
    assert difference <= 2 * (torch.nn.functional.linear(left, weight, bias) - exact).abs().max().item()


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda x: x[3, 5].fill_(float("inf")), id="infinity"),
        pytest.param(lambda x: x[3, 5].fill_(float("nan")), id="nan"),
        pytest.param(lambda x: x[3, 5].fill_(3e38), id="large"),
        pytest.param(lambda x: x.mul_(2.0**63), id="products overflow"),
        pytest.param(lambda x: x.mul_(1e-30), id="small"),
    ],
)
@pytest.mark.parametrize("side", [0, 1, slice(None)])
def test_what_cannot_be_split_is_torchs_product(spoil: Callable[[Tensor], Tensor], side: int | slice) -> None:
    operands = [torch.randn(512, 64), torch.randn(64, 192)]
    for operand in operands[side] if isinstance(side, slice) else [operands[side]]:
        spoil(operand)
    torch.testing.assert_close(
        _C.mm(*operands), operands[0] @ operands[1], rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.usefixtures("split")
def test_zeros_and_other_types() -> None:
    assert torch.equal(_C.mm(torch.zeros(512, 64), torch.randn(64, 192)), torch.zeros(512, 192))
    for dtype in (torch.float64, torch.bfloat16):
        left, right = torch.randn(512, 64).to(dtype), torch.randn(64, 192).to(dtype)
        assert torch.equal(_C.mm(left, right), left @ right)


# The LSTM whose steps are split: from 32 rows a step on forwards, from 64 backwards -----------------------------


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize(
    "case",
    [
        LstmCase(steps=3, batch=32, inputs=20, hidden=32),
        LstmCase(steps=4, batch=64, inputs=33, hidden=40, directions=2),
        LstmCase(steps=3, batch=67, inputs=64, hidden=50, projection=34),
        LstmCase(steps=3, batch=81, inputs=7, hidden=49, bias=False, losses=("out", "h_n", "c_n")),
        LstmCase(lengths=(9,) * 40 + (5,) * 41 + (1,) * 9, inputs=31, hidden=33, directions=2),
        LstmCase(steps=3, batch=70, inputs=16, hidden=36, dtype=torch.float16),
    ],
    ids=str,
)
def test_lstm_in_the_error_budget(case: LstmCase) -> None:
    testing_lstm.check(case, eager("cpu"))


@pytest.mark.usefixtures("split")
def test_lstm_of_numbers_that_cannot_be_split() -> None:
    lstm = fastattn.LSTM(16, 32)
    x = torch.randn(3, 32, 16)
    x[1, 4] = float("inf")  # saturates gates of row 4 or makes them NaN; no other row may notice
    with torch.no_grad():
        out = lstm(x)[0]
        wanted = torch.nn.LSTM(16, 32)
        wanted.load_state_dict(lstm.state_dict())
        torch.testing.assert_close(out, wanted(x)[0], equal_nan=True)


@pytest.mark.usefixtures("split")
def test_nan_with_any_payload_stays_nan() -> None:
    """Rounding the bits 0x7fffffff to bfloat16 would give -0."""
    lstm = fastattn.LSTM(16, 32)
    c0 = torch.zeros(1, 32, 32)
    payload = torch.tensor(struct.unpack("<i", struct.pack("<I", 0x7FFFFFFF))[0], dtype=torch.int32).view(torch.float32)
    c0[0, 3, 7] = payload
    with torch.no_grad():
        out = lstm(torch.randn(3, 32, 16), (torch.zeros(1, 32, 32), c0))[0]
    assert out[1:, 3].isnan().all()
    assert not out[:, torch.arange(32) != 3].isnan().any()


# The projections of the modules ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("split")
def test_projection_in_inference() -> None:
    x, weight, bias = torch.randn(2, 300, 128), torch.nn.Parameter(torch.randn(200, 128)), torch.randn(200)
    for shift in (bias, None):
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if shift is None else shift.double())
        theirs = torch.nn.functional.linear(x, weight, shift)
        with torch.no_grad():
            ours = linear(x, weight, shift)
        assert not torch.equal(ours, theirs)
        assert (ours - exact).square().mean() <= 4 * (theirs - exact).square().mean()


class Counted(Tensor):
    """A subclass, which sees the functions it is given to."""


@pytest.mark.usefixtures("split")
def test_projection_is_torchs_where_more_than_numbers_is_asked_for() -> None:
    x, weight, bias = torch.randn(2, 300, 128), torch.randn(200, 128), torch.randn(200)
    torchs = torch.nn.functional.linear
    assert not torch.equal(linear(x, weight, bias), torchs(x, weight, bias))
    assert torch.equal(linear(x[:, :200], weight, bias), torchs(x[:, :200], weight, bias))
    assert isinstance(linear(x.as_subclass(Counted), weight, bias), Counted)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * 600 * 128 * 200
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype is torch.bfloat16
    _, tangent = torch.func.jvp(lambda x: linear(x, weight, bias), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, weight.sum(1).expand(2, 300, 200), rtol=1e-4, atol=1e-4)
    traced = torch.jit.trace(lambda x: linear(x, weight, bias), x)
    torch.testing.assert_close(traced(x + 1), torchs(x + 1, weight, bias))
    assert linear(x.to("meta"), weight.to("meta"), bias.to("meta")).shape == (2, 300, 200)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize(
    ("weight", "bias"),
    [((200, 256), None), ((200, 64), None), ((200, 64), (200,)), ((200,), None), ((200, 128), (40,)), ((9, 128), (8,))],
    ids=str,
)
def test_wrong_shapes_are_torchs_errors(weight: tuple[int, ...], bias: tuple[int, ...] | None) -> None:
    given = torch.randn(600, 128), torch.randn(weight), None if bias is None else torch.randn(bias)
    with pytest.raises(RuntimeError) as wanted:
        torch.nn.functional.linear(*given)
    with pytest.raises(RuntimeError) as found:
        linear(*given)
    assert str(found.value) == str(wanted.value)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("bias", [(1,), (), (600, 200)], ids=str)
def test_a_bias_that_broadcasts(bias: tuple[int, ...]) -> None:
    given = torch.randn(600, 128), torch.randn(200, 128), torch.randn(bias)
    assert torch.equal(linear(*given), torch.nn.functional.linear(*given))
    torch.testing.assert_close(_C.linear(*given), torch.nn.functional.linear(*given))


@pytest.mark.usefixtures("split")
def test_tensors_that_stand_for_others() -> None:
    x, weight = torch.randn(2, 300, 128), torch.randn(200, 128)
    assert torch.equal(linear(torch._neg_view(x), weight, None), torch.nn.functional.linear(-x, weight))
    assert torch.equal(linear(torch._efficientzerotensor((600, 128)), weight, None), torch.zeros(600, 200))


@pytest.mark.usefixtures("split")
def test_a_result_without_gradients_may_be_changed_in_place() -> None:
    with torch.no_grad():
        out = linear(torch.randn(2, 300, 128), torch.randn(200, 128), None)
    out += torch.zeros(200, requires_grad=True)
    assert out.requires_grad


FORK = """
import os, sys, torch, fastattn
torch.set_num_threads(2)
lstm, x = fastattn.LSTM(128, 64), torch.randn(40, 64, 128)
with torch.no_grad():
    wanted = lstm(x)[0].numpy().tobytes()
    child = os.fork()
    if child == 0:
        os._exit(0 if lstm(x)[0].numpy().tobytes() == wanted else 1)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_lstm_in_the_child_of_a_fork() -> None:
    """The threads of libgomp are not there any more; who waits for them waits for ever."""
    assert subprocess.run([sys.executable, "-c", FORK], timeout=30, check=False).returncode == 0


@pytest.mark.usefixtures("split")
def test_module_in_inference() -> None:
    ours, theirs = fastattn.MultiheadAttention(128, 4, batch_first=True), torch.nn.MultiheadAttention(128, 4)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 300, 128)
    with torch.no_grad():
        out, weights = ours.eval()(x, x, x)
        wanted, wanted_weights = theirs.double().eval()(*[x.double().transpose(0, 1)] * 3)
    torch.testing.assert_close(out, wanted.transpose(0, 1).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, wanted_weights.float(), rtol=1e-5, atol=1e-6)
