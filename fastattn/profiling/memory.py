"""Peak memory of one call, above what the process held before it.

On CUDA it is the allocator's own peak. On the CPU it is the peak of the resident set: the allocator of torch knows
nothing of the scratch memory of oneDNN, of BLAS or of an extension, the kernel knows every page. The kernel keeps the
peak itself (VmHWM) and starts it again on request, so nothing between two samples is missed. Before the call malloc
and the extension give their free pages back, else memory freed earlier would serve the call unseen.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastattn.kernels.kept_memory import empty_cache

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.001


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that ``call`` needed at its peak beyond those in use before it, its result included.

    Run ``call`` once before: what is built on first use (thread pools, code, caches) is no part of the answer.
    Resolution on the CPU is about 0.1 MB.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        del result
        return peak - held
    _return_free_pages()
    if not _restart_peak():
        return _sampled_peak(call)
    held = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    del result
    return max(peak - held, 0)


def _return_free_pages() -> None:
    empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # not glibc
        return


def _restart_peak() -> bool:
    """Set VmHWM to the present resident set; False where the system does not offer that."""
    try:
        _CLEAR_REFS.write_text("5")
        return "VmHWM" in _STATUS.read_text()
    except OSError:
        return False


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{_STATUS} has no field {field}")


def _sampled_peak(call: Callable[[], Any]) -> int:
    """The resident set sampled from a thread: for systems without a peak that can be restarted."""
    import psutil

    process = psutil.Process()
    held = int(process.memory_info().rss)
    peak = held
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(_SAMPLE_SECONDS):
            peak = max(peak, int(process.memory_info().rss))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        result = call()
        peak = max(peak, int(process.memory_info().rss))
    finally:
        done.set()
        thread.join()
    del result
    return peak - held
