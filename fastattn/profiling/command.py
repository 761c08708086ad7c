"""``python -m fastattn profile``: a model over growing sequence lengths, into a table, plots, a page and a trace."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastattn.profiling import options as given
from fastattn.profiling.page import Profile
from fastattn.profiling.ranges import write_trace
from fastattn.profiling.sweep import bound, profile
from fastattn.profiling.workloads import Shape, Workload, build

_INTERRUPTED = 130  # what a shell reports after Ctrl-C


def run(options: argparse.Namespace, device: torch.device) -> int:
    """Measure as the options of ``profile`` say, and write to ``options.out``; returns the exit status.

    An option that cannot be meant is named on stderr, with status 2. After Ctrl-C the lengths finished are printed and
    written, with status 130.
    """
    try:
        lengths = given.seq_lens(options.seq_lens)
        mask = given.mask(options.mask)
        for name in ("batch", "embed_dim", "heads"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: got {getattr(options, name)}, expected at least 1")
        if not options.seconds > 0:
            raise ValueError(f"--seconds: got {options.seconds}, expected more than 0")
        if options.embed_dim % options.heads and options.model in ("mha", "encoder"):
            raise ValueError(f"--heads: got {options.heads}, expected a divisor of --embed-dim {options.embed_dim}")
        shape = Shape(options.batch, options.embed_dim, options.heads, given.DTYPES[options.dtype], device)
        compare = [name.strip() for name in options.compare.split(",") if name.strip()]
        workload = build(options.model, compare, shape, mask, backward=options.backward, weights=options.weights)
        if workload.longest is not None and max(lengths) > workload.longest:
            raise ValueError(f"--seq-lens: got {max(lengths)}, the model has {workload.longest} positions")
    except ValueError as error:
        print(f"profile: {error}", file=sys.stderr)
        return 2
    result = profile(
        workload.models, workload.make_batch, lengths,
        title=_title(options), backward=options.backward, batch_size=options.batch, flops=workload.flops,
        seconds=options.seconds,
    )  # fmt: skip
    print(result)
    files = result.write(options.out)
    if options.trace and not result.interrupted:
        files += write_trace(_traced(result, workload, options.backward), options.out)
    print(f"written: {', '.join(map(str, files))}")
    return _INTERRUPTED if result.interrupted else 0


def _title(options: argparse.Namespace) -> str:
    what = "forward and backward" if options.backward else "forward"
    sizes = "" if options.model.startswith("hf:") else f", {options.embed_dim} features"
    if options.model in ("mha", "encoder"):
        sizes += f" in {options.heads} heads"
    weights = ", with weights" if options.weights else ""
    return f"{options.model}, {what}{weights}: batch {options.batch}{sizes}, {options.dtype}, mask {options.mask}"


def _traced(result: Profile, workload: Workload, backward: bool) -> dict[str, tuple[nn.Module, Callable[[], Any]]]:
    """The longest length of each implementation that ran."""
    calls = {}
    for name, model in workload.models.items():
        ran = [row.length for row in result.measurements if row.implementation == name and row.seconds is not None]
        if ran:
            calls[name] = model.module, bound(model, workload.make_batch(max(ran)), backward)
    return calls
