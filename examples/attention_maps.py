"""Where a translation looked: the attention weights of every word written over the words read, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from number_words import LONGEST, Vocabulary
from torch import Tensor, nn

from fastattn.models import Seq2Seq, Transformer, generate
from fastattn.profiling.plot import pyplot


@torch.no_grad()
def attention_maps(model: Seq2Seq | Transformer, source: Tensor, target: Tensor) -> Tensor:
    """Weights (B, T, S) of target (B, T) over source (B, S), without padding in either.

    A Seq2Seq returns its own; of a Transformer they are the mean over the heads of the decoder's last attention over
    the encoder.
    """
    if isinstance(model, Seq2Seq):
        return model(source, target, need_weights=True)[1]
    attention: nn.Module = model.decoder[-1].cross_attn
    seen: list[Tensor] = []

    def ask(module: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, options | {"need_weights": True}

    def keep(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        seen.append(output[1])

    hooks = [attention.register_forward_pre_hook(ask, with_kwargs=True), attention.register_forward_hook(keep)]
    try:
        model(source, target)
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0]


def plot_maps(
    model: Seq2Seq | Transformer, source: Vocabulary, target: Vocabulary, texts: Sequence[str], path: Path
) -> None:
    """Translate texts, and draw one map for each beside the other, as a PNG at ``path``."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(texts), figsize=(5 * len(texts), 7), constrained_layout=True, squeeze=False)
    for axis, text in zip(axes.flat, texts, strict=True):
        read = torch.tensor([source.encode(text)])
        written = generate(model, read, max_new_tokens=LONGEST, end_token=target.end).tokens
        # The weights that chose a token are those of the step that read the token before it.
        before = torch.cat([torch.tensor([[target.start]]), written[:, :-1]], 1)
        weights = attention_maps(model, read, before)[0]
        axis.imshow(weights.numpy(), cmap="Greys", vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
        axis.set_xticks(range(read.shape[1]), [source.pieces[token] for token in read[0].tolist()], rotation=90)
        axis.set_yticks(range(written.shape[1]), [target.pieces[token] for token in written[0].tolist()])
    figure.savefig(path, dpi=120)
    plt.close(figure)
