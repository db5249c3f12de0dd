"""Tests of pooling on every backend, against loops."""

import pytest
import torch

from tinydrop_kernels import ops

from .cases import DTYPES, cu_seqlens_of, tolerance

LENGTHS = [[1], [0, 0, 5], [7, 0, 1, 31, 32, 33, 70], [0], [], [0, 197, 2, 1370, 0]]
MODES = {"first": lambda rows: rows[0], "mean": lambda rows: rows.mean(0), "max": lambda rows: rows.amax(0)}


def pooled_by_hand(tokens, lengths, mode, skip):
    wanted, start = tokens.new_zeros(len(lengths), tokens.shape[1]), 0
    for row, length in zip(wanted, lengths, strict=True):
        if length > skip:
            row[:] = MODES[mode](tokens[start + skip : start + length])
        start += length
    return wanted


# Lengths 31, 32 and 33 are around the tile of 32 rows. 100 columns are more than one tile and do not fill two. The
# columns are not contiguous.
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("skip", [0, 1, 5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segment_pool(backend, lengths, skip, mode, dtype):
    tokens = torch.randn(sum(lengths), 200, device=backend.device).to(dtype)[:, ::2]
    out = ops.segment_pool(tokens, cu_seqlens_of(lengths, backend.device), mode, skip)
    assert out.dtype == dtype and out.is_contiguous()
    wanted = pooled_by_hand(tokens.double().cpu(), lengths, mode, skip)
    bound = tolerance(dtype, max(lengths, default=0))
    torch.testing.assert_close(out.double().cpu(), wanted, atol=bound, rtol=bound)


@pytest.mark.parametrize("mode", MODES)
def test_nan_and_infinity(backend, mode):
    """Check that NaN and infinity stay in their segment and column."""
    tokens = torch.randn(80, 6, device=backend.device)
    tokens[3, 0] = tokens[50, 1] = tokens[79, 2] = float("nan")
    tokens[5, 3], tokens[:40, 4] = float("inf"), float("-inf")
    lengths = [40, 0, 40]
    out = ops.segment_pool(tokens, cu_seqlens_of(lengths, backend.device), mode)
    wanted = pooled_by_hand(tokens.double().cpu(), lengths, mode, 0)
    bound = tolerance(torch.float32, 40)
    torch.testing.assert_close(out.double().cpu(), wanted, equal_nan=True, atol=bound, rtol=bound)


@pytest.mark.parametrize("mode", MODES)
def test_float64(backend, mode):
    tokens = torch.randn(12, 5, dtype=torch.float64, device=backend.device)
    out = ops.segment_pool(tokens, cu_seqlens_of([7, 0, 5], backend.device), mode, 1)
    torch.testing.assert_close(out.cpu(), pooled_by_hand(tokens.cpu(), [7, 0, 5], mode, 1), atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_gradients(backend, mode):
    tokens = torch.randn(9, 3, dtype=torch.float64, device=backend.device, requires_grad=True)
    cu_seqlens = cu_seqlens_of([4, 0, 5], backend.device)
    assert torch.autograd.gradcheck(lambda t: ops.segment_pool(t, cu_seqlens, mode, 1), (tokens,))


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="^mode: got 'median', expected one of first, mean, max$"):
        ops.segment_pool(torch.randn(3, 2), cu_seqlens_of([3]), "median")
