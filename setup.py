"""Build the extension only; the metadata stands in pyproject.toml."""

from setuptools import setup

setup()
