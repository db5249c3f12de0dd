"""``model.tinydrop``, the part of a patched model that users read, change and call."""

import dataclasses

from torch import Tensor

from tinydrop_kernels.engine import steps
from tinydrop_kernels.engine.features import features_in_place
from tinydrop_kernels.engine.state import PatchedState
from tinydrop_kernels.engine.target import embed_parts
from tinydrop_kernels.families.flops import count_flops
from tinydrop_kernels.ops.derived import settle
from tinydrop_kernels.policy.blend import log_probabilities
from tinydrop_kernels.report import Call, Report
from tinydrop_kernels.torch_internals import eager_outside


class TinyDrop(PatchedState):
    """The ``tinydrop`` attribute of a patched model. Several threads may call the model at once.

    Attributes:
        guidance: the guidance model.
        policy: the :class:`DropPolicy`. You may replace it between calls.
        last: the :class:`~tinydrop_kernels.report.Call` that this thread made last; None before its first call.
        num_classes: width of the model's head; 0 if the head is ``nn.Identity``. ``model.num_classes`` may be stale,
            because it does not change when a head is replaced by hand.
        multi_label: the head is one of sigmoids. Policies that mix answers are refused.
        normalization: mean and standard deviation of each channel of the images.
        compiled: the target's blocks run through ``torch.compile``.
        graphs: CUDA graphs that calls are replayed from; None if CUDA graphs are off.
        timed: measure the wall time of each stage from now on. The host then waits for the device after each stage.

    Example:
        >>> model = tdk.patch(model, guidance, tdk.DropPolicy.fixed(0.5))
        >>> answers = model(images)
        >>> model.tinydrop.last.counts.tolist()
        [98, 98]
        >>> model.tinydrop.policy = tdk.DropPolicy.fixed(0.25)
        >>> answers = model(images)
        >>> model.tinydrop.last.counts.tolist()
        [49, 49]
    """

    @eager_outside
    def __call__(self, images: Tensor) -> Tensor:
        """Return the answers for images, ``(batch, classes)`` in the target's dtype.

        Args:
            images: ``(batch, channels, height, width)``, normalised for the target.

        Returns:
            Log-probabilities if the policy mixes answers, otherwise the target's own logits.
        """
        self.check(images)
        if len(images) == 0:
            self.last = None
            logits = self.dense(images)
            return log_probabilities(logits, logits.dtype) if self.policy.mixes_answers else logits
        return steps.classify(self, images)

    def dense(self, images: Tensor) -> Tensor:
        """Return the target's own logits, with every patch kept and no exits."""
        logits: Tensor = self.model.forward_head(self.model.forward_features(images))
        return logits

    @eager_outside
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the target's features on the dense grid, computed from the kept patches alone.

        No image exits, because budgets are computed with ``tau=None`` (see :class:`DropPolicy`).

        Args:
            images: as for a call.

        Returns:
            Features ``(batch, dim, rows, columns)`` after the final norm, as from ``forward_features``. A dropped patch
            has the features of the nearest kept patch. Also a mask, bool ``(batch, rows, columns)``. It is True where
            the patch was kept, or the patch of a coarser grid that covers it.

        Example:
            >>> model = tdk.patch(model, guidance, tdk.DropPolicy.fixed(0.5))
            >>> features, kept = model.tinydrop.features(images)
            >>> features.shape, kept.sum(dim=(1, 2)).tolist()
            (torch.Size([2, 192, 14, 14]), [98, 98])
        """
        self.check(images)
        policy = dataclasses.replace(self.policy, tau=None, blend=0.0, second_look=None)
        plan = steps.plan(self, images, policy=policy)
        indices, parts = plan.selection.indices, plan.parts
        tokens, packed = embed_parts(self.model, self.family, images, indices, plan.packed, parts)
        tokens, packed = self.family.encode(self.model, tokens, packed, parts, read_all=True)
        prefix = self.family.num_prefix_tokens(self.model)
        return features_in_place(tokens, packed, indices, parts, plan.levels[0], prefix)

    def report(self, call: Call | None = None) -> Report:
        """Return exits, kept patches and FLOPs of a call, and the seconds of each stage if they were timed.

        No model is run. To measure whether patching is faster, use :func:`tinydrop_kernels.benchmark`.

        Args:
            call: the call to report. The default is this thread's last call.

        Raises:
            RuntimeError: this thread has not called the model yet.

        Example:
            >>> model = tdk.patch(model, guidance, tdk.DropPolicy.fixed(0.5))
            >>> answers = model(images)
            >>> model.tinydrop.report().mean_keep
            0.5
        """
        call = self.last if call is None else call
        if call is None:
            raise RuntimeError("no image has gone through the patched model in this thread yet")
        guidance = self.guidance
        guidance_flops = count_flops(guidance.model, (guidance.in_chans, *guidance.input_size))
        return Report.of(call, self.family, self.model, guidance_flops)

    def refresh(self) -> None:
        """Discard the cached values that were computed from weights of either model, and all recorded CUDA graphs.

        Call it after writing to weights through ``.data``, because such writes cannot be noticed. Call it after
        training, too. Once a process has trained, nothing is cached until then, and every call takes longer.

        Example:
            >>> model = tdk.patch(model, guidance, tdk.DropPolicy.fixed(0.5))
            >>> model.pos_embed.data *= 2
            >>> model.tinydrop.refresh()
        """
        settle(self.model)
        settle(self.guidance)
        if self.graphs is not None:
            self.graphs.clear()
