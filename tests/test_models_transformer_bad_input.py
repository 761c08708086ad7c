"""Bad calls of Transformer, and checkpoints that are damaged, foreign or hostile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformer_cases import SMALL, small, tiny_gpt2, tokens

from fastattn.models import Transformer, TransformerConfig

# Checkpoints --------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    model, source = small("both", source_vocab_size=20), tokens(2, 4)
    model.save(tmp_path / "model.pt")
    loaded = Transformer.load(tmp_path / "model.pt")
    assert loaded.config == model.config
    assert torch.equal(loaded(source, source), model(source, source))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    Transformer.load(tmp_path / "model.pt", config=model.config)
    with pytest.raises(ValueError, match=r"whose model has source_vocab_size=20, expected 30"):
        Transformer.load(tmp_path / "model.pt", config=dataclasses.replace(model.config, source_vocab_size=30))


def test_an_interrupted_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = small(), tmp_path / "model.pt"
    model.save(path)
    before = path.read_bytes()

    def interrupt(content: Any, target: Path) -> None:
        target.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small().save(path)
    assert path.read_bytes() == before


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Evil(), "damaged or holds more than tensors"),
        (nn.Linear(2, 2), "damaged or holds more than tensors"),
        ({"weight": torch.ones(2)}, "expected a checkpoint of fastattn"),
        ({"format": "fastattn", "kind": "Other"}, "a checkpoint of kind 'Other', expected 'Transformer'"),
        ({"format": "fastattn", "kind": "Transformer", "config": {}}, "without weights"),
        ({"format": "fastattn", "kind": "Transformer", "config": [1], "weights": {}}, "config is refused"),
        ({"format": "fastattn", "kind": "Transformer", "config": {"odd": 1}, "weights": {}}, "refused: .*odd"),
        (
            {
                "format": "fastattn", "kind": "Transformer", "weights": {},
                "config": dataclasses.asdict(TransformerConfig(**SMALL)),
            },
            "do not fit its config: .*Missing",
        ),
    ],
)  # fmt: skip
def test_foreign_checkpoints(content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "model.pt")
    with pytest.raises(ValueError, match=f"(?s)path: got model.pt, .*{message}"):
        Transformer.load("model.pt")
    assert not Path("executed").exists()


def test_damaged_and_missing_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with pytest.raises(FileNotFoundError):
        Transformer.load(path)
    small().save(path)
    whole = path.read_bytes()
    for broken in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"path: got .*damaged"):
            Transformer.load(path)


# Bad input ----------------------------------------------------------------------------------------

T = torch.tensor
BAD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("config dict", lambda: Transformer({}), TypeError, "config: got dict, expected a TransformerConfig"),
    ("dim", lambda: small(dim=15), ValueError, "dim: got 15, expected a multiple of num_heads = 2"),
    ("no vocabulary", lambda: small(vocab_size=0), ValueError, "vocab_size: got 0, expected at least 1"),
    ("layers float", lambda: small(encoder_layers=1.5), TypeError, "encoder_layers: got float, expected an integer"),
    ("no layers", lambda: small(encoder_layers=0, decoder_layers=0), ValueError, "got 0 and 0, expected at least one"),
    ("activation", lambda: small(activation="tanh"), ValueError, "activation: got 'tanh', allowed are 'relu', 'gelu'"),
    ("positions", lambda: small(positions="rotary"), ValueError, "positions: got 'rotary', allowed are 'sinusoidal'"),
    ("dropout", lambda: small(dropout=1.0), ValueError, "dropout: got 1.0"),
    ("attention_dropout", lambda: small(attention_dropout=-0.1), ValueError, "attention_dropout: got -0.1"),
    ("norm_eps", lambda: small(norm_eps=0.0), ValueError, "norm_eps: got 0.0"),
    ("labels", lambda: small(num_labels=2), ValueError, "num_labels: got 2, expected 0 with a decoder"),
    ("start", lambda: small(start_token=13), ValueError, "start_token: got 13, allowed are 0 to 12"),
    ("source vocab", lambda: small("encoder", source_vocab_size=5), ValueError, "source_vocab_size: got 5, expected"),
    ("list", lambda: small("encoder")([[1]]), TypeError, "tokens: got list, expected a torch.Tensor"),
    ("float", lambda: small("encoder")(torch.ones(1, 2)), ValueError, "tokens: got dtype torch.float32, allowed are"),
    ("1-D", lambda: small("encoder")(tokens(3)), ValueError, r"tokens: got shape \(3,\), expected 2 dimensions"),
    ("empty", lambda: small("encoder")(tokens(2, 0)), ValueError, r"tokens: got shape \(2, 0\), expected at least one"),
    ("unknown", lambda: small("encoder")(T([[13]])), ValueError, "tokens: got token 13, allowed are 0 to 12"),
    ("negative", lambda: small("encoder")(T([[-1]])), ValueError, "tokens: got token -1, allowed are 0 to 12"),
    (
        "too long", lambda: small("decoder", max_positions=4)(tokens(1, 5)), ValueError,
        "tokens: got 5 positions, allowed are 4, max_positions",
    ),
    (
        "target too long", lambda: small(positions="learned", max_positions=4)(tokens(1, 4), tokens(1, 5)), ValueError,
        "target: got 5 positions",
    ),
    ("no target", lambda: small()(tokens(1, 2)), ValueError, "target: got None, expected the decoder's tokens"),
    ("target", lambda: small("encoder")(tokens(1, 2), tokens(1, 2)), ValueError, "target: got a tensor, expected None"),
    ("batch", lambda: small()(tokens(2, 3), tokens(3, 3)), ValueError, "target: got a batch of 3, expected 2"),
    ("empty target", lambda: small()(tokens(2, 3), tokens(2, 0)), ValueError, "target: got shape"),
    ("unknown target", lambda: small()(tokens(1, 3), T([[13]])), ValueError, "target: got token 13"),
    ("length 0", lambda: small("encoder")(tokens(2, 3), lengths=T([0, 3])), ValueError, "lengths: got length 0"),
    ("length 4", lambda: small("encoder")(tokens(2, 3), lengths=T([4, 3])), ValueError, "lengths: got length 4, allo"),
    ("lengths' shape", lambda: small("encoder")(tokens(2, 3), lengths=T([3])), ValueError, r"lengths: got shape \(1,"),
    ("lengths' dtype", lambda: small("encoder")(tokens(1, 3), lengths=T([3.0])), ValueError, "lengths: got dtype"),
    ("lengths list", lambda: small("encoder")(tokens(1, 3), lengths=[3]), TypeError, "lengths: got list"),
    (
        "mask and lengths",
        lambda: small("encoder")(tokens(1, 3), lengths=T([3]), key_padding_mask=torch.ones(1, 3).bool()),
        ValueError, "key_padding_mask: got a tensor beside lengths",
    ),
    (
        "mask's dtype", lambda: small("encoder")(tokens(1, 3), key_padding_mask=torch.ones(1, 3)), ValueError,
        "key_padding_mask: got dtype torch.float32",
    ),
    (
        "mask's shape", lambda: small("encoder")(tokens(1, 3), key_padding_mask=torch.ones(1, 2).bool()), ValueError,
        "key_padding_mask: got shape",
    ),
    (
        "all padding", lambda: small("encoder")(tokens(1, 3), key_padding_mask=torch.zeros(1, 3).bool()), ValueError,
        "key_padding_mask: got no real token in sequence 0",
    ),
    (
        "no types", lambda: small("encoder")(tokens(1, 3), token_types=tokens(1, 3)), ValueError,
        "token_types: got a tensor, expected None",
    ),
    ("types", lambda: small("labels")(tokens(1, 2), token_types=T([[0, 2]])), ValueError, "token_types: got token 2"),
    (
        "types' shape", lambda: small("labels")(tokens(1, 2), token_types=T([[0]])), ValueError,
        "token_types: got shape",
    ),
    ("bert None", lambda: Transformer.from_bert(None, num_heads=2), TypeError, "state_dict: got NoneType"),
    (
        "bert from gpt2", lambda: Transformer.from_bert(tiny_gpt2().state_dict(), num_heads=2), ValueError,
        "state_dict: got .*without 'embeddings.word_embeddings.weight', expected that of a Hugging Face BertModel",
    ),
    ("gpt2 from nothing", lambda: Transformer.from_gpt2({}, num_heads=2), ValueError, "state_dict: got nothing"),
    (
        "gpt2 with more", lambda: Transformer.from_gpt2(tiny_gpt2().state_dict() | {"x": T(1)}, num_heads=2),
        ValueError, "state_dict: got 1 tensors that a GPT2Model has no place for: x",
    ),
    (
        "gpt2's heads", lambda: Transformer.from_gpt2(tiny_gpt2().state_dict(), num_heads=3), ValueError,
        "dim: got 16, expected a multiple of num_heads = 3",
    ),
    (
        "gpt2's vocabulary", lambda: Transformer.from_gpt2(tiny_gpt2().state_dict(), num_heads=2, vocab_size=14),
        ValueError, "vocab_size: got 14, expected the state_dict's 13",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
