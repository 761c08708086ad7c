"""How the tests on a GPU capture a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_T = TypeVar("_T")


def captured(work: Callable[[], _T]) -> tuple[torch.cuda.CUDAGraph, _T]:
    """A graph of ``work``, and the tensors into which a replay writes its results.

    ``work`` runs before, too: what is compiled or allocated at a first call must not be part of the graph.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph, results
