"""Transformer against Hugging Face's BERT and GPT-2 and against torch's own layers, trained; padding."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_cases import KINDS, small, tiny_gpt2, tokens

import fastattn
from fastattn.demo import minilm, sentences
from fastattn.models import Transformer, TransformerConfig
from fastattn.modules import attention_maps

# Weights from Hugging Face ------------------------------------------------------------------------


def test_the_real_minilm_gives_the_same_embeddings() -> None:
    bert = minilm.load_bert()
    ours = Transformer.from_bert(bert.state_dict(), num_heads=bert.config.num_attention_heads, vocab_size=30522)
    batch = minilm.batches(sentences.load(8), 8, 64, torch.device("cpu"))[0]
    assert not batch.mask.all()
    with torch.no_grad():
        theirs = minilm.HuggingFaceEncoder(bert)(batch.tokens, batch.mask)
        for padding in ({"lengths": batch.mask.sum(1)}, {"key_padding_mask": batch.mask}):
            hidden = ours(batch.tokens, **padding)
            assert (hidden - theirs)[batch.mask].abs().max() <= 1e-5
            embeddings = [minilm.sentence_embedding(states, batch.mask) for states in (hidden, theirs)]
            assert (embeddings[0] - embeddings[1]).abs().max() <= 1e-5


def test_a_bert_classifier_gives_the_same_logits() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3,
        max_position_embeddings=20, initializer_range=0.5,
    )  # fmt: skip
    theirs = BertForSequenceClassification(config).eval()
    ours = Transformer.from_bert(theirs.state_dict(), num_heads=2)
    source, types, lengths = tokens(3, 7), torch.randint(0, 2, (3, 7)), torch.tensor([7, 1, 4])
    mask = torch.arange(7) < lengths[:, None]
    with torch.no_grad():
        wanted = theirs(source, attention_mask=mask, token_type_ids=types).logits
        got = ours(source, lengths=lengths, token_types=types)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("tied", [True, False])
def test_a_gpt2_gives_the_same_logits(tied: bool) -> None:
    theirs = tiny_gpt2(tie_word_embeddings=tied)
    ours = Transformer.from_gpt2(theirs.state_dict(), num_heads=2)
    assert ours.config.tie_embeddings == tied
    source = tokens(3, 7)
    left = torch.arange(7) >= torch.tensor([0, 6, 3])[:, None]
    with torch.no_grad():
        torch.testing.assert_close(ours(source), theirs(source).logits, rtol=1e-5, atol=2e-5)
        positions = (left.cumsum(1) - 1).clamp(min=0)
        wanted = theirs(source, attention_mask=left, position_ids=positions).logits
        torch.testing.assert_close(ours(source, key_padding_mask=left)[left], wanted[left], rtol=1e-5, atol=2e-5)


# Against torch's own layers, trained --------------------------------------------------------------


class TorchTwin(nn.Module):
    """The same network on nn.TransformerEncoder and nn.TransformerDecoder, with the weights of ``ours``."""

    NAMES = (("self_norm", "norm1"), ("encoder_norm", "encoder.norm"), ("decoder_norm", "decoder.norm"))

    def __init__(self, ours: Transformer) -> None:
        super().__init__()
        config = ours.config
        shape: dict[str, Any] = {
            "dim_feedforward": config.hidden_dim, "dropout": 0.0, "activation": config.activation,
            "batch_first": True, "norm_first": config.norm_first,
        }  # fmt: skip
        last = nn.LayerNorm(config.dim) if config.norm_first else None
        arguments = (config.dim, config.num_heads)
        self.embeddings = copy.deepcopy(ours.embeddings)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(*arguments, **shape), config.encoder_layers, copy.deepcopy(last),
            enable_nested_tensor=False,
        )  # fmt: skip
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(*arguments, **shape), config.decoder_layers, last
        )  # fmt: skip
        weights = {}
        for name, weight in ours.state_dict().items():
            side, *rest = name.split(".")
            if side in ("encoder", "decoder"):
                side += ".layers"
            name = ".".join((side, *rest))
            mlp_norm = "norm2" if side.startswith("encoder") else "norm3"
            for mine, torchs in (
                *self.NAMES, ("cross_norm", "norm2"), ("mlp_norm", mlp_norm), ("cross_attn", "multihead_attn")
            ):  # fmt: skip
                name = name.replace(mine, torchs)
            weights[name] = weight
        self.load_state_dict(weights)

    def forward(self, source: Tensor, target: Tensor, *, lengths: Tensor) -> Tensor:
        padding = torch.arange(source.shape[1]) >= lengths[:, None]
        memory = self.encoder(self.embed(source), src_key_padding_mask=padding)
        triangle = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        out = self.decoder(
            self.embed(target), memory, tgt_mask=triangle, memory_key_padding_mask=padding, tgt_is_causal=True
        )  # fmt: skip
        return out @ self.embeddings.tokens.weight.T

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embeddings(tokens, torch.arange(tokens.shape[1]))


def losses(model: nn.Module, steps: int) -> list[float]:
    """Of learning to write a sequence backwards, without its padding."""
    draws = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    curve = []
    for _ in range(steps):
        source = torch.randint(2, 13, (16, 6), generator=draws)
        lengths = torch.randint(1, 7, (16,), generator=draws)
        index = (lengths[:, None] - 1 - torch.arange(6)) % 6
        target = source.gather(1, index).masked_fill(torch.arange(6) >= lengths[:, None], 1)
        fed = torch.cat((torch.zeros(16, 1, dtype=torch.int64), target[:, :-1]), 1)
        logits = model(source, fed, lengths=lengths)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize("norm_first", [False, True])
def test_training_follows_the_loss_curve_of_torchs_layers(norm_first: bool) -> None:
    ours = small("both", norm_first=norm_first, positions="learned", max_positions=6).train()
    twin = TorchTwin(ours).train()
    mine, torchs = losses(ours, 50), losses(twin, 50)
    torch.testing.assert_close(mine, torchs, rtol=2e-5, atol=0)
    assert sum(mine[-5:]) < 0.9 * sum(mine[:5])


class TorchAttention(nn.MultiheadAttention):
    """torch's own, which computes a causal mask only from a dense one."""

    def forward(self, query: Tensor, *rest: Any, is_causal: bool = False, **options: Any) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(query.shape[1]) if is_causal else None
        return super().forward(query, *rest, attn_mask=mask, is_causal=is_causal, **options)


def test_the_class_of_attention_may_be_torchs() -> None:
    ours = small()
    twin = Transformer(ours.config, attention=TorchAttention)
    twin.load_state_dict(ours.state_dict())
    assert [type(twin.decoder[0].cross_attn), type(ours.decoder[0].cross_attn)] == [
        TorchAttention,
        fastattn.MultiheadAttention,
    ]
    source, target, lengths = tokens(3, 6), tokens(3, 4), torch.tensor([6, 2, 4])
    assert_same(ours(source, target, lengths=lengths), twin.train()(source, target, lengths=lengths))


# What a model may rely on -------------------------------------------------------------------------


def call(model: Transformer, source: Tensor, **padding: Tensor) -> Tensor:
    target = torch.tensor([[0, 3, 5]]).expand(len(source), -1) if model.config.encoder_layers else None
    return model(source, target if model.config.decoder_layers else None, **padding)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str) -> None:
    model = small(kind)
    source, lengths = tokens(3, 6), torch.tensor([6, 2, 4])
    left = torch.arange(6) >= 6 - lengths[:, None]
    rolled = torch.stack([row.roll(6 - int(length)) for row, length in zip(source, lengths, strict=True)])
    with torch.no_grad():
        right_out = call(model, source, lengths=lengths)
        mask_out = call(model, source, key_padding_mask=torch.arange(6) < lengths[:, None])
        left_out = call(model, rolled, key_padding_mask=left)
        for row, length in enumerate(lengths.tolist()):
            alone = call(model, source[row : row + 1, :length])[0]
            per_token = kind in ("encoder", "decoder")
            assert_same(right_out[row, :length] if per_token else right_out[row], alone)
            assert_same(mask_out[row, :length] if per_token else mask_out[row], alone)
            assert_same(left_out[row, 6 - length :] if per_token else left_out[row], alone)


def assert_same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_decoder_does_not_see_the_future_and_nobody_makes_a_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    forward = fastattn.MultiheadAttention.forward
    monkeypatch.setattr(
        fastattn.MultiheadAttention, "forward",
        lambda *args, **options: masks.append(options.get("attn_mask")) or forward(*args, **options),
    )  # fmt: skip
    source, lengths = tokens(2, 5), torch.tensor([5, 3])
    for kind in ("decoder", "both"):
        model = small(kind)
        before, changed = source.clone(), source.clone()
        changed[:, 3] = (changed[:, 3] + 1) % 13
        arguments = [(source, before), (source, changed)] if kind == "both" else [(before,), (changed,)]
        with torch.no_grad():
            first, second = (model(*argument, lengths=lengths) for argument in arguments)
        assert torch.equal(first[:, :3], second[:, :3])
        assert not torch.equal(first[:, 3:], second[:, 3:])
    assert len(masks) == 2 * (2 + 2 + 4)
    assert masks == [None] * len(masks)


def test_presets_have_the_sizes_of_the_papers() -> None:
    configs = (TransformerConfig.bert_base(), TransformerConfig.gpt2_small(), TransformerConfig.vaswani_base())
    sizes = []
    with torch.device("meta"):
        for config in configs:
            sizes.append(sum(parameter.numel() for parameter in Transformer(config).parameters()))
    # As many as BertForSequenceClassification and GPT2LMHeadModel have.
    assert sizes == [109_483_778, 124_439_808, 63_082_496]
    assert TransformerConfig.bert_base(100, num_labels=0, encoder_layers=2).encoder_layers == 2


def test_vaswani_embeddings_are_scaled_before_the_positions_are_added() -> None:
    model, source = small(scale_embeddings=True), torch.tensor([[3, 5]])
    codes = fastattn.SinusoidalPositionalEncoding(16).encode(torch.arange(2)).float()
    wanted = 4 * model.embeddings.tokens.weight[[3, 5]] + codes
    assert_same(model.embeddings(source, torch.arange(2))[0], wanted)


def test_dropout_works_in_training_alone() -> None:
    model = small(dropout=0.5)
    source = tokens(2, 4)
    assert torch.equal(model(source, source), model(source, source))
    model.train()
    assert not torch.equal(model(source, source), model(source, source))


@pytest.mark.parametrize(("changes", "wanted"), [({}, 0.5), ({"attention_dropout": 0.0}, 0.0)])
def test_dropout_of_the_weights(changes: dict[str, float], wanted: float) -> None:
    layer = small(dropout=0.5, **changes).decoder[0]
    assert layer.self_attn.dropout == layer.cross_attn.dropout == wanted
    assert layer.dropout.p == 0.5


def test_attention_maps_of_an_encoder_decoder() -> None:
    model, source = small(), tokens(2, 5)
    with attention_maps(model) as maps:
        model(source, source[:, :3])
    assert maps["decoder.1.cross_attn"].shape == (2, 3, 5)
    assert len(maps) == 6


def test_vocabularies_of_their_own_and_untied_logits() -> None:
    model = small(source_vocab_size=40, tie_embeddings=False)
    out = model(torch.full((1, 3), 39), tokens(1, 2))
    assert out.shape == (1, 2, 13)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_copies_and_pickles_compute_the_same() -> None:
    model, source = small(), tokens(2, 4)
    wanted = model(source, source)
    assert torch.equal(copy.deepcopy(model)(source, source), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(source, source), wanted)
