"""The target model's forward, from images to packed tokens, each image at its own grid, and on to logits."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from tinydrop_kernels import ops
from tinydrop_kernels.engine.buckets import Bucket
from tinydrop_kernels.engine.cuda_graphs import MOST_ROWS, StageGraphs
from tinydrop_kernels.families import Family
from tinydrop_kernels.families.grids import resized_images
from tinydrop_kernels.ops import Packed, Part
from tinydrop_kernels.ops.types import Grid, TimmModule
from tinydrop_kernels.torch_internals import eager, eager_outside, for_any_size


@eager  # because otherwise torch.compile would compile it again for each mix of grids
def embed_parts(
    model: TimmModule, family: Family, images: Tensor, indices: Tensor, packed: Packed, parts: list[Part]
) -> tuple[Tensor, Packed]:
    """Return the packed tokens and their layout. Images with a coarser grid than the dense one are resized first.

    Args:
        model, family: the target.
        images: ``(batch, channels, height, width)``.
        indices: int32 ``(batch, patches)``, as in :class:`ops.Selection`.
        packed, parts: the layout from :func:`ops.pack`.

    Returns:
        Tokens ``(total, dim)``, part by part, and ``packed``. If the family reads positions, ``packed`` has them.
    """
    dense, prefix = family.grid_size(model, images), family.num_prefix_tokens(model)
    tokens, positions = [], []
    for part in parts:
        rows, columns = part.grid
        is_whole = len(part.images) == len(images)  # the images are in their own order then, so nothing is gathered
        pixels, kept = (t if is_whole else t.index_select(0, part.images) for t in (images, indices))
        if part.grid != dense:
            pixels = resized_images(pixels, family.patch_size(model), dense, part.grid)
        kept = kept[:, : rows * columns]
        tokens.append(family.embed(model, pixels, kept, part.cu_seqlens, part.total, part.grid))
        if family.reads_positions:
            positions.append(ops.patch_positions(kept, part.cu_seqlens, part.total, prefix))
    if positions:
        packed = packed._replace(positions=torch.cat(positions))
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens), packed


@eager_outside
def run_target(
    model: TimmModule,
    family: Family,
    images: Tensor,
    indices: Tensor,
    packed: Packed,
    parts: list[Part],
    compiled: bool,
    graphs: StageGraphs | None,
    stage: Callable[[str], AbstractContextManager[None]],
) -> Tensor:
    """Return the logits ``(segments, classes)``, part by part.

    Args:
        model, family, images, indices, packed, parts: as for :func:`embed_parts`.
        compiled: run the blocks through ``torch.compile``.
        graphs: CUDA graphs of blocks and head; None to run without graphs.
        stage: returns a context that times the stage of the given name.
    """
    encode = for_any_size(family.encode) if compiled else family.encode
    with stage("embed"):
        tokens, packed = embed_parts(model, family, images, indices, packed, parts)
    # A family that reads positions runs without graphs, because a graph is given no layout but cu_seqlens.
    if graphs is not None and not family.reads_positions and packed.total <= MOST_ROWS:
        logits = _replayed(graphs, model, family, encode, tokens, packed, family.grid_size(model, images))
        if logits is not None:
            return logits
    with stage("blocks"):
        tokens, packed = encode(model, tokens, packed, parts)
    with stage("head"):
        return family.classify(model, tokens, packed)


@eager_outside
def _replayed(
    graphs: StageGraphs,
    model: TimmModule,
    family: Family,
    encode: Callable[..., tuple[Tensor, Packed]],
    tokens: Tensor,
    packed: Packed,
    dense: Grid,
) -> Tensor | None:
    """Return the logits from a graph; None if no graph can serve the batch."""
    prefix = family.num_prefix_tokens(model)
    bucket = Bucket.of(packed, prefix, prefix + dense[0] * dense[1])

    def blocks(tokens: Tensor, cu_seqlens: Tensor, fillings: Tensor) -> Tensor:
        read = encode(model, tokens, Packed(cu_seqlens, bucket.max_seqlen, bucket.rows), [])
        return family.classify(model, *read)

    logits: Tensor | None = graphs.answer(
        (bucket, tokens.dtype, encode),
        blocks,
        lambda: bucket.make(tokens),
        lambda *inputs: bucket.fill(inputs, tokens, packed.cu_seqlens),
    )
    return None if logits is None else logits[: len(packed.cu_seqlens) - 1]
