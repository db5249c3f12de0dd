"""Tests of the dtype that ``--dtype auto`` selects."""

import pytest
import torch

from tinydrop_kernels.cli import options
from tinydrop_kernels.cli.options import fast_dtype


@pytest.mark.parametrize(
    ("avx512", "amx", "wanted"),
    [(True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32)],
)
def test_cpu(monkeypatch, avx512, amx, wanted):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(options, "has_onednn_linear", lambda dtype: True)
    assert fast_dtype("cpu") == wanted


def test_a_cpu_of_which_torch_or_onednn_does_not_know(monkeypatch):
    """float32 is selected if torch lacks one of the checks and oneDNN does not use bfloat16 instructions."""
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(options, "has_onednn_linear", lambda dtype: dtype == torch.float32)
    assert fast_dtype("cpu") == torch.float32


@pytest.mark.parametrize(("native", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_cuda(monkeypatch, native, wanted):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert fast_dtype(torch.device("cuda", 0)) == wanted


def test_elsewhere():
    assert fast_dtype("meta") == torch.float32
