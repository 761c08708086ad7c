"""Measuring: time, peak memory, the long-sequence profile, the self-check of each backend, the README's figures."""
