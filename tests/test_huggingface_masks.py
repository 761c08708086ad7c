"""The masks between transformers and the kernels: structure means what transformers' dense mask means, in every use."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_models import (
    BATCH,
    FORWARD,
    GRADIENT,
    LENGTH,
    NEW,
    WINDOW,
    build,
    error,
    feed,
    generated,
    patched,
    spying,
)
from torch import Tensor

from fastattn.integrations import huggingface
from fastattn.integrations.huggingface import StructuredMask

transformers = pytest.importorskip("transformers")
masking_utils = transformers.masking_utils

CONFIG = SimpleNamespace(model_type="llama")
CAUSAL, BOTH_WAYS = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
PATTERNS = {
    "causal": CAUSAL,
    "bidirectional": BOTH_WAYS,
    "window": masking_utils.sliding_window_causal_mask_function(WINDOW),
    "window both ways": masking_utils.sliding_window_bidirectional_mask_function(WINDOW),
    "wide window": masking_utils.sliding_window_causal_mask_function(50),
    "chunks": masking_utils.chunked_causal_mask_function(3, torch.zeros(BATCH, dtype=torch.long)),
}
# L, S, position of the first query, position of the first key.
PLACES = {
    "a sequence": (9, 9, 0, 0),
    "one sequence to another": (5, 9, 0, 0),
    "decoding": (1, 9, 8, 0),
    "continuing": (4, 9, 5, 0),
    "decoding from a sliding cache": (1, 4, 8, 5),
    "continuing a sliding cache": (3, 6, 8, 5),
    "filling a static cache": (5, 9, torch.tensor(0), 0),
    "continuing a static cache": (3, 9, torch.tensor(4), 0),
    "decoding from a static cache": (1, 9, torch.tensor(4), 0),
}


def arguments(pattern: str, place: str, padded: bool) -> dict[str, Any]:
    queries, keys, q_offset, kv_offset = PLACES[place]
    attention_mask = None
    if padded:
        attention_mask = torch.ones(BATCH, kv_offset + keys, dtype=torch.bool)
        attention_mask[0, : kv_offset + 2] = False
        attention_mask[1, -1] = False
    return {
        "batch_size": BATCH, "q_length": queries, "kv_length": keys, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": PATTERNS[pattern], "attention_mask": attention_mask, "device": torch.device("cpu"),
    }  # fmt: skip


def by_layer(pattern: str, queries: int, keys: int) -> Tensor:
    """What a layer takes no mask for: all keys, or its causality and window with the newest query at the newest key."""
    mask = torch.ones(queries, keys, dtype=torch.bool)
    if "both" in pattern or pattern == "bidirectional":
        return mask
    mask = mask.tril(keys - queries)
    return mask.triu(keys - queries - WINDOW + 1) if pattern == "window" else mask


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_structure_is_the_dense_mask_of_transformers(pattern: str, place: str, padded: bool) -> None:
    given = arguments(pattern, place, padded)
    wanted = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    got = huggingface.mask(**given, config=CONFIG, allow_is_causal_skip=True, allow_is_bidirectional_skip=True)
    if got is None:
        got = by_layer(pattern, given["q_length"], given["kv_length"]).expand(wanted.shape)
    assert got.shape == wanted.shape
    assert got.dtype == torch.bool
    assert torch.equal(got | torch.zeros_like(wanted), wanted)
    static = isinstance(given["q_offset"], Tensor)
    placed = "both" not in pattern or place not in ("filling a static cache", "continuing a static cache")
    if pattern != "chunks" and placed and not (static and given["q_length"] == 1):
        plain = huggingface.mask(**given, config=CONFIG, allow_is_causal_skip=True, allow_is_bidirectional_skip=True)
        assert plain is None or type(plain) is StructuredMask


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_caller_who_goes_on_to_combine_gets_a_plain_tensor(pattern: str) -> None:
    given = arguments(pattern, "a sequence", padded=True)
    got = huggingface.mask(**given, config=CONFIG, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    assert type(got) is Tensor
    assert got.shape == (BATCH, 1, 9, 9)


def structured() -> StructuredMask:
    mask = huggingface.mask(**arguments("window", "continuing", padded=True), config=CONFIG)
    assert isinstance(mask, StructuredMask)
    return mask


def test_every_operation_on_a_structured_mask_sees_the_dense_one() -> None:
    mask = structured()
    dense = mask.dense()
    assert type(dense) is Tensor
    assert (mask.dim(), mask.shape, mask.dtype, mask.device) == (4, dense.shape, dense.dtype, dense.device)
    assert torch.equal(mask[:, :, :, :3], dense[:, :, :, :3])
    assert torch.equal(mask.to(torch.float32), dense.to(torch.float32))
    assert torch.equal(~mask, ~dense)
    assert torch.equal(torch.where(mask, 1.0, 2.0), torch.where(dense, 1.0, 2.0))
    assert torch.equal(torch.cat([mask, mask]), torch.cat([dense, dense]))
    assert torch.equal(mask.detach(), dense)


def test_a_structured_mask_is_made_and_read_in_inference_mode() -> None:
    with torch.inference_mode():
        mask = structured()
        assert torch.equal(mask[..., :2], mask.dense()[..., :2])
    assert torch.equal(mask.dense(), structured().dense())


def test_a_structured_mask_is_copied_and_pickled_as_structure() -> None:
    mask = structured()
    for other in (copy.deepcopy(mask), copy.copy(mask), pickle.loads(pickle.dumps(mask))):
        assert type(other) is StructuredMask
        assert torch.equal(other.dense(), mask.dense())
    assert repr(mask) == f"StructuredMask(shape=({BATCH}, 1, 4, 9), padded, left={WINDOW - 1}, right=0, shift=5)"


def test_a_structured_mask_of_another_size_is_refused() -> None:
    layer = build("llama").model.layers[0].self_attn
    heads = torch.randn(BATCH, 4, 4, 8)
    with pytest.raises(ValueError, match=r"attention_mask: made for \(4, 9\) queries and keys, got \(4, 4\)"):
        huggingface.attention(layer, heads, heads, heads, structured())


# Models in the uses that need more than padding and a triangle -------------------------------------------------


def assert_same(name: str, *, dense: bool = False, rows: Tensor | slice = slice(None), **inputs: Any) -> None:
    """The logits of a patched model are those of eager; whether a dense mask was needed."""
    eager = build(name)
    ours = patched(eager)
    wanted = eager(**inputs).logits
    with spying() as seen:
        got = ours(**inputs).logits
    assert error(got[rows], wanted[rows]) <= FORWARD
    assert bool(seen.dense) is dense


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_documents_packed_into_one_row_do_not_see_each_other(name: str) -> None:
    inputs = {"input_ids": feed(name, "none")["input_ids"], "use_cache": False}
    positions = torch.cat([torch.arange(4), torch.arange(LENGTH - 4)]).expand(BATCH, -1)
    assert_same(name, dense=True, position_ids=positions, **inputs)


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_causal_model_turned_into_an_encoder(name: str, side: str) -> None:
    inputs = feed(name, side)
    assert_same(name, rows=inputs["attention_mask"].bool(), is_causal=False, **inputs)


@pytest.mark.parametrize("kind", ["float", "bool"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_a_mask_of_the_callers_own_is_all_there_is(name: str, kind: str) -> None:
    """No triangle and no window come on top of it."""
    eager = build(name)
    ours = patched(eager)
    tokens = feed(name, "none")["input_ids"]
    allowed = (torch.rand(BATCH, 1, LENGTH, LENGTH) < 0.6) | torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    wanted = eager(input_ids=tokens, attention_mask=additive).logits
    got = ours(input_ids=tokens, attention_mask=additive if kind == "float" else allowed).logits
    assert error(got, wanted) <= FORWARD


def test_masks_of_the_callers_own_for_each_kind_of_layer() -> None:
    eager = build("modernbert")
    ours = patched(eager)
    tokens = feed("modernbert", "none")["input_ids"]
    allowed = (torch.rand(2, BATCH, 1, LENGTH, LENGTH) < 0.6) | torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    wanted, got = (
        model(input_ids=tokens, attention_mask=dict(zip(("full_attention", "sliding_attention"), masks, strict=True)))
        for model, masks in ((eager, additive), (ours, allowed))
    )
    assert error(got.logits, wanted.logits) <= FORWARD


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2"])
def test_a_prompt_in_pieces_continues_its_cache(name: str, cache: str, side: str) -> None:
    eager = build(name)
    ours = patched(eager)
    inputs = feed(name, side)
    results = []
    for model in (eager, ours):
        if cache == "static":
            states = transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 5)
        else:
            states = transformers.DynamicCache(config=model.config)
        pieces, start = [], 0
        for stop in (5, 9, LENGTH):
            tokens, mask = inputs["input_ids"][:, start:stop], inputs["attention_mask"][:, :stop]
            with torch.no_grad():
                pieces.append(model(input_ids=tokens, attention_mask=mask, cache=states).logits)
            start = stop
        results.append(torch.cat(pieces, 1)[inputs["attention_mask"].bool()])
    assert error(results[1], results[0]) <= FORWARD


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "t5", "bart"])
def test_generation_from_a_static_cache(name: str, side: str) -> None:
    wanted, got, seen = generated(name, side, cache_implementation="static")
    assert seen.calls >= NEW
    assert not seen.dense
    assert torch.equal(got, wanted)


def test_the_weights_of_a_static_cache_have_its_length() -> None:
    eager = build("llama")
    ours = patched(eager)
    inputs = feed("llama", "none")
    wanted, got = (
        model(**inputs, cache=transformers.StaticCache(config=model.config, max_cache_len=20), output_attentions=True)
        for model in (eager, ours)
    )
    for mine, theirs in zip(got.attentions, wanted.attentions, strict=True):
        assert error(mine, theirs) <= FORWARD


@pytest.mark.parametrize("name", ["llama", "mistral", "modernbert"])
def test_gradient_checkpointing(name: str) -> None:
    eager = build(name)
    ours = patched(eager)
    inputs = feed(name, "right")
    rows = inputs["attention_mask"].bool()
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (eager, ours):
        model.train()(**inputs, use_cache=False).logits[rows].square().sum().backward()
    for (where, mine), theirs in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert error(mine.grad, theirs.grad) <= GRADIENT, where


# Compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_compiled_decoder_is_one_graph(name: str, side: str) -> None:
    eager = build(name)
    ours = patched(eager)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    inputs = feed(name, side) | {"use_cache": False}
    rows = inputs["attention_mask"].bool()
    if side == "none":
        del inputs["attention_mask"]
    with torch.no_grad():
        wanted, got = eager(**inputs).logits, compiled(**inputs).logits
    assert error(got[rows], wanted[rows]) <= FORWARD
    torch._dynamo.reset()


def test_layers_compiled_alone_take_the_structure() -> None:
    eager = build("mistral")
    ours = patched(eager)
    for layer in ours.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    inputs = feed("mistral", "right") | {"use_cache": False}
    rows = inputs["attention_mask"].bool()
    with torch.no_grad():
        wanted, got = eager(**inputs).logits, ours(**inputs).logits
    assert error(got[rows], wanted[rows]) <= FORWARD
    torch._dynamo.reset()
