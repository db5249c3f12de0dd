"""Replayed calls answer as other calls do. Without a GPU, a replay runs the stage on its inputs again."""

import copy
import pickle
import threading
from contextlib import contextmanager

import pytest
import torch
from helpers import tiny_guidance, tiny_vit, varied_images
from recording import Again, replay_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode

import tinydrop_kernels as tdk
from tinydrop_kernels import ops
from tinydrop_kernels.engine import cuda_graphs as graphs
from tinydrop_kernels.engine.buckets import Bucket
from tinydrop_kernels.ops import Packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = tdk.DropPolicy(0.6, 1.0, 0.1, 0.5, blend=0.2, second_look=None)


@pytest.fixture(autouse=True)
def replaying(monkeypatch):
    if DEVICE == "cpu":
        replay_on_cpu(monkeypatch)


def patched(policy=MIXED, **options):
    model = tdk.patch(tiny_vit(**options).to(DEVICE), tiny_guidance(), policy, graphs=True)
    make_as_sure_as_bright(model.tinydrop.guidance)
    return model


def make_as_sure_as_bright(guidance):
    """Make the guidance model's confidence depend on an image's brightness alone, so that the batch does not matter."""

    def forward(images, *others):
        guided = tdk.Guidance.forward(guidance, images, *others)
        logits = torch.zeros_like(guided.logits)
        logits[:, 0] = 3 * images.mean(dim=(1, 2, 3)).sigmoid()
        return guided._replace(logits=logits)

    guidance.forward = forward


def images_of(number):
    return varied_images(number).to(DEVICE)


@contextmanager
def without_graphs(model):
    kept, model.tinydrop.graphs = model.tinydrop.graphs, None
    yield
    model.tinydrop.graphs = kept


def assert_same(model, images):
    """Assert that the model answers the same with and without graphs."""
    found = model(images)
    with without_graphs(model):
        torch.testing.assert_close(found, model(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_pool": "avg", "reg_tokens": 2},
        {"global_pool": "map", "class_token": False},
        {"global_pool": "max", "class_token": False},
    ],
    ids=["token", "avg", "map without class token", "max without class token"],
)
@pytest.mark.parametrize("second_look", [None, (0.99, 0.99)], ids=["once", "second look"])
@torch.inference_mode()
def test_same_answers(options, second_look):
    """Batch sizes, exits, grids and counts change from batch to batch, and answers stay those without graphs."""
    model = patched(tdk.DropPolicy(0.6, 1.0, 0.1, 0.5, blend=0.2, second_look=second_look), **options)
    exited = looked = 0
    for number in 5 * (1, 3, 8, 5):
        assert_same(model, images_of(number))
        exited += int(model.tinydrop.last.exited.sum())
        looked += int(model.tinydrop.last.second_look.sum())
    assert model.tinydrop.graphs.front.replayed == 16 and model.tinydrop.graphs.blocks.replayed >= 8
    assert 0 < exited and (looked > 0) == (second_look is not None)


@torch.inference_mode()
def test_what_a_call_left_behind_stays():
    """A later call overwrites the graph's own outputs, but not the tensors that an earlier call returned."""
    model = patched()
    for _ in range(3):
        first = model(images_of(4))
    call = model.tinydrop.last
    handed_out = (first, *call.selection, call.guidance_logits)
    kept = [tensor.clone() for tensor in handed_out]
    model(images_of(4))
    assert model.tinydrop.graphs.front.replayed == 3
    assert all(map(torch.equal, handed_out, kept))


class Launches(TorchDispatchMode):
    """A counter of launched operators. A replay counts as one."""

    def __init__(self):
        super().__init__()
        self.number, self.within = 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += not self.within
        return function(*args, **(kwargs or {}))


@torch.inference_mode()
def test_a_replayed_call_takes_few_launches(monkeypatch):
    """A replayed call of a deep model takes fewer than 60 launches, and dense takes more."""
    launches = Launches()

    class AtOnce(Again):
        def record(self, stage, inputs):
            recording = super().record(stage, inputs)

            def replay():
                launches.number, launches.within = launches.number + 1, True
                recording.replay()
                launches.within = False

            return recording._replace(replay=replay)

    replay_on_cpu(monkeypatch, AtOnce)
    model, images = patched(tdk.DropPolicy.fixed(0.25, coarsen=0.5), depth=12), images_of(1)
    for _ in range(2):
        model(images)
    with launches:
        model(images)
        replayed, launches.number = launches.number, 0
        model.tinydrop.dense(images)
        dense, launches.number = launches.number, 0
        with without_graphs(model):
            model(images)
    assert replayed < 60 < dense < launches.number  # these numbers include views


@torch.inference_mode()
def test_another_policy_guidance_or_size_is_another_kind():
    model = patched()
    images = images_of(4)
    for _ in range(3):
        model(images)
    model.tinydrop.policy = tdk.DropPolicy(0.9, 0.5, 0.3, 0.0, blend=0.0, second_look=None)
    for _ in range(3):
        assert_same(model, images)
    model.tinydrop.guidance = tdk.Guidance(tiny_guidance(sharpness=1.0)).to(DEVICE)
    make_as_sure_as_bright(model.tinydrop.guidance)
    for _ in range(3):
        assert_same(model, images)
    assert model.tinydrop.graphs.front.recorded == 3


def patched_for_good(model):
    """Remove the guidance model's ``forward`` on the instance, because a local function cannot be pickled."""
    del model.tinydrop.guidance.forward
    return model


CHANGES = {
    "data": lambda model: setattr(model.blocks[0].mlp.fc1.weight, "data", model.blocks[0].mlp.fc1.weight * 2),
    "parameter": lambda model: setattr(
        model.blocks[0].attn.proj, "weight", torch.nn.Parameter(model.blocks[0].attn.proj.weight * 2)
    ),
    "module": lambda model: setattr(model.blocks[1].mlp, "act", torch.nn.Tanh()),
    "forward": lambda model: setattr(model.blocks[1].mlp, "forward", lambda x: 2 * x),
    "loaded": lambda model: model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}, assign=True),
    "mode": lambda model: model.blocks[0].mlp.drop1.train(),
    "dtype and back": lambda model: model.double().float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_what_becomes_of_the_model_is_seen(change):
    """Graphs are recorded again after a change. Only the counts show it here, because these replays run Python code."""
    model = patched(tdk.DropPolicy.fixed(0.5))
    images = images_of(4)
    for _ in range(3):
        model(images)
    assert model.tinydrop.graphs.blocks.recorded == 1
    change(model)
    for _ in range(3):
        assert_same(model, images)
    assert model.tinydrop.graphs.blocks.recorded == 2
    assert model.tinydrop.graphs.front.recorded == (2 if change is CHANGES["dtype and back"] else 1)


@torch.no_grad()
def test_what_is_changed_in_place_needs_no_other_graph():
    model = patched(tdk.DropPolicy.fixed(0.5))
    images = images_of(4)
    for _ in range(3):
        before = model(images)
    model.blocks[0].mlp.fc1.weight.mul_(2)
    assert_same(model, images)
    assert model.tinydrop.graphs.blocks.recorded == 1 and not torch.allclose(model(images), before, atol=1e-3)


@torch.no_grad()
def test_what_becomes_of_the_guidance_is_seen():
    model = patched()
    images = images_of(4)
    for _ in range(3):
        model(images)
    for parameter in model.tinydrop.guidance.model.parameters():
        parameter.data = parameter * 2
    for _ in range(3):
        assert_same(model, images)
    assert model.tinydrop.graphs.front.recorded == 2 and model.tinydrop.graphs.blocks.recorded == 1


@pytest.mark.parametrize("name", ["class_weight", "mean"])
@torch.no_grad()
def test_what_the_guidance_is_beside_its_model_is_seen(name):
    """A graph also holds the rows of the guidance model's head and its mean, so changes of them are noticed too."""
    model, images = patched(), images_of(4)
    for _ in range(3):
        model(images)
    guidance = model.tinydrop.guidance
    setattr(guidance, name, guidance.class_weight * 2 if name == "class_weight" else (0.1, 0.2, 0.3))
    for _ in range(3):
        assert_same(model, images)
    assert model.tinydrop.graphs.front.recorded == 2 and model.tinydrop.graphs.blocks.recorded == 1


@torch.no_grad()
def test_another_guidance_is_watched_in_its_turn():
    model, images = patched(), images_of(4)
    for _ in range(3):
        model(images)
    model.tinydrop.guidance = tdk.Guidance(tiny_guidance()).to(DEVICE)
    for _ in range(3):
        model(images)
    assert model.tinydrop.graphs.front.recorded == 2
    for parameter in model.tinydrop.guidance.model.parameters():
        parameter.data = parameter * 2
    for _ in range(3):
        assert_same(model, images)
    assert model.tinydrop.graphs.front.recorded == 3


@torch.inference_mode()
def test_hooks_are_run_at_every_call():
    """While there are hooks, calls run without graphs. After the hooks are removed, calls are replayed again."""
    model, images, seen = patched(tdk.DropPolicy.fixed(0.5)), images_of(4), []
    for _ in range(3):
        model(images)
    front, blocks = model.tinydrop.graphs.front, model.tinydrop.graphs.blocks
    replayed = front.replayed, blocks.replayed
    handles = [
        model.blocks[0].mlp.register_forward_hook(lambda *_: seen.append("mlp")),
        model.tinydrop.guidance.register_forward_hook(lambda *_: seen.append("guidance")),
    ]
    for _ in range(3):
        model(images)
    assert seen == ["guidance", "mlp"] * 3 and (front.replayed, blocks.replayed) == replayed
    for handle in handles:
        handle.remove()
    model(images)
    assert (front.replayed, blocks.replayed) == (replayed[0] + 1, replayed[1] + 1)


@torch.inference_mode()
def test_another_backend_is_another_kind():
    model, images = patched(), images_of(2)
    for _ in range(3):
        model(images)
    front = model.tinydrop.graphs.front
    with ops.use_backend("reference"):  # the reference reads back, so it runs without graphs
        for _ in range(3):
            model(images)
    assert (front.recorded, front.replayed, front.not_replayed) == (1, 2, 1)


@torch.inference_mode()
def test_memory_is_bounded(monkeypatch):
    """Only the least recently used graph is discarded."""
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    model = patched()
    for number in (1, 1, 2, 1, 3, 2, 1, 1):
        model(images_of(number))
        assert len(model.tinydrop.graphs.front._found) <= 2 and len(model.tinydrop.graphs.blocks._found) <= 2
    front = model.tinydrop.graphs.front
    assert (front.recorded, front.replayed, front.not_replayed) == (2, 3, 5)
    assert str(front) == "2 recorded, 3 calls replayed, 5 not" and str(front) in str(model.tinydrop.graphs)


@torch.inference_mode()
def test_large_batches_go_without(monkeypatch):
    monkeypatch.setattr("tinydrop_kernels.engine.steps.MOST_IMAGES", 3)
    monkeypatch.setattr("tinydrop_kernels.engine.target.MOST_ROWS", 3)
    model = patched()
    for _ in range(3):
        model(images_of(4))
    assert not model.tinydrop.graphs.front._found and not model.tinydrop.graphs.blocks._found


def test_gradients_autocast_and_timing_go_without():
    model = patched()
    images = images_of(4)
    for _ in range(3):
        assert model(images).requires_grad
    with torch.no_grad():
        for _ in range(3):
            with torch.autocast(DEVICE, torch.bfloat16):
                model(images)
        model.tinydrop.timed = True
        model(images)
        assert "blocks" in model.tinydrop.report().seconds
    assert not model.tinydrop.graphs.front._found and not model.tinydrop.graphs.blocks._found


@torch.inference_mode()
def test_copies_and_pickles_begin_anew():
    model = patched_for_good(patched())
    images = images_of(3)
    for _ in range(3):
        answer = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert str(other.tinydrop.graphs.front) == "0 recorded, 0 calls replayed, 0 not"
        torch.testing.assert_close(other(images), answer)
    tdk.unpatch(model)
    assert not hasattr(model, "tinydrop")


def test_many_threads():
    """Threads with different images share all graphs and get the right answers."""
    model = patched()
    batches = [images_of(4) for _ in range(6)]
    with torch.inference_mode(), without_graphs(model):
        wanted = [model(batch) for batch in batches]
    wrong: list[object] = []

    def work(mine: int) -> None:
        try:
            with torch.inference_mode():
                for _ in range(10):
                    found = model(batches[mine])
                    if not torch.allclose(found, wanted[mine], atol=1e-4):
                        wrong.append(mine)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and model.tinydrop.graphs.front.replayed > 40


@torch.inference_mode()
def test_what_cannot_be_recorded_is_told(monkeypatch):
    model = patched()
    images = images_of(2)
    model(images)

    def fail(*arguments):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "Recorder", fail)
    with pytest.raises(RuntimeError, match="^graphs: no CUDA graph can hold this model; patch it without: operation"):
        model(images)


def test_no_graphs_on_a_cpu(monkeypatch):
    monkeypatch.setattr(graphs, "DEVICES", ("cuda",))
    with pytest.raises(ValueError, match="^graphs: got a model on cpu, expected one on a GPU"):
        tdk.patch(tiny_vit(), tiny_guidance(), graphs=True)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_buckets(prefix):
    """Buckets add few rows, few buckets serve many batches, and no padding segment is missing or empty."""
    met = set()
    for own in (1, 2, 3, 7, 8, 31):
        for length in (prefix + 1, prefix + 49, 197 + prefix, 1370):
            lengths = [max(prefix + 1, length - 3 * i % length) for i in range(own)]
            starts = torch.tensor([0, *lengths]).cumsum(0).int()
            packed = Packed(starts, max(lengths), int(starts[-1]))
            bucket = Bucket.of(packed, prefix, longest=1370 + prefix)
            met.add(bucket)
            made_up = (bucket.segments - own) * max(1, prefix)
            assert bucket.rows <= max(16 * -(-(packed.total + made_up) // 16), 1.125 * (packed.total + made_up))
            assert own <= bucket.segments < 2 * own and packed.max_seqlen <= bucket.max_seqlen <= bucket.rows
            inputs = bucket.make(torch.empty(packed.total, 2))
            for tokens in (torch.full((packed.total, 2), 7.0), torch.ones(packed.total, 2)):
                bucket.fill(inputs, tokens, starts)
            assert torch.equal(inputs[0][: packed.total], tokens) and not inputs[0][packed.total :].any()
            assert torch.equal(inputs[1][: own + 1], starts)
            assert inputs[1].diff()[own:].tolist() == [max(1, prefix)] * (bucket.segments - own)
            assert inputs[1][-1] <= bucket.rows
    assert len(met) <= 24
