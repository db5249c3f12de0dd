"""Everything is in pyproject.toml; this file stands where the optional CUDA extension will be built."""

from setuptools import setup

setup()
