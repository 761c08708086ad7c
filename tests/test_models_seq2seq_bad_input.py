"""Seq2Seq given wrong configurations, wrong arguments, and files of something else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import DEVICE

import fastattn
from fastattn.models import Seq2Seq, Seq2SeqConfig, checkpoint, generate


def _config(**options: Any) -> Seq2SeqConfig:
    sizes = {"source_size": 11, "target_size": 7, "source_embedding": 5, "target_embedding": 6, "hidden_size": 8}
    return Seq2SeqConfig(**{**sizes, **options})


def _model(**options: Any) -> Seq2Seq:
    return Seq2Seq(_config(**options), device=DEVICE)


# Files -------------------------------------------------------------------------------------------------------


def test_a_file(tmp_path: Path) -> None:
    model = _model(tie_embeddings="output", bidirectional=True).double()
    model.save(tmp_path / "model.pt")
    loaded = Seq2Seq.load(tmp_path / "model.pt", DEVICE, config=model.config)
    source, target = torch.randint(11, (3, 5), device=DEVICE), torch.randint(7, (3, 4), device=DEVICE)
    assert not loaded.training
    assert torch.equal(loaded(source, target), model.eval()(source, target))
    with pytest.raises(ValueError, match=r"whose model has target_size=7, expected 8"):
        Seq2Seq.load(tmp_path / "model.pt", config=_config(tie_embeddings="output", bidirectional=True, target_size=8))
    whole = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        Seq2Seq.load(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError):
        Seq2Seq.load(tmp_path / "none.pt")


def test_a_foreign_file(tmp_path: Path) -> None:
    model, path = _model(), tmp_path / "file.pt"
    config, weights = dataclasses.asdict(model.config), model.state_dict()
    torch.save(weights, path)
    with pytest.raises(ValueError, match="a file of something else"):
        Seq2Seq.load(path)
    for parts, said in (
        ({"kind": "Transformer", "config": config, "weights": weights}, "of kind 'Transformer'"),
        ({"kind": "Seq2Seq", "config": {**config, "heads": 8}, "weights": weights}, "whose config is refused.*heads"),
        ({"kind": "Seq2Seq", "config": {**config, "hidden_size": 0}, "weights": weights}, "refused: hidden_size"),
        ({"kind": "Seq2Seq", "config": {**config, "target_size": 9}, "weights": weights}, "do not fit.*size mismatch"),
        ({"kind": "Seq2Seq", "config": config, "weights": {}}, "do not fit"),
    ):
        checkpoint.save(path, **parts)
        with pytest.raises(ValueError, match=f"(?s)path: got .*{said}"):
            Seq2Seq.load(path)


# Arguments ---------------------------------------------------------------------------------------------------

_TOKENS = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
_LENGTHS = torch.tensor([3, 2], device=DEVICE)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source_size": 0}, ValueError, "source_size: got 0, expected at least 1"),
        ({"hidden_size": 8.0}, TypeError, "hidden_size: got float, expected an integer"),
        ({"target_embedding": 0}, ValueError, "target_embedding: got 0"),
        ({"bidirectional": 1}, TypeError, "bidirectional: got int, expected a bool"),
        ({"dropout": 1.0}, ValueError, "dropout: got 1.0, expected at least 0 and below 1"),
        ({"dropout": "0"}, TypeError, "dropout: got str"),
        ({"start_token": 7}, ValueError, "start_token: got 7, expected 0 to 6"),
        ({"start_token": None}, TypeError, "start_token: got NoneType"),
        ({"bidirectional": True, "hidden_size": 7}, ValueError, "hidden_size: got 7, expected an even number"),
        ({"attention": "Dot"}, ValueError, "attention: got 'Dot', allowed are 'additive', 'dot'"),
        ({"attention": "dot", "encoder_size": 5}, ValueError, "encoder_size: got 5, .* of 5 features; expected"),
        ({"coverage": True}, ValueError, "coverage: got True with attention='general', allowed"),
        ({"attention": None, "input_feeding": True}, ValueError, "input_feeding: got True with attention=None"),
        ({"tie_embeddings": True}, ValueError, "tie_embeddings: got True, allowed are 'none'"),
        ({"tie_embeddings": "output", "target_embedding": None}, ValueError, "target_embedding: got None"),
        ({"tie_embeddings": "all"}, ValueError, "source_embedding: got 5, expected target_embedding = 6"),
        ({"tie_embeddings": "all", "source_embedding": 6}, ValueError, "source_size: got 11, expected target_size = 7"),
    ],
)
def test_a_wrongconfig(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _config(**options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m([[1]], _TOKENS), TypeError, "source: got list"),
        (lambda m: m(_TOKENS.float(), _TOKENS), ValueError, "source: got dtype torch.float32"),
        (lambda m: m(_TOKENS[:, :0], _TOKENS), ValueError, "source: got shape .*at least one"),
        (lambda m: m(_TOKENS[0], _TOKENS), ValueError, "source: got shape"),
        (lambda m: m(_TOKENS + 11, _TOKENS), ValueError, "source: got token 11, allowed are 0 to 10"),
        (lambda m: m(_TOKENS, _TOKENS - 1), ValueError, "target: got token -1, allowed are 0 to 6"),
        (lambda m: m(_TOKENS, _TOKENS[:, :0]), ValueError, "target: got shape .*at least one"),
        (lambda m: m(_TOKENS, _TOKENS[:1]), ValueError, "target: got a batch of 1, expected 2"),
        (lambda m: m(_TOKENS, _TOKENS, lengths=_LENGTHS + 1), ValueError, "lengths: got length 4, allowed are 1 to 3"),
        (lambda m: m(_TOKENS, _TOKENS, lengths=_LENGTHS - 2), ValueError, "lengths: got length 0, allowed"),
        (lambda m: m(_TOKENS, _TOKENS, lengths=[3, 2]), TypeError, "lengths: got list"),
        (lambda m: m(_TOKENS, _TOKENS, lengths=_LENGTHS[:1]), ValueError, "lengths: got shape"),
        (lambda m: m(_TOKENS, _TOKENS, teacher_forcing=1.5), ValueError, "teacher_forcing: got 1.5"),
        (lambda m: m(_TOKENS, _TOKENS, teacher_forcing=True), TypeError, "teacher_forcing: got bool"),
        (lambda m: m.loss(_TOKENS, _TOKENS[:, :1]), ValueError, "target: got shape .*at least 2 tokens"),
        (lambda m: m.loss(_TOKENS, _TOKENS, target_lengths=_LENGTHS - 1), ValueError, "target_lengths: got 1, allowed"),
        (lambda m: m.start(_TOKENS, _LENGTHS + 1, 5), ValueError, "lengths: got length 4"),
        (lambda m: generate(m, _TOKENS + 11, max_new_tokens=2), ValueError, "source: got token 11"),
        (lambda m: m.step(_LENGTHS + 5, m.start(_TOKENS, _LENGTHS, 5)[1]), ValueError, "tokens: got token 8, allowed"),
        (lambda m: Seq2Seq({"hidden_size": 8}), TypeError, "config: got dict, expected a Seq2SeqConfig"),
        (lambda m: _model(attention=None)(_TOKENS, _TOKENS, need_weights=True), ValueError, "need_weights: got True"),
    ],
)
def test_bad_input(call: Callable[[Seq2Seq], Any], error: type[Exception], message: str) -> None:
    with fastattn.debug_checks(), pytest.raises(error, match=message):
        call(_model())


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (_TOKENS, ValueError, "source: got dtype torch.int64, expected torch.float32"),
        (torch.zeros(2, 3, 63, device=DEVICE), ValueError, r"source: got shape \(2, 3, 63\), expected \(B, S, 64\)"),
        (torch.zeros(2, 0, 64, device=DEVICE), ValueError, "source: got shape .*at least one step"),
        (None, TypeError, "source: got NoneType"),
    ],
)
def test_bad_features(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Seq2Seq(Seq2SeqConfig.classic(), device=DEVICE)(source, _TOKENS)
