"""The C++ attention against the float64 reference, called through the functions that the operators call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import reference
from fastattn.kernels.attention import extension
from fastattn.philox import dropout_keep

pytestmark = pytest.mark.skipif(extension.UNAVAILABLE is not None, reason=str(extension.UNAVAILABLE))

SEED = torch.tensor([-(2**40) - 12345])
EPS = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@dataclass(frozen=True)
class Case:
    """One problem; masks are described by name and built by ``inputs``."""

    batch: int = 2
    heads: int = 2
    key_heads: int = 2
    rows: int = 37
    keys: int = 53
    dim: int = 16
    dtype: torch.dtype = torch.float32
    attn_mask: tuple[tuple[int, ...], torch.dtype] | None = None
    padding: torch.dtype | None = None
    lower: int | None = None
    upper: int | None = None
    dropout: float = 0.0
    layout: str = "heads-last"

    def __str__(self) -> str:
        default = Case()
        changed = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return ",".join(f"{name}={value}" for name, value in changed.items()).replace("torch.", "") or "plain"


CASES = [
    Case(),
    Case(layout="contiguous"),
    Case(layout="strided-last"),
    Case(batch=1, heads=1, key_heads=1, rows=1, keys=1, dim=1),
    Case(rows=1, keys=300, dim=64),
    Case(rows=130, keys=260, dim=64),
    Case(batch=1, rows=200, keys=1100, dim=32),  # several splits in the backward
    Case(batch=1, rows=60, keys=2200, dim=24),  # the higher row tile of the forward with weights
    Case(rows=70, keys=65, dim=256),
    Case(dim=33),
    Case(dim=80),
    Case(heads=6, key_heads=2),
    Case(heads=4, key_heads=1, upper=0),
    Case(rows=150, keys=200, upper=0),
    Case(rows=200, keys=150, upper=0),  # the last rows see all
    Case(rows=150, keys=200, lower=-20, upper=30),
    Case(rows=300, keys=50, lower=-20, upper=-5),  # rows without a key at both ends
    Case(rows=20, keys=300, lower=250),  # keys that no row sees
    Case(lower=10_000_000_000),
    Case(padding=torch.bool),
    Case(rows=80, keys=400, padding=torch.bool),
    Case(padding=torch.float32),
    Case(padding=torch.float64, dropout=0.2),
    Case(padding=torch.float16, heads=4, key_heads=2),
    Case(attn_mask=((2, 2, 37, 53), torch.bool)),
    Case(attn_mask=((1, 1, 37, 53), torch.bool), padding=torch.bool, upper=5),
    Case(attn_mask=((1, 1, 37, 53), torch.float32)),
    Case(attn_mask=((1, 2, 37, 53), torch.float64), padding=torch.bool),
    Case(attn_mask=((2, 1, 1, 53), torch.float16)),
    Case(attn_mask=((2, 2, 37, 1), torch.bfloat16)),
    Case(attn_mask=((2, 2, 1, 1), torch.float32), padding=torch.float32),
    Case(heads=4, attn_mask=((1, 4, 37, 53), torch.float32), padding=torch.float32, dropout=0.5),
    Case(batch=3, keys=600, attn_mask=((1, 1, 37, 600), torch.float32), lower=-3),
    Case(dropout=0.3),
    Case(rows=100, keys=150, dropout=0.9, upper=0),
    Case(dropout=1.0),
    *(
        Case(dtype=dtype, **features)
        for dtype in (torch.float16, torch.bfloat16)
        for features in (
            {"rows": 100, "keys": 170, "dim": 64},
            {"heads": 4, "dim": 40, "padding": torch.bool, "attn_mask": ((1, 4, 37, 53), dtype), "dropout": 0.1},
            {"layout": "strided-last", "attn_mask": ((2, 1, 37, 1), torch.float32), "upper": 0},
        )
    ),
]


@dataclass
class Inputs:
    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    padding: Tensor | None
    leaves: list[Tensor] = field(default_factory=list)

    def problem(self) -> tuple[Any, ...]:
        case = self.case
        scale = case.dim**-0.5
        return self.attn_mask, self.padding, SEED, case.dropout, scale, case.lower, case.upper


def strided(shape: tuple[int, ...], case: Case, generator: torch.Generator) -> Tensor:
    batch, heads, rows, dim = shape
    if case.layout == "heads-last":
        tensor = torch.randn(batch, rows, heads, dim, generator=generator).to(case.dtype).transpose(1, 2)
    elif case.layout == "contiguous":
        tensor = torch.randn(shape, generator=generator).to(case.dtype)
    else:
        tensor = torch.randn(batch, heads, dim, rows, generator=generator).to(case.dtype).transpose(2, 3)
    assert tensor.shape == shape
    return tensor


def mask(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """About a quarter masked; a float mask leaves a key to every row, see ``test_rows_without_a_key`` for others."""
    keep = torch.rand(shape, generator=generator) > 0.25
    if dtype == torch.bool:
        return keep
    keep[..., int(0.4 * shape[-1])] = True
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.masked_fill(~keep, float("-inf")).to(dtype)


def inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    kv_shape = (case.batch, case.key_heads, case.keys, case.dim)
    query = strided((case.batch, case.heads, case.rows, case.dim), case, generator)
    key, value = strided(kv_shape, case, generator), strided(kv_shape, case, generator)
    attn_mask = padding = None
    if case.attn_mask is not None:
        attn_mask = mask(case.attn_mask[0], case.attn_mask[1], generator)
    if case.padding is not None:
        padding = mask((case.batch, case.keys), case.padding, generator)
        hidden = False if case.padding == torch.bool else float("-inf")
        padding[0, case.keys // 2 :] = hidden
        padding[-1, : case.keys // 3] = hidden
        if case.batch > 2:
            padding[1] = hidden
    return Inputs(case, query, key, value, attn_mask, padding)


def eager(given: Inputs, dtype: torch.dtype, average: bool | None) -> dict[str, Tensor]:
    """Results and gradients of the reference computed in ``dtype``; average None: no gradient through the weights."""

    def leaf(tensor: Tensor | None) -> Any:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        return tensor.detach().to(dtype).requires_grad_()

    query, key, value, attn_mask, padding = (
        leaf(t) for t in (given.query, given.key, given.value, given.attn_mask, given.padding)
    )
    case = given.case
    out, lse, weights = reference.attention(
        query, key, value, scale=case.dim**-0.5, attn_mask=attn_mask, key_padding_mask=padding, lower=case.lower,
        upper=case.upper, seed=SEED, dropout_p=case.dropout,
    )  # fmt: skip
    grads = cotangents(case)
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    loss = (out * grads["out"]).sum() + (finite * grads["lse"][0]).sum()
    if average is not None:
        loss = loss + ((weights.mean(1) if average else weights) * grads["mean" if average else "weights"]).sum()
    leaves = {"query": query, "key": key, "value": value, "attn_mask": attn_mask, "padding": padding}
    wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    results = {"out": out, "lse": lse, "weights": weights, "mean": weights.mean(1)}
    for (name, tensor), grad in zip(wanted.items(), found, strict=True):
        results["d" + name] = torch.zeros_like(tensor) if grad is None else grad
    return {name: tensor.detach() for name, tensor in results.items()}


def cotangents(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "out": (case.batch, case.heads, case.rows, case.dim),
        "lse": (2, case.batch, case.heads, case.rows),
        "weights": (case.batch, case.heads, case.rows, case.keys),
        "mean": (case.batch, case.rows, case.keys),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def close(
    name: str, ours: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype, roundings: int = 1
) -> None:
    """The error budget: twice plain PyTorch's error, three times for gradients, and the rounding of the result."""
    assert ours.shape == exact.shape, name
    infinite = exact == float("-inf")
    assert torch.equal(ours == float("-inf"), infinite), name
    ours, exact, plain = (t.double().masked_fill(infinite, 0.0) for t in (ours, exact, plain))
    assert ours.isfinite().all(), name
    if exact.numel() == 0:
        return
    size = exact.abs().max().item()
    allowed = (3 if name.startswith("d") else 2) * (plain - exact).abs().max().item() + roundings * EPS[dtype] * size
    error = (ours - exact).abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, largest {size:.3g}"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small problems on busy cores: there, waiting for the other threads takes longer than the tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=extension.instruction_sets() if extension.UNAVAILABLE is None else [])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    extension.use_instruction_set(request.param)
    yield request.param
    extension.use_instruction_set(extension.instruction_sets()[0])


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: Case) -> None:
    given = inputs(case)
    exact = eager(given, torch.float64, average=None)
    plain = eager(given, case.dtype, average=None)
    tensors, problem = (given.query, given.key, given.value), given.problem()

    out, lse = extension.attention(*tensors, *problem)
    assert out.transpose(1, 2).is_contiguous()
    close("out", out, exact["out"], plain["out"], case.dtype)
    close("lse", lse[0], exact["lse"], plain["lse"], torch.float32)
    for average, name in ((True, "mean"), (False, "weights")):
        out_again, lse_again, weights = extension.attention_with_weights(*tensors, *problem, average)
        alone = extension.attention_weights(given.query, given.key, lse, *problem, average)
        for found in (weights, alone):
            assert found.is_contiguous()
            assert found.dtype == case.dtype
            close(name, found, exact[name], plain[name], case.dtype)
        close("out", out_again, exact["out"], plain["out"], case.dtype)
        close("lse", lse_again[0], exact["lse"], plain["lse"], torch.float32)

    grads = cotangents(case)
    found = extension.attention_backward(
        grads["out"], grads["lse"], *tensors, out, lse, *problem,
        "dattn_mask" in exact, "dpadding" in exact,
    )  # fmt: skip
    check_gradients(given, [*found[:3], *found[3]], exact, plain)


def check_gradients(
    given: Inputs, found: list[Tensor], exact: Any, plain: Any, roundings: int = 1
) -> None:
    """``found`` holds the gradients of query, key, value and of those masks that have one."""
    sources = {"query": given.query, "key": given.key, "value": given.value}
    masks = {"attn_mask": given.attn_mask, "padding": given.padding}
    sources |= {name: mask for name, mask in masks.items() if "d" + name in exact}
    for (name, source), grad in zip(sources.items(), found, strict=True):
        assert grad.dtype == source.dtype
        dtype = source.dtype if source.dtype in EPS and name != "query" else given.case.dtype
        close("d" + name, grad, exact["d" + name], plain["d" + name], dtype, roundings)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_gradient(case: Case, average: bool) -> None:
    """The gradient through the weights, with what it adds to the logsumexp's, as the operators compose it."""
    given = inputs(case)
    exact, plain = (eager(given, dtype, average) for dtype in (torch.float64, case.dtype))
    tensors, problem = (given.query, given.key, given.value), given.problem()
    wanted = ("dattn_mask" in exact, "dpadding" in exact)
    grads = cotangents(case)
    out, lse = extension.attention(*tensors, *problem)
    first = extension.attention_weights_backward(
        grads["mean" if average else "weights"], given.query, given.key, lse, *problem, average, *wanted
    )
    second = extension.attention_backward(grads["out"], grads["lse"] + first[2], *tensors, out, lse, *problem, *wanted)
    masks = [one + other for one, other in zip(first[3], second[3], strict=True)]
    total = [first[0] + second[0], first[1] + second[1], second[2], *masks]
    check_gradients(given, total, exact, plain, roundings=2)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("rows", "keys"), [(37, 53), (1, 8), (9, 100), (200, 130)])
def test_dropout_is_philox(rows: int, keys: int) -> None:
    query, key = torch.randn(2, 3, rows, 8), torch.randn(2, 3, keys, 8)
    _, _, weights = extension.attention_with_weights(query, key, key, None, None, SEED, 0.4, 1.0, None, None, False)
    assert torch.equal(weights != 0, dropout_keep(SEED, 0.4, 2, 3, rows, keys))


def everything(given: Inputs) -> list[Tensor]:
    tensors, problem, grads = (given.query, given.key, given.value), given.problem(), cotangents(given.case)
    out, lse, mean = extension.attention_with_weights(*tensors, *problem, True)
    wanted = tuple(mask is not None for mask in problem[:2])
    first = extension.attention_backward(grads["out"], grads["lse"], *tensors, out, lse, *problem, *wanted)
    second = extension.attention_weights_backward(grads["mean"], given.query, given.key, lse, *problem, True, *wanted)
    return [out, lse, mean, *first[:3], *first[3], *second[:3], *second[3]]


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, heads=1, key_heads=1, rows=300, keys=700, upper=100, dropout=0.1),
        Case(heads=4, rows=200, keys=600, attn_mask=((1, 1, 200, 600), torch.float32), padding=torch.float32),
    ],
    ids=str,
)
def test_bitwise_independent_of_threads(case: Case) -> None:
    given = inputs(case)
    first = everything(given)
    for count in (2, 3):
        torch.set_num_threads(count)
        for ours, before in zip(everything(given), first, strict=True):
            assert torch.equal(ours, before)


@pytest.mark.parametrize(
    "shape", [{"rows": 0}, {"keys": 0}, {"batch": 0}, {"heads": 0, "key_heads": 0}, {"rows": 0, "keys": 0}], ids=str
)
def test_nothing_there(shape: dict[str, int]) -> None:
    case = Case(**shape)  # type: ignore[arg-type]
    given = inputs(case)
    out, lse, mean, dquery, dkey, dvalue, *_ = everything(given)
    assert out.shape == dquery.shape == given.query.shape
    assert dkey.shape == dvalue.shape == given.key.shape
    assert mean.shape == (case.batch, case.rows, case.keys)
    for tensor in (out, mean, dquery, dkey, dvalue):
        assert torch.equal(tensor, torch.zeros_like(tensor))
    assert (lse[0] == float("-inf")).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_rows_without_a_key(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 2, 5, 8) for _ in range(3))
    keep = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    keep[..., 2, :] = False
    padding = torch.tensor([[True] * 5, [False] * 5])
    empty = ~keep.any(-1).expand(2, 2, 5) | ~padding.any(-1)[:, None, None]
    masks = [m if dtype == torch.bool else torch.zeros_like(m, dtype=dtype).masked_fill(~m, -torch.inf)
             for m in (keep, padding)]  # fmt: skip
    problem = (*masks, None, 0.0, 1.0, None, None)
    out, lse, weights = extension.attention_with_weights(query, key, value, *problem, False)
    assert torch.equal(lse[0] == float("-inf"), empty)
    assert (lse[1][empty] == 0).all()
    assert (out[empty] == 0).all()
    assert (weights[empty] == 0).all()
    ones = torch.ones(2, 2, 2, 5)
    wanted = (dtype != torch.bool,) * 2
    first = extension.attention_backward(torch.ones_like(out), ones, query, key, value, out, lse, *problem, *wanted)
    second = extension.attention_weights_backward(torch.ones_like(weights), query, key, lse, *problem, False, *wanted)
    for grad in (*first[:3], *first[3], *second[:3], *second[3]):
        assert grad.isfinite().all()
    assert (first[0][empty] == 0).all()
    assert (second[0][empty] == 0).all()


@pytest.mark.parametrize("lowest", [-1e9, torch.finfo(torch.float32).min])
def test_rows_of_the_lowest_number_stay_uniform(lowest: float) -> None:
    """Adding the lowest float to every key leaves a uniform row, also where it comes again from the logsumexp."""
    query, key = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 5, 8)
    problem = (torch.full((1, 1, 3, 5), lowest), None, None, 0.0, 0.01, None, None)
    _, lse, weights = extension.attention_with_weights(query, key, key, *problem, True)
    again = extension.attention_weights(query, key, lse, *problem, True)
    for found in (weights, again):
        torch.testing.assert_close(found, torch.full((1, 3, 5), 0.2), atol=1e-6 if lowest < -1e10 else 0.02, rtol=0)
    torch.testing.assert_close(weights, again, atol=1e-5, rtol=0)


def test_gradients_of_any_stride() -> None:
    case = Case()
    given = inputs(case)
    tensors, problem = (given.query, given.key, given.value), given.problem()
    out, lse = extension.attention(*tensors, *problem)
    one = torch.ones(1, 1, 1, 1)
    flat = one.expand_as(out), one.expand_as(lse)
    dense = [grad.contiguous() for grad in flat]
    ours = extension.attention_backward(*flat, *tensors, out, lse, *problem, False, False)
    expected = extension.attention_backward(*dense, *tensors, out, lse, *problem, False, False)
    assert all(torch.equal(one, other) for one, other in zip(ours[:3], expected[:3], strict=True))
    _, _, dvalue, *_ = extension.attention_backward(None, dense[1], *tensors, out, lse, *problem, False, False)
    assert (dvalue == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 2, 3)}, "query: got shape"),
        ({"query": torch.zeros(2, 2, 3, 8, dtype=torch.int64)}, "query: got dtype"),
        ({"key": torch.zeros(2, 2, 4, 7)}, "key: got shape"),
        ({"key": torch.zeros(2, 3, 4, 8)}, "key: got 3 heads"),
        ({"key": torch.zeros(2, 2, 4, 8).half()}, "key: got dtype"),
        ({"value": torch.zeros(2, 2, 5, 8)}, "value: got shape"),
        ({"value": torch.zeros(2, 2, 4, 8, device="meta")}, "value: got a"),
        ({"attn_mask": torch.zeros(3, 4)}, "attn_mask: got shape"),
        ({"attn_mask": torch.zeros(1, 1, 3, 4, dtype=torch.int32)}, "attn_mask: got dtype"),
        ({"padding": torch.zeros(2, 3)}, "key_padding_mask: got shape"),
        ({"dropout": 1.5}, "dropout_p: got 1.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    given = {
        "query": torch.zeros(2, 2, 3, 8), "key": torch.zeros(2, 2, 4, 8), "value": torch.zeros(2, 2, 4, 8),
        "attn_mask": None, "padding": None, "seed": None, "dropout": 0.0, "scale": 1.0, "lower": None, "upper": None,
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        extension.attention(*(given | change).values())


def test_operator_gradients() -> None:
    """Through torch.ops, with autograd: the second consumer of the extension."""
    query, key, value = (torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3))
    problem = (None, None, None, 0.0, 0.5, None, 0)
    out, (lse, _), weights = torch.ops.fastattn.attention_with_weights(query, key, value, *problem, True, "cpu")
    ours = torch.autograd.grad((out.sin().sum() + lse.cos().sum() + weights.sin().sum()), (query, key, value))
    out, lse, weights = reference.attention(query, key, value, scale=0.5, upper=0)
    expected = torch.autograd.grad(
        (out.sin().sum() + lse.cos().sum() + weights.mean(1).sin().sum()), (query, key, value)
    )
    torch.testing.assert_close(ours, expected)
