"""Patched models under torch.compile, by ``patch(compile=True)`` or around the model, answer as eager ones do.

They also compile few times.
"""

import copy
import io
from functools import partial

import pytest
import timm
import torch
from helpers import tiny_guidance, tiny_vit, varied_images
from torch._dynamo.utils import counters
from zoo import make

import tinydrop_kernels as tdk
from tinydrop_kernels.torch_internals import for_any_batch, for_any_size

pytestmark = pytest.mark.slow

DROP_HALF = tdk.DropPolicy.fixed(0.5)
LAW = tdk.DropPolicy(tau=0.6, gamma=1.0, min_keep=0.1, coarsen=0.5, second_look=None)
ALL_STAY = tdk.DropPolicy(tau=None, gamma=1.0, min_keep=0.1, coarsen=0.5, second_look=None)


@pytest.fixture(autouse=True)
def fresh():
    """Forget compiled graphs before and after each test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    for compiled in (for_any_batch, for_any_size):
        compiled.cache_clear()


@pytest.fixture
def graphs(monkeypatch):
    """Record each graph that ``patch(compile=True)`` compiles. A graph break is an error."""
    found = []

    def backend(graph, examples):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    return found


def is_of_blocks(graph):
    """Return whether a graph has attention over segments, which only the target's blocks have."""
    return any("varlen_attention" in str(node.target) for node in graph.graph.nodes)


def test_fifty_batches_compile_twice(graphs):
    eager = tdk.patch(tiny_vit(), tiny_guidance(), LAW)
    vit = tdk.patch(tdk.unpatch(copy.deepcopy(eager)), eager.tinydrop.guidance, LAW, compile=True)
    assert vit.tinydrop.compiled and vit.tinydrop.guidance.compiled and not eager.tinydrop.guidance.compiled
    totals = set()
    with torch.inference_mode():
        for batch in (8, 1, 5, 3, 15, 2, 7, 4, 11, 6) * 5:  # from 16 on torch uses other convolutions
            images = varied_images(batch)
            torch.testing.assert_close(vit(images), eager(images), atol=1e-5, rtol=1e-4)
            totals.add(vit.tinydrop.last.counts.sum().item())
    assert len(totals) > 20, "the batches differ"
    blocks = [graph for graph in graphs if is_of_blocks(graph)]
    assert 1 <= len(blocks) <= 2 and 1 <= len(graphs) - len(blocks) <= 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("options", [{"global_pool": "avg"}, {"init_values": 0.1, "qk_norm": True}], ids=str)
def test_other_block_stacks_are_one_graph_too(graphs, options):
    eager = tdk.patch(tiny_vit(**options), tiny_guidance(), ALL_STAY)
    vit = copy.deepcopy(eager)
    vit.tinydrop.compiled = True
    with torch.inference_mode():
        for batch in (8, 5, 16):
            images = varied_images(batch)
            torch.testing.assert_close(vit(images), eager(images), atol=1e-5, rtol=1e-4)
    assert 1 <= len(graphs) <= 2


@pytest.mark.parametrize("key", ["beit, both biases", "dinov3", "rope, mixed"])
def test_other_families_are_one_graph_behind_what_they_keep(key, monkeypatch):
    """Bias tables and rotary angles are cached outside the graph, which has no break from first block to norm."""
    found = []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=lambda g, _: found.append(g) or g.forward))
    eager, images = make(key)
    tdk.patch(eager, tiny_guidance(), ALL_STAY)
    model = copy.deepcopy(eager)
    model.tinydrop.compiled = True
    with torch.inference_mode():
        for batch in (3, 2):
            torch.testing.assert_close(model(images[:batch]), eager(images[:batch]), atol=1e-5, rtol=1e-4)
    stacks = [graph for graph in found if is_of_blocks(graph)]
    assert 1 <= len(stacks) <= 2
    for graph in stacks:
        calls = sum("varlen_attention" in str(node.target) for node in graph.graph.nodes)
        assert calls % len(model.blocks) == 0, "all blocks, each with one call a grid where there is a bias"


def test_a_compiled_one_copies_pickles_and_changes_its_dtype(graphs):
    vit = tdk.patch(tiny_vit(), tiny_guidance(), DROP_HALF, compile=True)
    images, file = varied_images(4), io.BytesIO()
    with torch.inference_mode():
        wanted = vit(images)
        torch.save(vit, file)
        file.seek(0)
        for other in (copy.deepcopy(vit), torch.load(file, weights_only=False)):
            assert other.tinydrop.compiled and other.tinydrop.guidance.compiled
            torch.testing.assert_close(other(images), wanted)
        vit.double()
        torch.testing.assert_close(vit(images.double()).float(), wanted, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            vit.head.bias.add_(1.0)
            vit.tinydrop.guidance.model.head.fc.bias.add_(1.0)
        torch.testing.assert_close(vit(images.double()).float(), wanted + 1, atol=1e-4, rtol=1e-4)


def test_inductor():
    """A small model answers the same with torch's default compiler as without."""
    vit = tdk.patch(tiny_vit(depth=1), tiny_guidance(), DROP_HALF, compile=True)
    eager = copy.deepcopy(vit)
    eager.tinydrop.compiled = eager.tinydrop.guidance.compiled = False
    with torch.inference_mode():
        for batch in (4, 3):
            images = varied_images(batch)
            torch.testing.assert_close(vit(images), eager(images), atol=1e-4, rtol=1e-3)
    assert counters["inductor"]


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientvit_b0", "test_vit"])
def test_other_kinds_of_guidance_compile_too(name):
    guidance = tdk.Guidance(timm.create_model(name, num_classes=5), 160 if name == "test_vit" else None)
    vit, images = tdk.patch(tiny_vit(), guidance, DROP_HALF), torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        wanted = vit(images)
        out = torch.compile(vit, backend="aot_eager")(images)
        torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientvit_b0", "test_vit"])
def test_other_kinds_of_guidance_on_request(name, graphs):
    guidance = tdk.Guidance(timm.create_model(name, num_classes=5), 160 if name == "test_vit" else None, compile=True)
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        got = guidance(images)
        assert len(graphs) == 1
        guidance.compiled = False
        for one, other in zip(got, guidance(images), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("policy", [DROP_HALF, ALL_STAY], ids=["fixed", "law"])
def test_a_patched_model_in_torch_compile(policy):
    """Compiled answers are the eager ones, and batches with new numbers of tokens do not compile again each time."""
    vit = tdk.patch(tiny_vit(), tiny_guidance(), policy)
    whole, graphs = torch.compile, []

    def backend(graph, examples):
        graphs.append(graph)
        return graph.forward

    model = whole(vit, backend=backend)
    with torch.no_grad():
        for call in range(50):
            images = varied_images(2 + call % 7)
            with torch._dynamo.config.patch(error_on_recompile=call >= 8):
                out = model(images)
            torch.testing.assert_close(out, vit(images), atol=1e-5, rtol=1e-4)
    assert 1 <= sum(map(is_of_blocks, graphs)) <= 2
