"""The state of a patched model, and the checks that the model is still the one that was patched."""

import threading
import warnings
from typing import Any

import torch
from torch import Tensor

from tinydrop_kernels.engine.attributes import InstanceAttributes
from tinydrop_kernels.engine.checks import check_images, check_policy
from tinydrop_kernels.engine.cuda_graphs import Graphs
from tinydrop_kernels.engine.head import count_classes, linear_width
from tinydrop_kernels.engine.watch import Watch
from tinydrop_kernels.families import Family, UnsupportedModelError, family_of, find_mismatch
from tinydrop_kernels.families.checks import hooks_on_packed_rows
from tinydrop_kernels.guidance import Guidance
from tinydrop_kernels.normalization import Normalization
from tinydrop_kernels.ops.derived import forget
from tinydrop_kernels.ops.types import Grid, TimmModule
from tinydrop_kernels.policy import DropPolicy
from tinydrop_kernels.report import Call
from tinydrop_kernels.torch_internals import eager, is_own

WAY_OUT = "run the model within tinydrop_kernels.dense(model), or unpatch it"


class PatchedState:
    """The settings of a patched model, and the results of its last inspection.

    Args:
        model: the target.
        guidance: the guidance model.
        policy: see :class:`DropPolicy`.
        compiled: run the target's blocks through ``torch.compile``.
        graphs: CUDA graphs to replay calls from; None if CUDA graphs are off.
        multi_label: the head is one of sigmoids.
        normalization: mean and standard deviation of each channel of the images.

    Raises:
        ValueError: the policy mixes answers that cannot be mixed.
        UnsupportedModelError: the model's family is not supported, or its head does not answer ``(batch, classes)``.
    """

    attributes: InstanceAttributes  # set by patching on the model's modules

    def __init__(
        self,
        model: TimmModule,
        guidance: Guidance,
        policy: DropPolicy,
        compiled: bool,
        graphs: Graphs | None,
        multi_label: bool,
        normalization: Normalization,
    ):
        self.model = model
        self.family: Family = family_of(model)
        self.guidance = guidance
        self.multi_label = multi_label
        self.normalization = normalization
        self.policy = policy
        self.compiled = compiled
        self.graphs = graphs
        self.timed = False
        self.guidance_watch: Watch | None = None
        self._watch: Watch | None = None  # the model as it was inspected last
        self._levels: dict[Grid, list[Grid]] = {}
        self._warned: set[str] = set()  # names of modules that a warning was given for
        self._of_thread = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_of_thread", "_watch", "guidance_watch")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._of_thread = threading.local()
        self._watch = self.guidance_watch = None

    @property
    def policy(self) -> DropPolicy:
        """The policy of the next calls. You may replace it between calls."""
        return self._policy

    @policy.setter
    def policy(self, policy: DropPolicy) -> None:
        if not isinstance(policy, DropPolicy):
            raise TypeError(f"policy: got {type(policy).__name__}, expected a DropPolicy")
        self.inspect_head()
        self.check_policy(policy)
        self._policy = policy

    @property
    def last(self) -> Call | None:
        """The record of this thread's last call; None before its first call."""
        call: Call | None = getattr(self._of_thread, "last", None)
        return call

    @last.setter
    def last(self, call: Call | None) -> None:
        self._of_thread.last = call

    @property
    def is_dense(self) -> bool:
        """True while this thread is within :func:`tinydrop_kernels.dense` of the model."""
        return getattr(self._of_thread, "is_dense", False)

    @is_dense.setter
    def is_dense(self, value: bool) -> None:
        self._of_thread.is_dense = value

    def levels(self, grid: Grid) -> list[Grid]:
        """Return the grids that an image with this dense grid may be resized to, dense first."""
        if grid not in self._levels:
            self._levels[grid] = self.family.levels(self.model, grid)
        return self._levels[grid]

    def inspect_head(self) -> None:
        """Read the number of classes from the model's head."""
        self.num_classes = count_classes(self.model)

    @eager
    def check(self, images: Tensor) -> None:
        """Raise an error, before any work is done, if the images do not fit or the model is no longer supported."""
        check_images(self.model, images)
        self.check_model()
        self.family.check_images(self.model, images)
        self.check_policy(self.policy)

    def check_policy(self, policy: DropPolicy) -> None:
        """Raise ValueError if the policy mixes the answers of the two models and they cannot be mixed."""
        check_policy(policy, self.num_classes, self.guidance.num_classes, self.multi_label)

    def check_model(self) -> Watch:
        """Inspect the model again if something in it has changed since the last inspection.

        Returns:
            The watch on the model as it is now.

        Raises:
            UnsupportedModelError: the model is no longer supported.
        """
        watch = self._watch
        if watch is not None and watch.same_parts() and watch.same_state() and watch.same_hooks():
            return watch
        is_tried = watch is not None and watch.same_parts()
        self._refuse_changes(is_tried)
        if watch is None or not (is_tried and watch.same_state()):
            return self.remember()
        watch.note_hooks()  # keep the watch, because a new one would discard the CUDA graphs; hooks do not outdate them
        self._warn_of_packed_rows()
        return watch

    def remember(self) -> Watch:
        """Record that the model as it is now has been inspected, and return the new watch on it."""
        self._warn_of_packed_rows()
        self._watch = Watch(self.model, self._settings)
        return self._watch

    def _refuse_changes(self, is_tried: bool) -> None:
        model, family = self.model, self.family
        self.inspect_head()
        reason = family.unsupported_reason(model)
        if not (reason or all(is_own(vars(attention).get("forward")) for attention in family.attentions(model))):
            reason = "an attention that was replaced"
        if not (reason or is_tried):
            forget(model)  # the values were computed by modules that may have been exchanged
            with torch.inference_mode(), torch.autocast(next(model.parameters()).device.type, enabled=False):
                reason = find_mismatch(family, model)
        if reason:
            new = [] if self._watch is None else self._watch.new_parts()
            reason = f"{', '.join(new)} exchanged, and {reason}" if new else reason
            raise UnsupportedModelError(f"model: since it was patched, it has {reason}; undo that, or {WAY_OUT}")
        self._levels = {}

    def _settings(self) -> tuple[Any, ...]:
        return self.family.settings(self.model), linear_width(self.model)

    def _warn_of_packed_rows(self) -> None:
        """Warn, once per module, that hooks are given other shapes than in timm."""
        names = [name for name in hooks_on_packed_rows(self.model) if name not in self._warned]
        if names:
            self._warned.update(names)
            warnings.warn(
                f"hooks on {', '.join(names)} of a patched model are given packed rows, (tokens of all images, dim), "
                f"instead of timm's (batch, tokens, dim); for timm's shapes, {WAY_OUT}",
                stacklevel=2,
            )
