"""The search for a packed row's segment and patch, shared by the kernels over packed tokens."""

import triton
import triton.language as tl


def search_step(segments: int) -> int:
    """Return the first step of the search in :func:`locate_rows`: the largest power of two below ``segments``, or 0."""
    return 1 << (segments - 1).bit_length() >> 1


@triton.jit
def locate_rows(
    rows,
    live,
    indices_pointer,
    cu_seqlens_pointer,
    segments,
    first_step,
    indices_stride,
    num_prefix_tokens: tl.constexpr,
):
    """Find the segment, the place and the patch of packed rows.

    Args:
        rows: packed rows, of shape [BLOCK_ROWS].
        live: whether each row exists, of shape [BLOCK_ROWS].
        indices_pointer: kept patches of each segment, then -1, of shape [segments, n].
        cu_seqlens_pointer: first row of each segment, of shape [segments + 1].
        segments: number of segments.
        first_step: result of :func:`search_step` for segments.
        indices_stride: elements from one segment's patches to the patches of the next.
        num_prefix_tokens: rows of every segment in front of its patches.

    Returns:
        segment: int64, so that offsets into a large batch do not overflow; of shape [BLOCK_ROWS].
        place: row within the segment minus the number of prefix tokens, negative in the prefix; of shape [BLOCK_ROWS].
        patch: the row's patch, -1 in the prefix and where not live; of shape [BLOCK_ROWS].
    """
    # Find the last segment that begins at or before the row. This is never an empty segment, because an empty segment
    # begins where the next one begins. All rows probe the same places first, so the first loads are broadcasts that hit
    # the L1 cache.
    segment = tl.zeros_like(rows)
    step = first_step
    while step > 0:
        probe = segment + step
        start = tl.load(cu_seqlens_pointer + probe, mask=probe < segments, other=2147483647)
        segment = tl.where(start <= rows, probe, segment)
        step = step // 2

    place = rows - tl.load(cu_seqlens_pointer + segment) - num_prefix_tokens
    segment = segment.to(tl.int64)
    patch = tl.load(indices_pointer + segment * indices_stride + place, mask=live & (place >= 0), other=-1)
    return segment, place, patch
