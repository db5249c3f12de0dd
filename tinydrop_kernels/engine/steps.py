"""The four steps from a batch of images to its answers.

1. :func:`ask`: the guidance model classifies the images. Its confidence decides which images exit, and how many patches
   each other image keeps. Its saliency map decides which patches those are.
2. :func:`decide`: the host reads the sizes of the packed batch from the device.
3. :func:`start`: the kept tokens of all images go through the target together. The target's answers are blended with
   the guidance model's.
4. :func:`finish`: images with a doubtful answer go through the target again, dense. An image that exits gets the
   guidance model's answer.

A :class:`~tinydrop_kernels.engine.Pipeline` runs step 1 of a batch beside step 3 of the batch before. ``torch.compile``
compiles the models but not these functions, because they depend on numbers that differ from batch to batch.
Otherwise they would be compiled again for each batch.

Source: TinyDrop, arXiv 2509.03379, for exit, budget and saliency; grids, blend and second look are ours.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from tinydrop_kernels import ops
from tinydrop_kernels.engine.checks import check_answers
from tinydrop_kernels.engine.cuda_graphs import MOST_IMAGES, has_graphs
from tinydrop_kernels.engine.plan import BatchPlan, PendingPlan, RunningBatch
from tinydrop_kernels.engine.state import PatchedState
from tinydrop_kernels.engine.stopwatch import timed_stage
from tinydrop_kernels.engine.target import run_target
from tinydrop_kernels.engine.watch import Watch
from tinydrop_kernels.guidance.model import GuidanceOutput
from tinydrop_kernels.ops import Packed, Part, Selection
from tinydrop_kernels.ops.packing import Packing, lay_out, pack_alike
from tinydrop_kernels.ops.registry import forced_backend
from tinydrop_kernels.ops.types import Grid
from tinydrop_kernels.policy import DropPolicy
from tinydrop_kernels.policy.blend import combined_answers, in_doubt, log_probabilities
from tinydrop_kernels.report import Call
from tinydrop_kernels.torch_internals import eager_outside, hooks_of


@eager_outside
def classify(state: PatchedState, images: Tensor) -> Tensor:
    """Return the answers ``(batch, classes)`` for checked images, and record the call in ``state.last``."""
    plan = decide(state, ask(state, images))
    return finish(state, start(state, images, plan))


@eager_outside
def ask(
    state: PatchedState, images: Tensor, guided: GuidanceOutput | None = None, policy: DropPolicy | None = None
) -> PendingPlan:
    """Run guidance, selection and packing. On a GPU the host does not wait for them.

    Args:
        state: the patched model's ``tinydrop``.
        images: checked images ``(batch, channels, height, width)``.
        guided: the guidance model's output for these images, if it was computed before.
        policy: the policy to use in place of ``state.policy``.

    Raises:
        ValueError: the policy mixes answers that cannot be mixed.
    """
    if policy is not None:
        state.check_policy(policy)
    policy, seconds = policy or state.policy, dict[str, float]()
    levels = state.levels(state.family.grid_size(state.model, images))
    replayed = None
    if guided is None and len(images) <= MOST_IMAGES and _can_replay(state, images):
        replayed = _replay_front(state, images, policy, levels)
    logits, selection, packing = replayed or _front(state, images, guided, policy, levels, seconds)
    return PendingPlan(policy, logits, selection, packing, seconds)


@eager_outside
def decide(state: PatchedState, pending: PendingPlan) -> BatchPlan:
    """Read back the sizes of the packed batch. The host waits for them."""
    policy, logits, selection, packing, seconds = pending
    if state.graphs is not None:
        state.graphs.blocks.check(state.check_model())  # before the read-back, while the device is at work
    with _stage(state, seconds, "pack", logits):
        packed, parts = packing.read()
    return BatchPlan(policy, logits, selection, packing.grids, packed, parts, seconds)


@eager_outside
def start(state: PatchedState, images: Tensor, plan: BatchPlan) -> RunningBatch:
    """Run the target on the kept tokens. On a GPU the host does not wait for it."""
    logits = plan.guidance_logits
    if not plan.parts:
        kind = images.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else images.dtype
        return RunningBatch(images, plan, logits.new_empty(0, dtype=torch.long), logits[:0].to(dtype))
    staying = torch.cat([part.images for part in plan.parts]).long()
    reduced = _through_target(state, images, plan.selection.indices, plan.packed, plan.parts, plan.seconds)
    check_answers(plan.policy, reduced, logits)
    return RunningBatch(images, plan, staying, combined_answers(reduced, logits[staying], plan.policy))


@eager_outside
def finish(state: PatchedState, running: RunningBatch) -> Tensor:
    """Return the answers of all images in order, after a second look if the policy has one. That reads back again."""
    images, plan, staying, answers = running
    second_look = torch.zeros_like(plan.selection.counts, dtype=torch.bool)
    thresholds = plan.policy.second_look if plan.parts else None
    if thresholds is not None:
        with _stage(state, plan.seconds, "second look", images):
            answers, again = _look_again(state, images, answers, staying, plan, thresholds)
        second_look[staying] = again
    if len(staying) < len(images):
        exits = log_probabilities(plan.guidance_logits, answers.dtype)
    else:  # every row is overwritten below, and the guidance model may have another number of classes
        exits = torch.empty_like(answers)
    state.last = Call(
        selection=plan.selection,
        levels=plan.levels,
        guidance_logits=plan.guidance_logits,
        second_look=second_look,
        seconds=plan.seconds,
        read_backs=1 + (thresholds is not None),
    )
    return exits.index_copy(0, staying, answers)


def plan(
    state: PatchedState, images: Tensor, guided: GuidanceOutput | None = None, policy: DropPolicy | None = None
) -> BatchPlan:
    """Run :func:`ask` and :func:`decide`."""
    return decide(state, ask(state, images, guided, policy))


def run(state: PatchedState, images: Tensor, plan: BatchPlan) -> Tensor:
    """Run :func:`start` and :func:`finish`."""
    return finish(state, start(state, images, plan))


def guide(state: PatchedState, images: Tensor, policy: DropPolicy | None = None) -> GuidanceOutput:
    """Run the guidance model on images that are normalised for the target."""
    guided: GuidanceOutput = state.guidance(images, *state.normalization, (policy or state.policy).saliency)
    return guided


@eager_outside
def _front(
    state: PatchedState,
    images: Tensor,
    guided: GuidanceOutput | None,
    policy: DropPolicy,
    levels: list[Grid],
    seconds: dict[str, float],
) -> tuple[Tensor, Selection, Packing]:
    """Return the guidance model's logits, the selection and the layout of the packed batch."""
    if guided is None:
        with _stage(state, seconds, "guidance", images):
            guided = guide(state, images, policy)
    with _stage(state, seconds, "select", images), torch.no_grad():
        if guided.saliency is not None:
            selection = ops.select_from_saliency(guided.logits, guided.saliency, levels, policy.law)
        else:
            assert guided.features is not None
            weight, size = state.guidance.class_weight, state.guidance.feature_size
            selection = ops.select_tokens(
                guided.logits, guided.features, weight, size, levels, policy.law, policy.saliency
            )
    with _stage(state, seconds, "pack", images):
        prefix = state.family.num_prefix_tokens(state.model)
        return guided.logits, selection, lay_out(selection.counts, selection.levels, levels, prefix)


def _replay_front(
    state: PatchedState, images: Tensor, policy: DropPolicy, levels: list[Grid]
) -> tuple[Tensor, Selection, Packing] | None:
    """Return the result of :func:`_front` from a CUDA graph; None if no graph can serve this call."""
    guidance, prefix = state.guidance, state.family.num_prefix_tokens(state.model)
    if state.graphs is None or any(hooks_of(guidance)):
        return None
    watch = state.guidance_watch
    if watch is None or watch.model is not guidance or not (watch.same_parts() and watch.same_state()):
        watch = state.guidance_watch = Watch(guidance, lambda: (guidance.mean, guidance.std, guidance.input_size))
    state.graphs.front.check(watch)
    kind = (images.shape, images.dtype, policy.law, policy.saliency, guidance, state.normalization)
    return state.graphs.front.answer(  # type: ignore[no-any-return]
        (*kind, tuple(levels), prefix),
        lambda static: _front(state, static, None, policy, levels, {}),
        lambda: (torch.zeros_like(images),),
        lambda static: static.copy_(images),
    )


@eager_outside
def _through_target(
    state: PatchedState, images: Tensor, indices: Tensor, packed: Packed, parts: list[Part], seconds: dict[str, float]
) -> Tensor:
    """Return the target's logits ``(segments, classes)`` for the images of all parts, in the order of the parts."""
    graphs = state.graphs.blocks if state.graphs is not None and _can_replay(state, images) else None
    stage = partial(_stage, state, seconds, images=images)
    return run_target(state.model, state.family, images, indices, packed, parts, state.compiled, graphs, stage)


@eager_outside
def _look_again(
    state: PatchedState,
    images: Tensor,
    answers: Tensor,
    staying: Tensor,
    plan: BatchPlan,
    thresholds: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Replace doubtful answers by dense ones, with one read-back.

    Returns:
        The answers, and which were replaced, bool ``(segments,)``.
    """
    guided, grid = plan.guidance_logits, plan.levels[0]
    dense = grid[0] * grid[1]
    again = (plan.selection.counts[staying] < dense) & in_doubt(answers, guided[staying], thresholds)
    doubtful = again.nonzero()[:, 0]
    if len(doubtful) == 0:
        return answers, again
    chosen = staying[doubtful]
    prefix = state.family.num_prefix_tokens(state.model)
    everything, packed, parts = pack_alike(len(chosen), dense, grid, prefix, images.device)
    logits = _through_target(state, images[chosen], everything, packed, parts, {})
    return answers.index_copy(0, doubtful, combined_answers(logits, guided[chosen], plan.policy)), again


def _can_replay(state: PatchedState, images: Tensor) -> bool:
    """Return whether CUDA graphs may serve the call.

    A graph cannot hold gradients, autocast or the timing of stages. Nor can it hold the read-backs of the reference
    implementations.
    """
    kind = images.device.type
    is_reference = images.dtype == torch.float64 or forced_backend() == "reference"
    asks_for_more = state.timed or torch.is_grad_enabled() or torch.is_autocast_enabled(kind)
    return state.graphs is not None and has_graphs(kind) and not (is_reference or asks_for_more)


def _stage(state: PatchedState, seconds: dict[str, float], name: str, images: Tensor) -> AbstractContextManager[None]:
    return timed_stage(seconds, name, images.device) if state.timed else nullcontext()
