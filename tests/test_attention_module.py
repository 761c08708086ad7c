"""fastattn.MultiheadAttention against torch.nn.MultiheadAttention: outputs, weights and gradients, option by option."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn

Theirs = nn.MultiheadAttention
Ours = fastattn.MultiheadAttention
BATCH, HEADS, ROWS, COLUMNS, EMBED, KDIM, VDIM = 2, 3, 4, 5, 12, 7, 9

# Which of query, key and value are one tensor; "dims" has kdim and vdim of its own.
SHARING = ["self", "key is value", "query is key", "apart", "dims"]
CONSTRUCTORS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"bias": False, "add_bias_kv": True, "add_zero_attn": True},
]
PADDING = [None, "bool", "float"]
MASKS = [None, "bool 2-D", "float 2-D", "bool 3-D", "float 3-D"]
WEIGHTS = [(False, True), (True, True), (True, False)]


def twins(dtype: torch.dtype = torch.float64, **kwargs: Any) -> tuple[Theirs, Ours]:
    """torch's module and ours with the same parameters."""
    theirs = Theirs(EMBED, HEADS, dtype=dtype, **kwargs)
    for bias in (theirs.in_proj_bias, theirs.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    ours = Ours(EMBED, HEADS, dtype=dtype, **kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def make_inputs(sharing: str, batch_first: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Leaves that require a gradient."""
    columns = ROWS if sharing in ("self", "query is key") else COLUMNS
    kdim, vdim = (KDIM, VDIM) if sharing == "dims" else (EMBED, EMBED)
    shapes = [(BATCH, ROWS, EMBED), (BATCH, columns, kdim), (BATCH, columns, vdim)]
    if not batch_first:
        shapes = [(length, batch, size) for batch, length, size in shapes]
    query, key, value = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    if sharing == "self":
        return [query, query, query]
    if sharing == "key is value":
        return [query, key, key]
    if sharing == "query is key":
        return [query, query, value]
    return [query, key, value]


def make_mask(kind: str | None, rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor | None:
    """A mask with a key left in every row, so that torch's weights are not NaN."""
    if kind is None:
        return None
    shape = (rows, columns) if kind.endswith("2-D") else (BATCH * HEADS, rows, columns)
    if kind.startswith("float"):
        return torch.randn(shape, dtype=dtype, requires_grad=True)
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def make_padding(kind: str | None, columns: int, dtype: torch.dtype = torch.float64) -> Tensor | None:
    if kind is None:
        return None
    if kind == "float":
        return torch.randn(BATCH, columns, dtype=dtype, requires_grad=True)
    padding = torch.zeros(BATCH, columns, dtype=torch.bool)
    padding[0, columns // 2 :] = True
    return padding


def run(module: nn.Module, inputs: list[Tensor], **kwargs: Any) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Output, weights, and the gradients of everything that has one, for a loss that reads both results."""
    with warnings.catch_warnings():
        # torch warns of masks of two kinds.
        warnings.simplefilter("ignore")
        out, weights = module(*inputs, **kwargs)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (result * torch.randn(result.shape, generator=generator, dtype=result.dtype)).sum()
        for result in (out, weights)
        if result is not None
    )
    leaves = dict(module.named_parameters())
    leaves |= {f"input {place}": tensor for place, tensor in enumerate(inputs)}
    leaves |= {name: mask for name, mask in kwargs.items() if isinstance(mask, Tensor) and mask.requires_grad}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return out.detach(), weights, dict(zip(leaves, gradients, strict=True))


def assert_same(ours: tuple[Any, ...], theirs: tuple[Any, ...], dtype: torch.dtype = torch.float64) -> None:
    """Results of ``run`` up to some hundred roundings, which is what two orders of summation differ by here."""
    tolerance = 2**8 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    assert (ours[1] is None) == (theirs[1] is None)
    if ours[1] is not None:
        torch.testing.assert_close(ours[1], theirs[1], rtol=tolerance, atol=tolerance)
    assert ours[2].keys() == theirs[2].keys()
    for name, gradient in theirs[2].items():
        got = ours[2][name]
        assert (got is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(got, gradient, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "time_first"])
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("constructor", CONSTRUCTORS, ids=lambda options: "+".join(options) or "plain")
def test_every_option_equals_torch(constructor: dict[str, bool], sharing: str, batch_first: bool) -> None:
    dims = {"kdim": KDIM, "vdim": VDIM} if sharing == "dims" else {}
    theirs, ours = twins(batch_first=batch_first, **constructor, **dims)
    # The three kinds of weights take turns, so that over the sharings each meets every pair of masks.
    turn = SHARING.index(sharing)
    for place, (padding, mask) in enumerate(itertools.product(PADDING, MASKS)):
        need_weights, average = WEIGHTS[(place + turn) % len(WEIGHTS)]
        inputs = make_inputs(sharing, batch_first)
        columns = inputs[1].shape[1 if batch_first else 0]
        kwargs = {
            "key_padding_mask": make_padding(padding, columns),
            "attn_mask": make_mask(mask, ROWS, columns),
            "need_weights": need_weights,
            "average_attn_weights": average,
        }
        assert_same(run(ours, inputs, **kwargs), run(theirs, inputs, **kwargs))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("constructor", CONSTRUCTORS, ids=lambda options: "+".join(options) or "plain")
def test_unbatched_equals_torch(constructor: dict[str, bool], training: bool) -> None:
    for batch_first, (need_weights, average) in itertools.product((True, False), WEIGHTS):
        theirs, ours = (module.train(training) for module in twins(batch_first=batch_first, **constructor))
        inputs = [
            torch.randn(size, EMBED, dtype=torch.float64, requires_grad=True) for size in (ROWS, COLUMNS, COLUMNS)
        ]
        padding = torch.tensor([False] * 3 + [True] * 2)
        for mask in (None, torch.randn(ROWS, COLUMNS).double(), torch.randn(HEADS, ROWS, COLUMNS).double()):
            kwargs = {"key_padding_mask": padding, "attn_mask": mask}
            kwargs |= {"need_weights": need_weights, "average_attn_weights": average}
            assert_same(run(ours, inputs, **kwargs), run(theirs, inputs, **kwargs))


@pytest.mark.parametrize("constructor", CONSTRUCTORS[1:], ids=lambda options: "+".join(options))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("columns", [3, 5])
def test_is_causal_is_the_triangle(columns: int, mask: str | None, constructor: dict[str, bool]) -> None:
    theirs, ours = twins(batch_first=True, **constructor)
    query = torch.randn(BATCH, ROWS, EMBED, dtype=torch.float64, requires_grad=True)
    key = torch.randn(BATCH, columns, EMBED, dtype=torch.float64, requires_grad=True)
    attn_mask = make_mask(mask, ROWS, columns)
    triangle = torch.ones(ROWS, columns, dtype=torch.bool).triu(1)
    both = triangle
    if attn_mask is not None:
        both = triangle | attn_mask if attn_mask.dtype == torch.bool else attn_mask.masked_fill(triangle, float("-inf"))
    inputs = [query, key, key]
    for need_weights, padding in ((True, None), (False, None), (True, "bool"), (False, "bool")):
        kwargs = {"need_weights": need_weights, "key_padding_mask": make_padding(padding, columns)}
        got = run(ours, inputs, attn_mask=attn_mask, is_causal=True, **kwargs)
        wanted = run(theirs, inputs, attn_mask=both, **kwargs)
        # The mask is a leaf in one call and computed in the other.
        got[2].pop("attn_mask", None)
        wanted[2].pop("attn_mask", None)
        assert_same(got, wanted)


def test_a_causal_mask_and_the_hint_are_the_mask() -> None:
    theirs, ours = twins(batch_first=True)
    inputs = make_inputs("self", batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(ROWS, dtype=torch.float64)
    for need_weights in (True, False):
        kwargs = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
        assert_same(run(ours, inputs, **kwargs), run(theirs, inputs, **kwargs))


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_as_exact_as_torch(dtype: torch.dtype, sharing: str) -> None:
    """Errors against float64 are at most twice torch's, three times for gradients, plus a few roundings."""
    dims = {"kdim": KDIM, "vdim": VDIM} if sharing == "dims" else {}
    theirs, ours = twins(dtype, batch_first=True, **dims)
    exact = copy.deepcopy(theirs).double()
    inputs = make_inputs(sharing, batch_first=True, dtype=dtype)
    double: dict[int, Tensor] = {}
    for tensor in inputs:
        double.setdefault(id(tensor), tensor.detach().double().requires_grad_())
    columns = inputs[1].shape[1]
    turn = SHARING.index(sharing)
    for place, (padding, mask) in enumerate(itertools.product(PADDING, MASKS)):
        need_weights = (place + turn) % 2 == 0
        kwargs: dict[str, Any] = {
            "key_padding_mask": make_padding(padding, columns, dtype),
            "attn_mask": make_mask(mask, ROWS, columns, dtype),
        }
        wide = {
            name: mask.double() if mask is not None and mask.is_floating_point() else mask
            for name, mask in kwargs.items()
        }
        oracle = run(exact, [double[id(tensor)] for tensor in inputs], need_weights=need_weights, **wide)
        got = run(ours, inputs, need_weights=need_weights, **kwargs)
        plain = run(theirs, inputs, need_weights=need_weights, **kwargs)
        names = [name for name in plain[2] if name in oracle[2] and plain[2][name] is not None]
        triples = [(2.0, got[0], plain[0], oracle[0])] + [(3.0, got[2][n], plain[2][n], oracle[2][n]) for n in names]
        if need_weights:
            triples.append((2.0, got[1], plain[1], oracle[1]))
        for factor, ours_, theirs_, oracle_ in triples:
            assert ours_.dtype == theirs_.dtype
            rounding = torch.finfo(dtype).eps * max(1.0, oracle_.abs().max().item())
            assert (ours_ - oracle_).abs().max() <= factor * (theirs_ - oracle_).abs().max() + 8 * rounding


def test_gradcheck() -> None:
    ours = Ours(EMBED, HEADS, batch_first=True, add_bias_kv=True, add_zero_attn=True, kdim=KDIM, vdim=VDIM).double()
    names = list(dict(ours.named_parameters()))
    leaves = (
        *make_inputs("dims", batch_first=True),
        make_mask("float 2-D", ROWS, COLUMNS),
        make_padding("float", COLUMNS),
    )

    def function(*values: Tensor) -> Any:
        query, key, value, mask, padding, *parameters = values
        kwargs = {"attn_mask": mask, "key_padding_mask": padding}
        return torch.func.functional_call(ours, dict(zip(names, parameters, strict=True)), (query, key, value), kwargs)

    assert torch.autograd.gradcheck(function, (*leaves, *ours.parameters()), fast_mode=True)


def test_dropout_is_in_the_weights_and_reproducible() -> None:
    _, ours = twins(batch_first=True, dropout=0.5)
    x = torch.randn(BATCH, 8, EMBED, dtype=torch.float64)
    torch.manual_seed(3)
    out, weights = ours(x, x, x, average_attn_weights=False)
    value = torch.nn.functional.linear(x, ours.in_proj_weight[2 * EMBED :], ours.in_proj_bias[2 * EMBED :])
    heads = weights @ value.view(BATCH, 8, HEADS, -1).transpose(1, 2)
    torch.testing.assert_close(ours.out_proj(heads.transpose(1, 2).flatten(2)), out)
    assert 0.2 < (weights == 0).double().mean() < 0.8
    torch.manual_seed(3)
    again, averaged = ours(x, x, x)
    assert torch.equal(again, out)
    torch.testing.assert_close(averaged, weights.mean(1))
    assert not torch.equal(ours(x, x, x)[0], out)
    ours.eval()
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])


@pytest.mark.parametrize("shape", [(0, 4, EMBED), (2, 0, EMBED), (1, 1, EMBED)])
@pytest.mark.parametrize("need_weights", [True, False])
def test_empty_and_single(shape: tuple[int, ...], need_weights: bool) -> None:
    _, ours = twins(batch_first=True)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out, weights = ours(x, x, x, need_weights=need_weights)
    out.sum().backward()
    assert out.shape == x.shape
    assert weights is None or weights.shape == (*shape[:2], shape[1])


def test_no_keys_give_the_output_bias() -> None:
    _, ours = twins(batch_first=True)
    query, key = torch.randn(2, 3, EMBED, dtype=torch.float64), torch.randn(2, 0, EMBED, dtype=torch.float64)
    for need_weights in (True, False):
        out, _ = ours(query, key, key, need_weights=need_weights)
        torch.testing.assert_close(out, ours.out_proj.bias.expand_as(out))
