"""The sigmoid and the tanh of the C++ LSTM (csrc/vec.h) against float64, in units of the last place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from instruction_sets import PLAIN, chosen
from torch import Tensor

pytestmark = pytest.mark.skipif(not PLAIN, reason="needs the C++ extension")
INPUT, FORGET, CELL = range(3)
LEAST = 1.6458116e-38  # exp(-87): the least sigmoid
SMALL = torch.logspace(-37, 0, 4001, dtype=torch.float64).float()
# Multiples of 1/256 hit and miss the roundings of every octave; the large ones must neither overflow nor pass 1.
NUMBERS = torch.cat([torch.arange(-100, 100, 1 / 256), SMALL, -SMALL, torch.tensor([0.0, 1e4, -1e4, 3e38, -3e38])])


@pytest.fixture(autouse=True, params=PLAIN)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from chosen(request.param)


def one_gate(numbers: Tensor, gate: int, start: float, opened: int | None = None) -> Tensor:
    """c_1 of an LSTM of one unit, from c_0 = start, whose ``gate`` alone sees the numbers; a gate may stand open."""
    weight, bias = torch.zeros(4, 1), torch.zeros(4)
    weight[gate] = 1.0
    if opened is not None:
        bias[opened] = 50.0
    rows = len(numbers)
    weights = [weight, torch.zeros(4, 1), bias, torch.zeros(4)]
    states = torch.zeros(1, rows, 1), torch.full((1, rows, 1), start)
    _, _, c_n, *_ = torch.ops.fastattn.lstm_layer(numbers[None, :, None], None, *states, weights, False, "cpu")
    return c_n.flatten()  # type: ignore[no-any-return]


def units_off(got: Tensor, want: Tensor) -> float:
    """The largest error in units of the last place, below exp(-87) of that."""
    nearest = want.float().abs().clamp_min(LEAST)
    unit = torch.nextafter(nearest, torch.tensor(torch.inf)) - nearest
    wrong = (got.double() - want).abs() - LEAST
    return (wrong / unit.double()).max().item()


def test_sigmoid() -> None:
    got = one_gate(NUMBERS, FORGET, 1.0)
    assert units_off(got, torch.sigmoid(NUMBERS.double())) <= 3
    assert got.max() <= 1


def test_tanh() -> None:
    got, want = one_gate(NUMBERS, CELL, 0.0, INPUT), torch.tanh(NUMBERS.double())
    assert units_off(got, want) <= 3
    large = NUMBERS.abs() >= 2  # where 1 - tanh^2 shows it
    assert units_off(got[large], want[large]) <= 1.3
    assert got.abs().max() <= 1
    assert got[NUMBERS >= 10].min() == 1


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F8000C0, 0x7FC001FF], ids=hex)
@pytest.mark.parametrize(("gate", "opened"), [(FORGET, None), (CELL, INPUT)])
def test_nan_stays(gate: int, opened: int | None, bits: int) -> None:
    """With any payload, which arithmetic on the bits of a number could make one of."""
    weights = [torch.zeros(4, 1), torch.zeros(4, 1), torch.zeros(4), torch.zeros(4)]
    weights[2][gate] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    if opened is not None:
        weights[2][opened] = 50.0
    one = torch.ones(1, 1, 1)
    _, _, c_n, *_ = torch.ops.fastattn.lstm_layer(one, None, one, one, weights, False, "cpu")
    assert c_n.isnan().all()
