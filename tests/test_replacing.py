"""replace_sdpa: the function of torch.nn.functional is ours inside the block, torch's own outside, whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

import fastattn
from fastattn import replacing

TORCH = F.scaled_dot_product_attention
BATCH, HEADS, LENGTH, DIM = 2, 4, 7, 8


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    assert F.scaled_dot_product_attention is TORCH


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every call that fastattn was asked to serve."""
    calls: list[dict[str, Any]] = []
    original = replacing.scaled_dot_product_attention

    def spy(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return original(*arguments, **options)

    monkeypatch.setattr(replacing, "scaled_dot_product_attention", spy)
    return calls


def heads(count: int = HEADS, length: int = LENGTH, **options: Any) -> Tensor:
    return torch.randn(BATCH, count, length, DIM, **options)


class Model(nn.Module):
    """Calls torch's function as models do: by its full name, at every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.projection(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).unbind(0)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


# The numbers ----------------------------------------------------------------------------------------------------


def test_a_model_computes_on_fastattn_inside_and_on_torch_outside(ours: list[dict[str, Any]]) -> None:
    model, x = Model(), torch.randn(BATCH, LENGTH, HEADS * DIM)
    wanted = model(x)
    wanted.square().sum().backward()
    reference = model.projection.weight.grad
    model.projection.weight.grad = None
    with fastattn.replace_sdpa():
        got = model(x)
    assert len(ours) == 1
    got.square().sum().backward()
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(model.projection.weight.grad, reference)
    model(x)
    assert len(ours) == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.rand(BATCH, 1, LENGTH, LENGTH).argsort(-1) < 4},
        {"attn_mask": torch.randn(HEADS, LENGTH, LENGTH)},
    ],
)
def test_every_argument_means_what_it_means_to_torch(options: dict[str, Any], ours: list[dict[str, Any]]) -> None:
    query, key, value = heads(), heads(), heads()
    wanted = TORCH(query, key, value, **options)
    with fastattn.replace_sdpa():
        got = F.scaled_dot_product_attention(query, key, value, **options)
    assert len(ours) == 1
    torch.testing.assert_close(got, wanted)


def test_arguments_by_position_and_fewer_key_heads(ours: list[dict[str, Any]]) -> None:
    query, key, value = heads(), heads(2), heads(2)
    wanted = TORCH(query, key, value, None, 0.0, True, scale=0.2, enable_gqa=True)
    with fastattn.replace_sdpa():
        got = F.scaled_dot_product_attention(query, key, value, None, 0.0, True, scale=0.2, enable_gqa=True)
    assert len(ours) == 1
    torch.testing.assert_close(got, wanted)


def test_three_dimensions_as_torch(ours: list[dict[str, Any]]) -> None:
    query, key, value = (torch.randn(3, LENGTH, DIM) for _ in range(3))
    with fastattn.replace_sdpa():
        got = F.scaled_dot_product_attention(query, key, value)
    assert len(ours) == 1
    torch.testing.assert_close(got, TORCH(query, key, value))


def test_dropout_is_applied_and_reproducible() -> None:
    query, key, value = heads(), heads(), heads()
    draws = []
    with fastattn.replace_sdpa():
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append(F.scaled_dot_product_attention(query, key, value, dropout_p=0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# What goes to torch ---------------------------------------------------------------------------------------------


def test_a_mask_beside_is_causal_is_torchs_affair(ours: list[dict[str, Any]]) -> None:
    query, key, value = heads(), heads(), heads()
    options = {"attn_mask": torch.rand(LENGTH, LENGTH) < 0.8, "is_causal": True}
    try:
        wanted = TORCH(query, key, value, **options)
    except RuntimeError:  # some versions refuse it
        wanted = None
    with fastattn.replace_sdpa():
        if wanted is None:
            with pytest.raises(RuntimeError):
                F.scaled_dot_product_attention(query, key, value, **options)
        else:
            got = F.scaled_dot_product_attention(query, key, value, **options)
            torch.testing.assert_close(got, wanted, equal_nan=True)
    assert ours == []


def test_bad_shapes_raise_torchs_own_error() -> None:
    query, key = heads(), torch.randn(BATCH, HEADS, LENGTH, DIM + 1)
    with pytest.raises(RuntimeError) as wanted:
        F.scaled_dot_product_attention(query, key, key)
    with fastattn.replace_sdpa(), pytest.raises(RuntimeError) as got:
        F.scaled_dot_product_attention(query, key, key)
    assert str(got.value) == str(wanted.value)


def test_batches_that_only_torch_broadcasts(ours: list[dict[str, Any]]) -> None:
    query, key, value = heads()[:1], heads(), heads()
    with fastattn.replace_sdpa():
        got = F.scaled_dot_product_attention(query, key, value)
    assert len(ours) == 1  # asked, and refused
    torch.testing.assert_close(got, TORCH(query, key, value))


def test_tensor_subclasses_go_to_torch(ours: list[dict[str, Any]]) -> None:
    nested = [torch.nested.nested_tensor([torch.randn(n, HEADS, DIM) for n in (3, 5)], layout=torch.jagged)
              .transpose(1, 2) for _ in range(3)]  # fmt: skip
    with fastattn.replace_sdpa():
        assert F.scaled_dot_product_attention(*nested).is_nested
    assert ours == []


@pytest.mark.parametrize("length", [3, LENGTH])
def test_a_causal_bias_of_torch_is_taken_apart_by_torch(length: int, ours: list[dict[str, Any]]) -> None:
    query, key, value, bias = heads(length=length), heads(), heads(), causal_lower_right(length, LENGTH)
    with fastattn.replace_sdpa():
        got = F.scaled_dot_product_attention(query, key, value, bias)
    assert len(ours) == 1
    torch.testing.assert_close(got, TORCH(query, key, value, bias))


def test_transforms_of_torch_func_go_to_torch(ours: list[dict[str, Any]]) -> None:
    query, key, value = heads(), heads(), heads()

    def attend(query: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    queries = torch.stack([query, 2 * query])
    with fastattn.replace_sdpa():
        gradient = torch.func.grad(lambda query: attend(query).sum())(query)
        batched = torch.func.vmap(attend)(queries)
    assert ours == []
    assert gradient.shape == query.shape
    torch.testing.assert_close(batched, torch.stack([attend(query) for query in queries]))


def test_a_forced_backend_that_cannot_serve_the_call_still_raises() -> None:
    with fastattn.replace_sdpa(), fastattn.backend("triton"), pytest.raises(RuntimeError, match="triton"):
        F.scaled_dot_product_attention(*(heads(dtype=torch.float64) for _ in range(3)))


# The block ------------------------------------------------------------------------------------------------------


def test_blocks_nest() -> None:
    with fastattn.replace_sdpa():
        first = F.scaled_dot_product_attention
        with fastattn.replace_sdpa():
            assert F.scaled_dot_product_attention is first
        assert F.scaled_dot_product_attention is first
        assert first is not TORCH


def test_an_exception_ends_the_block() -> None:
    with pytest.raises(ZeroDivisionError), fastattn.replace_sdpa():
        raise ZeroDivisionError


def test_it_serves_as_a_decorator(ours: list[dict[str, Any]]) -> None:
    @fastattn.replace_sdpa()
    def run() -> Tensor:
        return F.scaled_dot_product_attention(heads(), heads(), heads())

    run()
    run()
    assert len(ours) == 2


def test_blocks_of_two_threads_overlap_in_any_order(ours: list[dict[str, Any]]) -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with fastattn.replace_sdpa():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with fastattn.replace_sdpa():
        thread.start()
        assert inside.wait(10)
    F.scaled_dot_product_attention(heads(), heads(), heads())
    assert len(ours) == 1  # the other thread's block is still open
    leave.set()
    thread.join()
    assert F.scaled_dot_product_attention is TORCH


def test_a_name_taken_inside_the_block_calls_torch_afterwards(ours: list[dict[str, Any]]) -> None:
    with fastattn.replace_sdpa():
        taken = F.scaled_dot_product_attention
    query, key, value = heads(), heads(), heads()
    torch.testing.assert_close(taken(query, key, value), TORCH(query, key, value))
    assert ours == []


def test_a_name_rebound_by_someone_else_inside_stays_theirs(ours: list[dict[str, Any]]) -> None:
    try:
        with fastattn.replace_sdpa():
            inner = F.scaled_dot_product_attention

            def theirs(*arguments: Any, **options: Any) -> Any:
                return inner(*arguments, **options)

            F.scaled_dot_product_attention = theirs
        assert F.scaled_dot_product_attention is theirs
        F.scaled_dot_product_attention(heads(), heads(), heads())
        assert ours == []
    finally:
        F.scaled_dot_product_attention = TORCH


def test_multihead_attention_of_torch_is_reached_through_python(ours: list[dict[str, Any]]) -> None:
    module, x = nn.MultiheadAttention(HEADS * DIM, HEADS, batch_first=True), torch.randn(BATCH, LENGTH, HEADS * DIM)
    wanted = module(x, x, x, need_weights=False)[0]
    with fastattn.replace_sdpa():
        got = module(x, x, x, need_weights=False)[0]
    assert len(ours) == 1
    torch.testing.assert_close(got, wanted)


def test_a_model_compiled_inside_the_block_is_one_graph() -> None:
    model, x = Model(), torch.randn(BATCH, LENGTH, HEADS * DIM)
    wanted = model(x)
    with fastattn.replace_sdpa():
        got = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, wanted)
    torch._dynamo.reset()


def test_a_model_of_transformers_on_its_sdpa_implementation(ours: list[dict[str, Any]]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, attn_implementation="sdpa"
    )
    model = transformers.FalconModel(config).eval()
    tokens = torch.randint(0, 50, (2, 7))
    wanted = model(input_ids=tokens).last_hidden_state
    with fastattn.replace_sdpa():
        got = model(input_ids=tokens).last_hidden_state
    assert len(ours) == 2
    torch.testing.assert_close(got, wanted)
