"""Which precision a device is fast in."""

import torch


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the device computes in it, else float32.

    On a CPU that takes AVX512-BF16 or AMX; one without either emulates bfloat16, slower than float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = kind == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if has_bfloat16 else torch.float32
