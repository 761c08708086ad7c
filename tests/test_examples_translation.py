"""The translation of numbers, and the training loop it shares: data, resumed runs, plain torch, errors, commands."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastattn
from fastattn.models import Seq2Seq, Seq2SeqConfig

num2words = pytest.importorskip("num2words").num2words
pytest.importorskip("matplotlib")

from attention_maps import attention_maps  # noqa: E402
from number_words import JOIN, SPLIT, Vocabulary, english, foreign, split  # noqa: E402
from plain_torch import plain_torch  # noqa: E402
from training import Run, compare, generator, load_weights, plot_losses, side_by_side, train, warmup_linear  # noqa: E402
from translation import MODELS, Pairs, Settings, build, load, loss_of, main, translate  # noqa: E402

NUMBERS = [*range(100), 101, 180, 205, 999, 80_021, 200_000, 999_999]
MODEL = pytest.mark.parametrize("model", MODELS)
LANGUAGE = pytest.mark.parametrize("language", ["fr", "de"])


@functools.cache
def pairs(language: str = "fr") -> Pairs:
    source = Vocabulary.of("en", map(english, NUMBERS))
    return Pairs(NUMBERS, source, Vocabulary.of(language, (foreign(number, language) for number in NUMBERS)))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """No curves: a picture takes longer than a small training, and one test draws them."""
    monkeypatch.setattr("training.plot_losses", lambda runs, path: path.touch())


class Small:
    """A small training of numbers, or of what is left of it: each is made anew, as a new process would."""

    def __init__(self, model: str = "seq2seq", language: str = "fr", **changes: Any) -> None:
        self.data = pairs(language)
        settings = Settings(model=model, language=language, **({"size": 16, "layers": 1} | changes))
        self.model = build(settings, len(self.data.source), len(self.data.target))

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.data.batch(torch.randint(len(NUMBERS), (8,), generator=generator(0, step)).tolist())

    def train(self, folder: Path, steps: int, **options: Any) -> list[float]:
        optimizer = torch.optim.Adam(self.model.parameters(), 3e-3)
        settings = {"next_batch": self.batch, "save_every": 4, "schedule": warmup_linear(20, 2)} | options
        loss = loss_of(self.model, self.data.target.pad)
        return train(self.model, optimizer, loss=loss, steps=steps, folder=folder, **settings)


def test_pairs_are_those_of_num2words_and_every_part_has_its_own() -> None:
    numbers = split(training=100, validation=5, held_out=20)
    parts = [set(part) for part in (numbers.training, numbers.validation, numbers.held_out)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 100 + 4 * 100 + 4 * 25
    assert set(range(100)) <= parts[0]
    assert max(map(max, parts)) <= 999_999
    assert (
        numbers == split(training=100, validation=5, held_out=20) != split(1, training=100, validation=5, held_out=20)
    )
    data = Pairs(numbers.held_out[:20], *(pairs("de").source, pairs("de").target))
    assert data.answers == [num2words(number, lang="de") for number in numbers.held_out[:20]]


@given(number=st.integers(0, 999_999), language=st.sampled_from(["fr", "de"]))
def test_a_text_is_its_pieces_joined(number: int, language: str) -> None:
    text = foreign(number, language)
    assert JOIN[language](SPLIT[language](text)) == text


@LANGUAGE
def test_tokens_are_decoded_to_the_text(language: str) -> None:
    data = pairs(language)
    _, lengths, target = data.batch(range(len(NUMBERS)))
    assert [data.target.decode(row[1:]) for row in target.tolist()] == data.answers
    assert lengths.tolist() == [len(row) for row in data.sources]
    assert data.source.encode("Two hundred, and FIVE") == data.source.encode("two-hundred and five")


@pytest.mark.usefixtures("no_pictures")
@MODEL
def test_an_interrupted_training_goes_on_to_the_same_losses(model: str, tmp_path: Path) -> None:
    whole = Small(model).train(tmp_path / "whole", 12)

    class PowerCutError(Exception):
        pass

    def cut(step: int) -> tuple[Tensor, Tensor, Tensor]:
        if step == 7:
            raise PowerCutError
        return Small(model).batch(step)

    with pytest.raises(PowerCutError):
        Small(model).train(tmp_path / "cut", 12, next_batch=cut)
    assert len(Run.read(tmp_path / "cut").losses) == 4
    resumed = Small(model)
    assert resumed.train(tmp_path / "cut", 12) == whole
    other = Small(model, seed=1)
    load_weights(tmp_path / "whole", other.model)
    for mine, theirs in zip(resumed.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("no_pictures")
def test_dropout_is_resumed_too(tmp_path: Path) -> None:
    def losses(folder: Path, *ends: int) -> list[float]:
        for end in ends:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            result = train(
                model, optimizer, lambda step: (torch.randn(4, 8, generator=generator(0, step)),),
                lambda x, model=model: model(x).square().mean(), steps=end, folder=folder,
            )  # fmt: skip
        return result

    assert losses(tmp_path / "two", 3, 6) == losses(tmp_path / "one", 6)


@pytest.mark.usefixtures("no_pictures")
def test_control_c_saves_the_step_and_stops(tmp_path: Path) -> None:
    small = Small()

    def press(step: int) -> tuple[Tensor, Tensor, Tensor]:
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return small.batch(step)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="after step 6"):
        small.train(tmp_path, 12, next_batch=press)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(Run.read(tmp_path).losses) == 6
    assert Small().train(tmp_path, 12) == Small().train(tmp_path / "whole", 12)
    assert {path.name for path in tmp_path.glob("*.*")} == {"checkpoint.pt", "losses.csv", "loss.png"}


@pytest.mark.usefixtures("no_pictures")
@MODEL
def test_plain_torch_has_the_same_losses(model: str, tmp_path: Path) -> None:
    Small(model).train(tmp_path / "fast", 20)
    small = Small(model)
    plain_torch(small.model)
    assert not any(type(module).__module__.startswith("fastattn.modules.") for module in attending(small.model))
    small.train(tmp_path / "torch", 20)
    ours, theirs = (torch.tensor(Run.read(tmp_path / name).losses) for name in ("fast", "torch"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)
    table = compare(tmp_path / "fast", tmp_path / "torch")
    assert "first 20 steps" in table
    assert (tmp_path / "fast" / "comparison.png").exists()


def attending(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (nn.RNNBase, nn.MultiheadAttention))]


@pytest.mark.parametrize(
    ("attention", "options"),
    [("additive", {"input_feeding": True}), ("concat", {"coverage": True}), ("dot", {}), ("general", {}), (None, {})],
)
def test_plain_torch_has_every_attention(attention: str | None, options: dict[str, bool]) -> None:
    config = Seq2SeqConfig(source_size=9, target_size=9, hidden_size=8, attention=attention, **options)
    model = Seq2Seq(config)
    source, target, lengths = torch.randint(9, (3, 5)), torch.randint(9, (3, 4)), torch.tensor([5, 1, 3])
    wanted = torch.autograd.grad(model.loss(source, target, lengths=lengths), list(model.parameters()))
    got = torch.autograd.grad(plain_torch(model).loss(source, target, lengths=lengths), list(model.parameters()))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_plain_torch_keeps_the_parameters() -> None:
    model = nn.ModuleList([fastattn.LSTM(4, 8, 2), fastattn.MultiheadAttention(8, 2), fastattn.LSTMCell(4, 8)])
    before = list(model.parameters())
    plain_torch(model)
    assert isinstance(model[0], nn.LSTM)
    assert type(model[2]) is nn.LSTMCell
    assert all(mine is theirs for mine, theirs in zip(before, model.parameters(), strict=True))


@MODEL
def test_attention_maps_are_weights_over_the_source(model: str) -> None:
    small = Small(model)
    source, target = torch.randint(3, 9, (2, 5)), torch.randint(3, 9, (2, 4))
    weights = attention_maps(small.model, source, target)
    assert weights.shape == (2, 4, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4))


@pytest.mark.usefixtures("no_pictures")
def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)

    def loss(step: int) -> Tensor:
        return model.weight.sum() * (float("nan") if step == 2 else 1.0)

    with pytest.raises(ValueError, match="loss: got nan at step 2"):
        train(model, optimizer, lambda step: (step,), loss, steps=4, folder=tmp_path, save_every=1)
    assert len(Run.read(tmp_path).losses) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", "damaged"),
        ({"weights": torch.zeros(2)}, "something else"),
        (Path("x"), "more than tensors"),
    ],
)
def test_a_foreign_checkpoint_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        Small().train(tmp_path, 4)
    with pytest.raises(SystemExit, match=message):
        main(["translate", "--folder", str(tmp_path), "one"])


@pytest.mark.usefixtures("no_pictures")
def test_a_run_of_other_settings_or_another_model_is_refused(tmp_path: Path) -> None:
    Small().train(tmp_path, 2, about={"target": ["un", "deux"]})
    with pytest.raises(ValueError, match=r"started with target=\['un', 'deux'\], now \['eins'\]"):
        Small().train(tmp_path, 4, about={"target": ["eins"]})
    with pytest.raises(ValueError, match="another model"):
        Small(size=8).train(tmp_path, 4, about={"target": ["un", "deux"]})
    with pytest.raises(ValueError, match="another model"):
        load_weights(tmp_path, Small("transformer").model)
    with pytest.raises(ValueError, match="not a translation"):
        load(tmp_path)


def test_what_is_no_number_in_words_is_refused() -> None:
    small = Small()
    for text in ("two hundred elephants", "", "205"):
        with pytest.raises(ValueError, match="expected a number in words"):
            translate(small.model, small.data.source, small.data.target, text)


def test_runs_are_plotted_with_and_without_validations(tmp_path: Path) -> None:
    plot_losses({"a": Run(losses=[1.0, 0.5]), "b": Run(losses=[1.0], validations=[[1.0, 0.3]])}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.usefixtures("no_pictures")
@MODEL
def test_the_commands(model: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("translation.split", lambda seed, **_: split(seed, training=60, validation=1, held_out=2))
    monkeypatch.setattr("translation.side_by_side", functools.partial(side_by_side, seconds=0.0))
    chosen = ["--model", model, "--language", "de"]
    tiny = [*chosen, "--steps", "4", "--size", "16", "--layers", "1", "--batch", "4"]
    main(["train", *tiny, "--stop", "2"])
    assert "held out" not in capsys.readouterr().out
    main(["train", *tiny])
    assert "held out" in capsys.readouterr().out
    main(["train", *tiny, "--backend", "torch", "--stop", "3"])
    main(["compare", *chosen])
    table = capsys.readouterr().out
    assert "first 3 steps" in table
    assert "in turns" in table
    main(["translate", *chosen, "two hundred and five"])
    folder = tmp_path / "runs" / f"translation-de-{model}"
    wanted = {"attention.png", "checkpoint.pt", "comparison.png", "loss.png", "losses.csv"}
    assert {path.name for path in folder.iterdir()} == wanted
    with pytest.raises(SystemExit, match="steps=4, now 5"):
        main(["train", *tiny[:4], "--steps", "5", *tiny[6:]])
    with pytest.raises(SystemExit, match="No such file"):
        main(["translate", "--folder", "nowhere", "one"])
