"""AdditiveAttention and LuongAttention against the papers' equations, with cached keys, coverage, and bad arguments."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from backends import DEVICE
from torch import Tensor, nn

import fastattn
from fastattn import AdditiveAttention, LuongAttention

BATCH, ROWS, COLUMNS, QUERY, KEY, HIDDEN = 2, 3, 5, 6, 4, 7
FACTORIES: dict[str, Any] = {
    "additive": lambda: AdditiveAttention(QUERY, KEY, HIDDEN, device=DEVICE),
    "additive without bias": lambda: AdditiveAttention(QUERY, KEY, HIDDEN, bias=False, device=DEVICE),
    "additive with coverage": lambda: AdditiveAttention(QUERY, KEY, HIDDEN, coverage=True, device=DEVICE),
    "dot": lambda: LuongAttention(KEY, KEY, device=DEVICE),
    "general": lambda: LuongAttention(QUERY, KEY, "general", device=DEVICE),
    "concat": lambda: LuongAttention(QUERY, KEY, "concat", device=DEVICE),
    "concat with coverage": lambda: LuongAttention(QUERY, KEY, "concat", coverage=True, device=DEVICE),
}
COVERED = [name for name in FACTORIES if "coverage" in name]


def _draw(module: Any, value: bool = False) -> dict[str, Tensor]:
    inputs = {
        "query": torch.randn(BATCH, ROWS, module.query_dim, device=DEVICE),
        "key": torch.randn(BATCH, COLUMNS, module.key_dim, device=DEVICE),
    }
    return inputs | ({"value": torch.randn(BATCH, COLUMNS, 3, device=DEVICE)} if value else {})


def _scores(module: Any, query: Tensor, key: Tensor, coverage: Tensor | None) -> Tensor:
    """e_ij as the papers write it, one pair of states at a time."""
    additive = module if isinstance(module, AdditiveAttention) else module.additive
    if additive is not None:
        # One affine map of the concatenation, as in Luong et al.; W_q and W_k are its halves.
        both = nn.Linear(module.query_dim + module.key_dim, additive.hidden_dim).to(query)
        both.weight.data = torch.cat([additive.query_projection.weight, additive.key_projection.weight], 1).to(query)
        bias = additive.key_projection.bias
        both.bias.data = torch.zeros_like(both.bias) if bias is None else bias.data.to(query)
        pairs = torch.cat(
            [query.unsqueeze(2).expand(-1, -1, COLUMNS, -1), key.unsqueeze(1).expand(-1, ROWS, -1, -1)], -1
        )
        total = both(pairs)
        if coverage is not None:
            total = total + coverage.reshape(BATCH, -1, COLUMNS, 1) * additive.coverage_weight.to(query)
        return total.tanh() @ additive.weight.to(query)
    if module.projection is None:
        return torch.einsum("bid,bjd->bij", query, key)
    return torch.einsum("bid,de,bje->bij", query, module.projection.weight.T.to(query), key)


def _expected(module: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    query, key = inputs["query"].double(), inputs["key"].double()
    coverage = inputs.get("coverage")
    scores = _scores(module, query, key, None if coverage is None else coverage.double())
    padding = inputs.get("key_padding_mask")
    if padding is not None:
        scores = scores.masked_fill(~padding.unsqueeze(1), float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    return weights @ inputs.get("value", inputs["key"]).double(), weights


def _assert_close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("name", FACTORIES)
def test_the_equations(name: str, value: bool) -> None:
    module = FACTORIES[name]()
    inputs: dict[str, Any] = _draw(module, value)
    inputs["key_padding_mask"] = torch.tensor([[True] * 4 + [False], [False] * COLUMNS], device=DEVICE)
    if name in COVERED:
        inputs["coverage"] = torch.rand(BATCH, COLUMNS, device=DEVICE)
    out, weights = module(**inputs, need_weights=True)
    _assert_close((out, weights), _expected(module, inputs))
    assert not out[1].any()
    torch.testing.assert_close(module(**inputs), out)
    if out.requires_grad:  # "dot" has no parameters
        (out.sum() + weights.square().sum()).backward()
    grads = [parameter.grad for parameter in module.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", FACTORIES)
def test_one_step_with_projected_keys(name: str) -> None:
    """A decoder projects its memory once and gives a query (B, query_dim) at each step."""
    module = FACTORIES[name]()
    inputs: dict[str, Any] = _draw(module)
    inputs["key_padding_mask"] = torch.arange(COLUMNS, device=DEVICE).expand(BATCH, -1) < 4
    if name in COVERED:
        inputs["coverage"] = torch.rand(BATCH, ROWS, COLUMNS, device=DEVICE)
    out, weights = module(**inputs, need_weights=True)
    cached = module.project_keys(inputs["key"])
    for step in range(ROWS):
        now = {**inputs, "key": cached, "query": inputs["query"][:, step]}
        if name in COVERED:
            now["coverage"] = inputs["coverage"][:, step]
        step_out, step_weights = module(**now, need_weights=True)
        assert step_out.shape == (BATCH, module.key_dim)
        assert step_weights.shape == (BATCH, COLUMNS)
        torch.testing.assert_close(step_out, out[:, step])
        torch.testing.assert_close(step_weights, weights[:, step])
        torch.testing.assert_close(module(**now), out[:, step])


@pytest.mark.parametrize("name", COVERED)
def test_coverage_of_past_weights(name: str) -> None:
    """The pointer-generator's loop: coverage is the sum of the weights so far, and gradients flow through it."""
    module = FACTORIES[name]()
    inputs = _draw(module)
    key, coverage = module.project_keys(inputs["key"]), None
    for step in range(ROWS):
        _, weights = module(inputs["query"][:, step], key, coverage=coverage, need_weights=True)
        coverage = weights if coverage is None else coverage + weights
    assert coverage is not None
    torch.testing.assert_close(coverage.sum(-1), torch.full((BATCH,), float(ROWS), device=DEVICE))
    coverage.square().sum().backward()
    used = [parameter for label, parameter in module.named_parameters() if not label.endswith("bias")]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in used)


@pytest.mark.parametrize("name", FACTORIES)
def test_compiled_decoding(name: str) -> None:
    torch._dynamo.reset()
    module = FACTORIES[name]()
    counts: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        counts.append(1)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for length in range(11, 18):
        key = module.project_keys(torch.randn(BATCH, length, module.key_dim, device=DEVICE))
        query = torch.randn(BATCH, module.query_dim, device=DEVICE)
        torch.testing.assert_close(compiled(query, key), module(query, key))
    assert len(counts) == 1


@pytest.mark.parametrize("name", FACTORIES)
def test_state(name: str) -> None:
    module, other = FACTORIES[name](), FACTORIES[name]()
    inputs = _draw(module)
    other.load_state_dict(module.state_dict())
    file = io.BytesIO()
    pickle.dump(module, file)
    file.seek(0)
    for twin in (other, copy.deepcopy(module), pickle.load(file)):
        assert torch.equal(twin(**inputs), module(**inputs))
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half(inputs["query"].bfloat16(), inputs["key"].bfloat16()).dtype == torch.bfloat16
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert module(**inputs).dtype == torch.bfloat16
    assert type(module).__name__ in repr(module)


def test_parameters() -> None:
    state = AdditiveAttention(6, 4, 7, coverage=True).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes == {
        "weight": (7,), "coverage_weight": (7,), "query_projection.weight": (7, 6), "key_projection.weight": (7, 4),
        "key_projection.bias": (7,),
    }  # fmt: skip
    assert {name: tuple(x.shape) for name, x in LuongAttention(6, 4, "general").state_dict().items()} == {
        "projection.weight": (4, 6)
    }
    assert not LuongAttention(6, 6).state_dict()
    torch.manual_seed(0)
    module = AdditiveAttention(6, 4, 7)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    module.reset_parameters()
    assert all(not torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: AdditiveAttention(0, 4, 7), ValueError, "query_dim: got 0, expected at least 1"),
    (lambda: AdditiveAttention(6, 4.0, 7), TypeError, "key_dim: got float, expected an integer"),
    (lambda: AdditiveAttention(6, 4, True), TypeError, "hidden_dim: got bool, expected an integer"),
    (lambda: LuongAttention(6, 4), ValueError, "key_dim: got 4, expected query_dim = 6 for score='dot'"),
    (lambda: LuongAttention(6, 6, "cosine"), ValueError, "score: got 'cosine', allowed are 'dot', 'general', 'concat'"),
    (lambda: LuongAttention(6, 6, "general", coverage=True), ValueError, "coverage: got True with score='general'"),
]
BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": None}, TypeError, "query: got NoneType, expected a torch.Tensor"),
    ({"key": [1]}, TypeError, "key: got list, expected a torch.Tensor or what project_keys returns"),
    ({"value": 1.0}, TypeError, "value: got float, expected a torch.Tensor"),
    ({"query": torch.randn(BATCH, ROWS, 5)}, ValueError, "query: got 5 features, expected"),
    ({"query": torch.randn(4)}, ValueError, r"query: got shape \(4,\), expected 2 or 3 dimensions"),
    ({"key": torch.randn(COLUMNS, KEY)}, ValueError, r"key: got shape \(5, 4\), expected 3 dimensions"),
    ({"key": torch.randn(BATCH, COLUMNS, 9)}, ValueError, f"key: got 9 features, expected {KEY}"),
    ({"value": torch.randn(BATCH, 6, 3)}, ValueError, "value: got length 6, expected key's 5"),
    ({"key_padding_mask": torch.ones(BATCH, 3).bool()}, ValueError, r"key_padding_mask: got shape \(2, 3\)"),
    ({"coverage": torch.rand(BATCH, COLUMNS)}, ValueError, "coverage: got a tensor, expected None"),
]


@pytest.mark.parametrize("row", BAD, ids=lambda row: row[2][:40])
def test_bad_construction(row: tuple[Any, type[Exception], str]) -> None:
    with pytest.raises(row[1], match=row[2]):
        row[0]()


@pytest.mark.parametrize("name", ["additive", "dot", "general", "concat"])
@pytest.mark.parametrize("row", BAD_CALLS, ids=lambda row: row[2][:40])
def test_bad_calls(row: tuple[dict[str, Any], type[Exception], str], name: str) -> None:
    module = FACTORIES[name]()
    changed = {label: x.to(DEVICE) if isinstance(x, Tensor) else x for label, x in row[0].items()}
    with pytest.raises(row[1], match=row[2]):
        module(**_draw(module) | changed)
    with pytest.raises((TypeError, ValueError), match=r"^key: got"):
        module.project_keys(torch.randn(BATCH, KEY, device=DEVICE))


def test_a_wrong_coverage_is_named() -> None:
    module = FACTORIES["additive with coverage"]()
    with pytest.raises(ValueError, match=r"coverage: got shape \(2, 3\), expected \(B, Tk\) = \(2, 5\)"):
        module(**_draw(module), coverage=torch.rand(BATCH, 3, device=DEVICE))


def test_names_are_exported() -> None:
    assert {"AdditiveAttention", "LuongAttention", "additive_attention"} <= set(fastattn.__all__)
    assert len(set(fastattn.__all__)) == len(fastattn.__all__)
    assert all(hasattr(fastattn, name) for name in fastattn.__all__)
