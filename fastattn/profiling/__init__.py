"""Measuring: time, peak memory, the long-sequence profile, the self-check of each backend, the README's figures."""

from fastattn.profiling.page import Profile
from fastattn.profiling.ranges import named_ranges, write_trace
from fastattn.profiling.sweep import profile
from fastattn.profiling.sweep_table import Measurement

__all__ = ["Measurement", "Profile", "named_ranges", "profile", "write_trace"]
