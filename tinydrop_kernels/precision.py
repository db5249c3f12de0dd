"""Which precision a device is fast in."""

import torch

from tinydrop_kernels.torch_internals import has_onednn_linear


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """Return bfloat16 if the device computes in it, else float32.

    On a CPU that takes AVX512-BF16 or AMX, and a oneDNN that uses them: others emulate bfloat16, slower than float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        asked = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
        is_native = any(is_supported is not None and is_supported() for is_supported in asked)
        has_bfloat16 = kind == "cpu" and is_native and has_onednn_linear(torch.bfloat16)
    return torch.bfloat16 if has_bfloat16 else torch.float32
