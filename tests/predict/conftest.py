"""Fixture that lets the tests of this folder use a fake patched model."""

from fakes import fake_steps  # noqa: F401
