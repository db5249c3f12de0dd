"""Token dropping in plain PyTorch: kept patches are gathered and padded to the longest image of the batch."""

from typing import Any

import torch
from torch import Tensor

from tinydrop_kernels import ops
from tinydrop_kernels.engine import steps
from tinydrop_kernels.families.grids import resampled_positions, resized_images
from tinydrop_kernels.policy.blend import combined_answers, log_probabilities


class PaddedDropping:
    """A callable that runs timm's own blocks on the patches that a patched model keeps, with a mask for the padding.

    Args:
        model: a timm ``VisionTransformer``, not patched.
        patched: the same model, patched. Its guidance model, policy and selection run in plain PyTorch. Its target does
            not run.
    """

    def __init__(self, model: Any, patched: Any):
        self.model, self.tinydrop = model, patched.tinydrop

    def __call__(self, images: Tensor) -> Tensor:
        """Return the patched model's answers ``(batch, classes)``, without a second look."""
        with ops.use_backend("reference"):
            plan = steps.plan(self.tinydrop, images)
        logits = plan.guidance_logits
        exits = log_probabilities(logits, images.dtype)
        if not plan.parts:
            return exits
        places = torch.cat([part.images for part in plan.parts]).long()
        answers = self.model.forward_head(self._encoded(images, plan))
        return exits.index_copy(0, places, combined_answers(answers, logits[places], plan.policy))

    def _encoded(self, images: Tensor, plan: Any) -> Tensor:
        model, tokens, seen = self.model, [], []
        longest = plan.packed.max_seqlen - model.num_prefix_tokens
        for part in plan.parts:
            places = part.images.long()
            kept = plan.selection.indices[places, :longest].long()
            tokens.append(self._embedded(images[places], kept, plan.levels[0], part.grid))
            seen.append(kept >= 0)
        x, mask = torch.cat(tokens), None
        if plan.packed.total < len(x) * plan.packed.max_seqlen:  # otherwise nothing is padded and no mask is needed
            prefix = seen[0].new_ones(len(x), model.num_prefix_tokens)
            mask = torch.cat((prefix, torch.cat(seen)), dim=1)[:, None, None]
        for block in model.blocks:
            x = block(x, attn_mask=mask)
        return model.norm(x)

    def _embedded(self, images: Tensor, kept: Tensor, dense: ops.types.Grid, grid: ops.types.Grid) -> Tensor:
        """Return prefix tokens and kept patches ``(images, prefix + longest, dim)``. Padding repeats patch 0."""
        model, prefix = self.model, self.model.num_prefix_tokens
        own = 0 if model.no_embed_class else prefix  # number of positions of prefix tokens
        if grid != dense:
            images = resized_images(images, model.patch_embed.patch_size, dense, grid)
        patches = model.patch_embed.norm(model.patch_embed.proj(images).flatten(2).mT)
        positions = resampled_positions(model.pos_embed, dense, grid, own)
        patches = patches + positions[:, own:]
        patches = patches.gather(1, kept.clamp(min=0)[..., None].expand(-1, -1, patches.shape[-1]))
        first = torch.cat([token for token in (model.cls_token, model.reg_token) if token is not None], dim=1)
        first = (first + positions[:, :own] if own else first).expand(len(images), -1, -1)
        return model.norm_pre(torch.cat((first, patches), dim=1))
