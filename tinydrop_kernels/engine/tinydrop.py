"""``model.tinydrop``: what a user of a patched model can read, change and call."""

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
    """The ``tinydrop`` attribute of a patched model. Many threads may call the model at once.

    Attributes:
        guidance: the guidance model.
        policy: the :class:`DropPolicy`; it may be replaced between calls.
        last: the :class:`~tinydrop_kernels.report.Call` that this thread made last; None before its first call.
        num_classes: width of the model's head; 0 if it is ``nn.Identity``. ``model.num_classes`` may be stale, because
            it does not change when a head is replaced by hand.
        multi_label: the head is one of sigmoids; policies that mix answers are refused.
        normalization: mean and standard deviation of each channel of the images.
        compiled: the target's blocks run through ``torch.compile``.
        graphs: CUDA graphs that calls are replayed from; None if there are none.
        timed: measure the wall time of each stage of the next calls. The host then waits for the device at each stage.

    Example:
        >>> import timm, torch, tinydrop_kernels as tdk
        >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
        >>> guidance = timm.create_model("test_byobnet", num_classes=10)
        >>> tdk.patch(model, guidance, tdk.DropPolicy.fixed(0.5)).tinydrop.last is None
        True
        >>> with torch.inference_mode():
        ...     answers = model(torch.randn(2, 3, 224, 224))
        >>> model.tinydrop.last.counts.tolist()
        [98, 98]
    """

    @eager_outside
    def __call__(self, images: Tensor) -> Tensor:
        """Return the answers ``(batch, classes)`` for images, in the target's dtype.

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
        """Return the target's own logits with every patch kept and no exits."""
        logits: Tensor = self.model.forward_head(self.model.forward_features(images))
        return logits

    @eager_outside
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the target's features on the dense grid. An image that would exit is given the smallest budget.

        Args:
            images: as for a call.

        Returns:
            ``(batch, dim, rows, columns)``, normed as ``forward_features`` leaves them. A kept patch has its own
            features; a dropped patch has those of the nearest kept patch. Also bool ``(batch, rows, columns)``: whether
            the patch was kept, or the patch of a coarser grid that covers it.
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
        """Return exits, kept patches and FLOPs against dense, and seconds by stage if they were timed.

        Nothing is run. :func:`tinydrop_kernels.benchmark` measures whether the patched model is faster.

        Args:
            call: what to report; by default this thread's last call.

        Raises:
            RuntimeError: there was no call yet.
        """
        call = self.last if call is None else call
        if call is None:
            raise RuntimeError("no image has gone through the patched model in this thread yet")
        guidance = self.guidance
        guidance_flops = count_flops(guidance.model, (guidance.in_chans, *guidance.input_size))
        return Report.of(call, self.family, self.model, guidance_flops)

    def refresh(self) -> None:
        """Forget everything that was computed from weights of the target and of the guidance model, or recorded.

        Call it after weights were written through ``.data``, which goes unnoticed in a process that has not trained.
        Call it after training, too: until then nothing computed from weights is kept between calls.
        """
        settle(self.model)
        settle(self.guidance)
        if self.graphs is not None:
            self.graphs.clear()
