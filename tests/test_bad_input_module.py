"""Bad and borderline calls of MultiheadAttention, patch, unpatch and backend: see test_bad_input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from bad_input import (
    AE,
    BACKENDS,
    DEVICE,
    EMBED,
    F16,
    F64,
    I64,
    RE,
    RIGHT,
    TE,
    VE,
    assert_close,
    assert_right,
    bools,
    dims,
    sized,
    t,
)
from torch import Tensor, nn

import fastattn
from fastattn.dispatch import forced_backend
from fastattn.kernels.attention import config
from fastattn.modules.maps import attention_maps


@pytest.fixture(autouse=True)
def small_tiles() -> Any:
    with config.override(config.Tile(16, 16)):
        yield


def model(**options: Any) -> nn.Module:
    return fastattn.MultiheadAttention(**{"embed_dim": EMBED, "num_heads": 2, "batch_first": True} | options).to(DEVICE)


def apart(rows: int = 3, columns: int = 5, features: int = EMBED) -> dict[str, Tensor]:
    return {"query": t(2, rows, EMBED), "key": t(2, columns, features), "value": t(2, columns, features)}


# Each row: name, the constructor's options, arguments of forward that differ from apart(), then as above. torch's own
# exception types, which a drop-in keeps.
MODULE: list[tuple[Any, ...]] = [
    ("query None", {}, lambda: {"query": None}, AttributeError, "query: got NoneType, expected a torch.Tensor"),
    ("value str", {}, lambda: {"value": "v"}, AttributeError, "value: got str, expected a torch.Tensor"),
    ("query 1-D", {}, lambda: {"query": t(8)}, AE, "query: got 1 dimensions, expected 3, or 2 without a batch"),
    ("query 4-D", {}, lambda: {"query": t(1, 2, 3, 8)}, AE, "query: got 4 dimensions, expected 3, or 2"),
    ("key 2-D", {}, lambda: {"key": t(5, 8)}, AE, "key: got 2 dimensions, expected query's 3"),
    ("query's features", {}, lambda: {"query": t(2, 3, 7)}, AE, "query: got 7 features, expected embed_dim = 8"),
    ("key's features", {}, lambda: apart(features=7), RE, "key: got 7 features, expected kdim = 8"),
    ("kdim", {"kdim": 6}, lambda: {"key": t(2, 5, 7)}, AE, "key: got 7 features, expected kdim = 6"),
    ("vdim", {"vdim": 6}, lambda: {"value": t(2, 5, 7)}, AE, "value: got 7 features, expected vdim = 6"),
    ("key's batch", {}, lambda: {k: t(3, 5, 8) for k in ("key", "value")}, RE, "key: got batch size 3.*query's 2"),
    ("value's length", {}, lambda: {"value": t(2, 4, 8)}, AE, r"value: got shape \(2, 4, 8\), expected key's"),
    ("query float64", {}, lambda: {"query": t(2, 3, 8, dtype=F64)}, RE, "query: got dtype torch.float64, expected"),
    ("query int", {}, lambda: {"query": t(2, 3, 8, dtype=I64)}, RE, "query: got dtype torch.int64, expected"),
    ("key meta", {}, lambda: {"key": t(2, 5, 8, device="meta")}, RE, "key: got device meta, expected the param"),
    ("padding list", {}, lambda: {"key_padding_mask": [5, 3]}, TE, "key_padding_mask: got list, expected a torch"),
    ("padding int", {}, lambda: {"key_padding_mask": t(2, 5, dtype=I64)}, AE, "key_padding_mask: got dtype torch.int"),
    ("padding 1-D", {}, lambda: {"key_padding_mask": bools(5)}, AE, "key_padding_mask: got 1 dimensions, exp"),
    ("padding shape", {}, lambda: {"key_padding_mask": bools(2, 3)}, AE, r"key_padding_mask: got .*\(2, 3\), exp"),
    ("padding transposed", {}, lambda: {"key_padding_mask": bools(5, 2)}, AE, r"key_padding_mask: got shape \(5, 2\)"),
    ("mask str", {}, lambda: {"attn_mask": "causal"}, TE, "attn_mask: got str, expected a torch.Tensor or None"),
    ("mask int", {}, lambda: {"attn_mask": t(3, 5, dtype=I64)}, AE, "attn_mask: got dtype torch.int64, allowed"),
    ("mask 1-D", {}, lambda: {"attn_mask": t(5)}, AE, "attn_mask: got 1 dimensions, expected 2 or 3"),
    ("mask 4-D", {}, lambda: {"attn_mask": t(2, 2, 3, 5)}, AE, "attn_mask: got 4 dimensions, expected 2 or 3"),
    ("mask shape", {}, lambda: {"attn_mask": t(5, 3)}, RE, r"attn_mask: got shape \(5, 3\), expected .* = \(3, 5\)"),
    ("mask heads", {}, lambda: {"attn_mask": t(2, 3, 5)}, RE, r"attn_mask: got shape \(2, 3, 5\).*\(4, 3, 5\)"),
    ("mask meta", {}, lambda: {"attn_mask": t(3, 5, device="meta")}, RE, "attn_mask: got device meta, expected"),
    ("dropout 1.5", {"dropout": 1.5}, dict, VE, r"dropout_p: got 1.5, allowed is \[0, 1\]"),
    ("dropout str", {"dropout": "0.1"}, dict, TE, "dropout_p: got str, expected a float"),
    ("is_causal mask", {}, lambda: {"is_causal": bools(3, 5)}, TE, "is_causal: got Tensor, expected True or False"),
    ("need_weights str", {}, lambda: {"need_weights": "no"}, TE, "need_weights: got str, expected True or False"),
    ("not divisible", {"num_heads": 3}, dict, AE, "embed_dim must be divisible by num_heads"),
    ("embed_dim 0", {"embed_dim": 0}, dict, VE, "embed_dim .*must be greater than 0, got embed_dim=0"),
    ("num_heads -2", {"num_heads": -2}, dict, VE, "num_heads must be greater than 0, got .*num_heads=-2"),
    ("unknown option", {"heads": 2}, dict, TE, "unexpected keyword argument 'heads'"),
    ("int dtype", {"dtype": I64}, dict, RE, "[Oo]nly Tensors of floating point"),
    ("no query", {}, lambda: apart(rows=0), RIGHT),
    ("no key", {"add_zero_attn": True}, lambda: apart(columns=0), RIGHT),
    ("no batch", {}, lambda: {name: t(0, 5, 8) for name in apart()}, RIGHT),
    ("unbatched", {}, lambda: {"query": t(3, 8), "key": t(5, 8), "value": t(5, 8)}, RIGHT),
    ("expanded", {}, lambda: {"key": t(1, 1, 8).expand(2, 5, 8)}, RIGHT),
    ("not contiguous", {"batch_first": False}, lambda: {name: t(8, 2, 3).permute(2, 1, 0) for name in apart()}, RIGHT),
    ("kdim and vdim", {"kdim": 6, "vdim": 7}, lambda: {"key": t(2, 5, 6), "value": t(2, 5, 7)}, RIGHT),
    ("one feature a head", {"num_heads": 8}, dict, RIGHT),
    ("mask with a gradient", {}, lambda: {"attn_mask": t(4, 3, 5).requires_grad_()}, RIGHT),
    ("need_weights None", {}, lambda: {"need_weights": None}, RIGHT),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", MODULE, ids=[row[0] for row in MODULE])
def test_module(row: tuple[Any, ...], backend: str) -> None:
    _, options, changes, error, *match = row
    arguments = apart() | changes()
    if error is not RIGHT:
        for name in ("forward", "explain"):
            with fastattn.backend(backend), pytest.raises(error, match=match[0]):
                getattr(model(**options), name)(**arguments)
        return
    ours = model(**options)
    theirs = nn.MultiheadAttention(ours.embed_dim, ours.num_heads, **options_of_torch(options), dtype=F64).to(DEVICE)
    theirs.load_state_dict(ours.state_dict())
    leaves = [arguments[name].requires_grad_() for name in apart()]
    leaves += [arguments["attn_mask"]] if "attn_mask" in arguments else []
    with fastattn.backend(backend):
        out, weights = ours(**arguments)
    wide = {name: item.detach().double() if isinstance(item, Tensor) else item for name, item in arguments.items()}
    wanted, wanted_weights = theirs(**wide)
    assert (weights is None) == (wanted_weights is None)
    if weights is not None:
        assert_close(weights, wanted_weights)
    assert_right(out, wanted, [*leaves, *ours.parameters()])


def options_of_torch(options: dict[str, Any]) -> dict[str, Any]:
    return {"batch_first": True} | {name: item for name, item in options.items() if name != "num_heads"}


def forced(name: Any, **changes: Any) -> Callable[[], Any]:
    """A call with a backend forced."""

    def call() -> Any:
        with fastattn.backend(name):
            return fastattn.scaled_dot_product_attention(**(sized() | changes))

    return call


OTHERS: list[tuple[Any, ...]] = [
    ("backend typo", forced("cudnn"), VE, "backend: got 'cudnn', allowed are 'auto', 'triton', 'cpu', 'sdpa'"),
    ("backend None", forced(None), VE, "backend: got None, allowed are 'auto'"),
    ("backend list", forced(["cpu"]), VE, r"backend: got \['cpu'\], allowed are 'auto'"),
    ("cpu, 257", lambda: forced("cpu", **dims(257))(), RE, r'backend\("cpu"\) cannot .*: head dimension 257 > 256'),
    ("triton, 257", lambda: forced("triton", **dims(257))(), RE, r'\("triton"\) cannot .*: head dimension 257 > 256'),
    ("cpu, value", lambda: forced("cpu", **dims(8, 5))(), RE, r"value's head dimension 5 differs from query's 8"),
    ("triton, value", lambda: forced("triton", **dims(8, 5))(), RE, r"value's head dimension 5 differs from query's 8"),
    ("cpu, float64", lambda: forced("cpu", **dims(8, dtype=F64))(), RE, "cannot serve this call: dtype torch.float64"),
    ("triton, meta", lambda: forced("triton", **meta())(), RE, "cannot serve this call: device meta"),
    ("cpu, meta", lambda: forced("cpu", **meta())(), RE, "cannot serve this call: device meta; .* run on the CPU"),
    ("sdpa, weights", forced("sdpa", need_weights=True), RE, r'\("sdpa"\) cannot .*: .*do not return the weights'),
    ("sdpa, lse", forced("sdpa", return_lse=True), RE, "cannot serve this call: .*does not return the logsumexp"),
    ("sdpa, mask", lambda: forced("sdpa", attn_mask=t(3, 5, dtype=F16))(), RE, "would round a torch.float16 mask"),
    ("patch None", lambda: fastattn.patch(None), TE, "model: got NoneType, expected a torch.nn.Module"),
    ("patch str", lambda: fastattn.patch("model"), TE, "model: got str, expected a torch.nn.Module"),
    ("patch class", lambda: fastattn.patch(nn.MultiheadAttention), TE, "model: got type, expected a torch.nn.Mod"),
    ("patch list", lambda: fastattn.patch([nn.Identity()]), TE, "model: got list, expected a torch.nn.Module"),
    ("patch weights", lambda: fastattn.patch(nn.Identity(), need_weights=1), TE, "need_weights: got int, expected"),
    ("unpatch None", lambda: fastattn.unpatch(None), TE, "model: got NoneType, expected a torch.nn.Module"),
    ("unpatch state", lambda: fastattn.unpatch(model().state_dict()), TE, "model: got OrderedDict, expected a"),
    ("from_torch None", lambda: fastattn.MultiheadAttention.from_torch(None), TE, "module: got NoneType, expected"),
    ("from_torch other", lambda: fastattn.MultiheadAttention.from_torch(nn.Linear(2, 2)), TE, "module: got Linear"),
    ("maps of nothing", lambda: attention_maps(nn.Linear(2, 2)).__enter__(), VE, "model: got a Linear without a"),
]  # fmt: skip


def meta() -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in sized().items()}


@pytest.mark.parametrize(("call", "error", "match"), [row[1:] for row in OTHERS], ids=[row[0] for row in OTHERS])
def test_other(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
    assert forced_backend() is None, "the error left a backend forced"


def test_nothing_to_patch() -> None:
    assert fastattn.patch(nn.Linear(2, 2)) == fastattn.PatchReport()
    assert fastattn.unpatch(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("changes", [{}, {"need_weights": True, "return_lse": True}, {"dropout_p": 0.5}], ids=str)
def test_meta_gives_shapes(changes: dict[str, Any]) -> None:
    arguments = meta() | changes
    assert fastattn.explain(**arguments).backend in ("sdpa", "reference")
    found = fastattn.scaled_dot_product_attention(**arguments)
    found = found if isinstance(found, tuple) else (found,)
    assert all(tensor.device.type == "meta" for tensor in found)
    assert [tensor.shape for tensor in found] == [(2, 4, 3, 8), (2, 3, 5), (2, 4, 3)][: len(found)]
