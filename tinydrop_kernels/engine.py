"""A patched model at work: what to do with a batch, and doing it."""

import dataclasses
import threading
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tinydrop_kernels import ops
from tinydrop_kernels.answers import answers_of, in_doubt, log_probabilities
from tinydrop_kernels.callcheck import check_answers, check_images, check_policy
from tinydrop_kernels.compiling import for_any_size
from tinydrop_kernels.derived import settle
from tinydrop_kernels.families import Family, UnsupportedModelError, family_of, find_mismatch
from tinydrop_kernels.families.checks import hooks_on_packed_rows
from tinydrop_kernels.features import features_in_place
from tinydrop_kernels.flops import count_flops
from tinydrop_kernels.graphs import MOST_IMAGES, Graphs, has_graphs
from tinydrop_kernels.guidance import Guidance, Guided
from tinydrop_kernels.head import count_classes, linear_width
from tinydrop_kernels.images import Normalization
from tinydrop_kernels.ops import Packed, Part, Selection
from tinydrop_kernels.ops.packing import Packing, lay_out, pack_alike
from tinydrop_kernels.ops.registry import forced_backend
from tinydrop_kernels.ops.tracing import eager, eager_outside
from tinydrop_kernels.ops.types import Grid, TimmModule
from tinydrop_kernels.plan import Asked, Plan, Running
from tinydrop_kernels.policy import DropPolicy
from tinydrop_kernels.report import Call, Report
from tinydrop_kernels.target import embed_parts, through_target
from tinydrop_kernels.timing import timed_stage
from tinydrop_kernels.torch_internals import hooks_of, is_own
from tinydrop_kernels.watch import Watch

WAY_OUT = "run the model within tinydrop_kernels.dense(model), or unpatch it"


class TinyDrop:
    """What a patched model carries as ``model.tinydrop``; it may be called from many threads.

    Under ``torch.compile`` the models are compiled, and this is not: it decides by numbers that change from batch to
    batch, and would be compiled again for each.

    Attributes:
        guidance: the guidance model.
        policy: may be replaced between calls.
        num_classes: of the model's own answer, asked of its head; 0 where that is ``nn.Identity``. Not
            ``model.num_classes``, which stays what it was when a head is replaced by hand.
        multi_label: the head is one of sigmoids; no policy that mixes answers is taken.
        normalization: mean and standard deviation of each channel, as the images come.
        compiled: run the blocks through ``torch.compile``.
        graphs: the CUDA graphs that calls are replayed from, and how many were; None to do without.
        timed: measure the wall time of each stage of the next calls (synchronises the device at each).
    """

    set_attributes: list[tuple[nn.Module, str, object]]  # what patching has set on which module

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
        self._model = model
        self._family: Family = family_of(model)
        self.guidance = guidance
        self.multi_label = multi_label
        self.normalization = normalization
        self.policy = policy
        self.compiled = compiled
        self.graphs = graphs
        self.timed = False
        self._of_thread = threading.local()
        self._watch: Watch | None = None  # the model as it was inspected last
        self._guidance_watch: Watch | None = None
        self._levels: dict[Grid, list[Grid]] = {}
        self._warned: set[str] = set()  # names of modules

    def __getstate__(self) -> dict[str, Any]:
        ours_alone = ("_of_thread", "_watch", "_guidance_watch")
        return {name: value for name, value in vars(self).items() if name not in ours_alone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._of_thread = threading.local()
        self._watch = self._guidance_watch = None

    @property
    def policy(self) -> DropPolicy:
        """How much is dropped."""
        return self._policy

    @policy.setter
    def policy(self, policy: DropPolicy) -> None:
        if not isinstance(policy, DropPolicy):
            raise TypeError(f"policy: got {type(policy).__name__}, expected a DropPolicy")
        self._inspect_head()
        self._check_policy(policy)
        self._policy = policy

    def _inspect_head(self) -> None:
        """Find out how many classes the model's head has now."""
        self.num_classes = count_classes(self._model)

    @property
    def last(self) -> Call | None:
        """What happened in this thread's last call, or None before its first."""
        call: Call | None = getattr(self._of_thread, "last", None)
        return call

    def report(self) -> Report:
        """Exits, kept patches, FLOPs against dense and, when timed, seconds by stage, of this thread's last call.

        Nothing is run for it: :func:`timing.compare_with_dense` measures whether the patched model is faster.

        Raises:
            RuntimeError: there was no call yet.
        """
        call = self.last
        if call is None:
            raise RuntimeError("no image has gone through the patched model in this thread yet")
        guidance = self.guidance
        guidance_flops = count_flops(guidance.model, (guidance.in_chans, *guidance.input_size))
        return Report.of(call, self._family, self._model, guidance_flops)

    def refresh(self) -> None:
        """Forget everything that was computed from weights of the model and of the guidance, or recorded.

        Call it after weights were written through ``.data``, which cannot be noticed in a process that has not trained.
        Call it when training is over, too: until then, nothing that is computed from weights is kept between calls
        (:mod:`tinydrop_kernels.derived`).
        """
        settle(self._model)
        settle(self.guidance)
        if self.graphs is not None:
            self.graphs.clear()

    @property
    def is_dense(self) -> bool:
        """Whether this thread is within :func:`tinydrop_kernels.dense` of the model."""
        return getattr(self._of_thread, "is_dense", False)

    @is_dense.setter
    def is_dense(self, value: bool) -> None:
        self._of_thread.is_dense = value

    @eager_outside
    def __call__(self, images: Tensor) -> Tensor:
        """Answer images ``(batch, channels, height, width)``, normalised for the target: ``(batch, classes)``.

        Log-probabilities where the policy mixes answers, else the target's own logits; in the target's dtype.
        """
        self.check(images)
        if len(images) == 0:
            self._of_thread.last = None
            logits = self.dense(images)
            return log_probabilities(logits, logits.dtype) if self.policy.mixes_answers else logits
        return self.run(images, self.plan(images))

    def dense(self, images: Tensor) -> Tensor:
        """Return the model's own logits, with nothing dropped and nobody exiting."""
        logits: Tensor = self._model.forward_head(self._model.forward_features(images))
        return logits

    def guide(self, images: Tensor, policy: DropPolicy | None = None) -> Guided:
        """What the guidance model says of the images, which a plan is made from, by the model's policy or another."""
        guided: Guided = self.guidance(images, *self.normalization, (policy or self.policy).saliency)
        return guided

    @eager_outside
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The target's features of every patch, in place; an image that would exit is given the least budget instead.

        Args:
            images: as for a call.

        Returns:
            ``(batch, dim, rows, columns)`` on the dense grid, normed as ``forward_features`` leaves them: each kept
            patch's own, and in the place of a dropped one those of the nearest kept patch. Bool ``(batch, rows,
            columns)``: whether the patch, or the one of a coarser grid in its place, was kept.
        """
        self.check(images)
        policy = dataclasses.replace(self.policy, tau=None, blend=0.0, second_look=None)
        plan = self.plan(images, policy=policy)
        indices, parts = plan.selection.indices, plan.parts
        tokens, packed = embed_parts(self._model, self._family, images, indices, plan.packed, parts)
        tokens, packed = self._family.encode(self._model, tokens, packed, parts, read_all=True)
        prefix = self._family.num_prefix_tokens(self._model)
        return features_in_place(tokens, packed, indices, parts, plan.levels[0], prefix)

    @eager_outside
    def plan(self, images: Tensor, guided: Guided | None = None, policy: DropPolicy | None = None) -> Plan:
        """Ask the guidance model, unless that was done, and decide. Reads back once.

        Args:
            images: as for a call.
            guided: what :meth:`guide` said of them.
            policy: instead of the model's own.
        """
        return self.decide(self.ask(images, guided, policy))

    @eager_outside
    def ask(self, images: Tensor, guided: Guided | None = None, policy: DropPolicy | None = None) -> Asked:
        """The first half of :meth:`plan`, in which the host does not wait for a GPU."""
        if policy is not None:
            self._check_policy(policy)
        policy, seconds = policy or self.policy, dict[str, float]()
        levels = self.levels(self._family.grid_size(self._model, images))
        found = None
        if guided is None and len(images) <= MOST_IMAGES and self._replays(images):
            found = self._replay_front(images, policy, levels)
        logits, selection, packing = found or self._front(images, guided, policy, levels, seconds)
        return Asked(policy, logits, selection, packing, seconds)

    @eager_outside
    def _front(
        self, images: Tensor, guided: Guided | None, policy: DropPolicy, levels: list[Grid], seconds: dict[str, float]
    ) -> tuple[Tensor, Selection, Packing]:
        """Guidance, selection and packing; of the first its logits."""
        if guided is None:
            with self._stage(seconds, "guidance", images):
                guided = self.guide(images, policy)
        with self._stage(seconds, "select", images), torch.no_grad():
            if guided.saliency is not None:
                selection = ops.select_from_saliency(guided.logits, guided.saliency, levels, policy.law)
            else:
                assert guided.features is not None
                weight, size = self.guidance.class_weight, self.guidance.feature_size
                selection = ops.select_tokens(
                    guided.logits, guided.features, weight, size, levels, policy.law, policy.saliency
                )
        with self._stage(seconds, "pack", images):
            prefix = self._family.num_prefix_tokens(self._model)
            return guided.logits, selection, lay_out(selection.counts, selection.levels, levels, prefix)

    def _replay_front(
        self, images: Tensor, policy: DropPolicy, levels: list[Grid]
    ) -> tuple[Tensor, Selection, Packing] | None:
        guidance, prefix = self.guidance, self._family.num_prefix_tokens(self._model)
        if self.graphs is None or any(hooks_of(guidance)):
            return None
        watch = self._guidance_watch
        if watch is None or watch.model is not guidance or not (watch.same_parts() and watch.same_state()):
            watch = self._guidance_watch = Watch(guidance, lambda: (guidance.mean, guidance.std, guidance.input_size))
        self.graphs.front.check(watch)
        kind = (images.shape, images.dtype, policy.law, policy.saliency, guidance, self.normalization)
        return self.graphs.front.answer(  # type: ignore[no-any-return]
            (*kind, tuple(levels), prefix),
            lambda static: self._front(static, None, policy, levels, {}),
            lambda: (torch.zeros_like(images),),
            lambda static: static.copy_(images),
        )

    @eager_outside
    def decide(self, asked: Asked) -> Plan:
        """The second half of :meth:`plan`: reads back what the device has found."""
        policy, logits, selection, packing, seconds = asked
        if self.graphs is not None:
            self.graphs.blocks.check(self.check_model())  # while the device is still at work
        with self._stage(seconds, "pack", logits):
            packed, parts = packing.read()
        return Plan(policy, logits, selection, packing.grids, packed, parts, seconds)

    def levels(self, grid: Grid) -> list[Grid]:
        """Return the grids that an image of this dense one may have, dense first."""
        if grid not in self._levels:
            self._levels[grid] = self._family.levels(self._model, grid)
        return self._levels[grid]

    @eager_outside
    def run(self, images: Tensor, plan: Plan) -> Tensor:
        """Send what the plan keeps through the target, and answer: ``(batch, classes)``."""
        return self.finish(self.start(images, plan))

    @eager_outside
    def start(self, images: Tensor, plan: Plan) -> Running:
        """The first half of :meth:`run`, in which the host does not wait for a GPU."""
        logits = plan.guidance_logits
        if not plan.parts:
            kind = images.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else images.dtype
            return Running(images, plan, logits.new_empty(0, dtype=torch.long), logits[:0].to(dtype))
        staying = torch.cat([part.images for part in plan.parts]).long()
        reduced = self._through_target(images, plan.selection.indices, plan.packed, plan.parts, plan.seconds)
        check_answers(plan.policy, reduced, logits)
        return Running(images, plan, staying, answers_of(reduced, logits[staying], plan.policy))

    @eager_outside
    def finish(self, running: Running) -> Tensor:
        """The second half of :meth:`run`: a second look where the policy wants one, which reads back again."""
        images, plan, staying, answers = running
        second_look = torch.zeros_like(plan.selection.counts, dtype=torch.bool)
        bars = plan.policy.second_look if plan.parts else None
        if bars is not None:
            with self._stage(plan.seconds, "second look", images):
                answers, again = self._look_again(images, answers, staying, plan, bars)
            second_look[staying] = again
        if len(staying) < len(images):  # otherwise the guidance may know other classes
            exits = log_probabilities(plan.guidance_logits, answers.dtype)
        else:
            exits = torch.empty_like(answers)
        happened = (plan.selection, plan.levels, plan.guidance_logits, second_look, plan.seconds)
        self._of_thread.last = Call(*happened, read_backs=1 + (bars is not None))
        return exits.index_copy(0, staying, answers)

    @eager_outside
    def _through_target(
        self, images: Tensor, indices: Tensor, packed: Packed, parts: list[Part], seconds: dict[str, float]
    ) -> Tensor:
        """The target's logits for the images of the parts, one after the other: ``(segments, classes)``."""
        model, family = self._model, self._family
        encode = for_any_size(family.encode) if self.compiled else family.encode
        graphs = self.graphs.blocks if self.graphs is not None and self._replays(images) else None
        stage = partial(self._stage, seconds, images=images)
        return through_target(model, family, images, indices, packed, parts, encode, graphs, stage)

    @eager_outside
    def _look_again(
        self, images: Tensor, answers: Tensor, staying: Tensor, plan: Plan, bars: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        """Replace doubtful answers by dense ones; also which they were, bool ``(segments,)``. One more read-back."""
        guided, grid = plan.guidance_logits, plan.levels[0]
        dense = grid[0] * grid[1]
        again = (plan.selection.counts[staying] < dense) & in_doubt(answers, guided[staying], bars)
        doubtful = again.nonzero()[:, 0]
        if len(doubtful) == 0:
            return answers, again
        chosen = staying[doubtful]
        prefix = self._family.num_prefix_tokens(self._model)
        everything, packed, parts = pack_alike(len(chosen), dense, grid, prefix, images.device)
        logits = self._through_target(images[chosen], everything, packed, parts, {})
        return answers.index_copy(0, doubtful, answers_of(logits, guided[chosen], plan.policy)), again

    @eager
    def check(self, images: Tensor) -> None:
        """Raise before any work is done where the images, or what has become of the model, do not fit."""
        check_images(self._model, images)
        self.check_model()
        self._family.check_images(self._model, images)
        self._check_policy(self.policy)

    def _check_policy(self, policy: DropPolicy) -> None:
        check_policy(policy, self.num_classes, self.guidance.num_classes, self.multi_label)

    def check_model(self) -> Watch:
        """Inspect the model if something in it has changed since it was inspected last.

        Raises:
            UnsupportedModelError: it is no longer supported.
        """
        watch = self._watch
        if watch is not None and watch.same_parts() and watch.same_state() and watch.same_hooks():
            return watch
        is_tried = watch is not None and watch.same_parts()
        self._refuse_changes(is_tried)
        if watch is None or not (is_tried and watch.same_state()):
            return self.remember()
        watch.note_hooks()  # the same watch still, since graphs outlive hooks that come and go
        self._warn_of_packed_rows()
        return watch

    def _refuse_changes(self, is_tried: bool) -> None:
        model, family = self._model, self._family
        self._inspect_head()
        reason = family.unsupported_reason(model)
        if not (reason or all(is_own(vars(attention).get("forward")) for attention in family.attentions(model))):
            reason = "an attention that was replaced"
        if not (reason or is_tried):
            with torch.inference_mode(), torch.autocast(next(model.parameters()).device.type, enabled=False):
                reason = find_mismatch(family, model)
        if reason:
            new = [] if self._watch is None else self._watch.new_parts()
            reason = f"{', '.join(new)} exchanged, and {reason}" if new else reason
            raise UnsupportedModelError(f"model: since it was patched, it has {reason}; undo that, or {WAY_OUT}")
        self._levels = {}

    def remember(self) -> Watch:
        """Take the model as it is for inspected."""
        self._warn_of_packed_rows()
        self._watch = Watch(self._model, self._settings)
        return self._watch

    def _settings(self) -> tuple[Any, ...]:
        return self._family.settings(self._model), linear_width(self._model)

    def _warn_of_packed_rows(self) -> None:
        """Warn once of each module whose hooks see other shapes than in timm."""
        names = [name for name in hooks_on_packed_rows(self._model) if name not in self._warned]
        if names:
            self._warned.update(names)
            warnings.warn(
                f"hooks on {', '.join(names)} of a patched model are handed packed rows, (tokens of all images, dim), "
                f"where timm hands (batch, tokens, dim); to see what timm would hand them, {WAY_OUT}",
                stacklevel=2,
            )

    def _replays(self, images: Tensor) -> bool:
        """Whether graphs could take the call: they hold no gradients, no autocast, no stages; references read back."""
        kind = images.device.type
        is_reference = images.dtype == torch.float64 or forced_backend() == "reference"
        asks_for_more = self.timed or torch.is_grad_enabled() or torch.is_autocast_enabled(kind)
        return self.graphs is not None and has_graphs(kind) and not (is_reference or asks_for_more)

    def _stage(self, seconds: dict[str, float], name: str, images: Tensor) -> AbstractContextManager[None]:
        return timed_stage(seconds, name, images.device) if self.timed else nullcontext()
