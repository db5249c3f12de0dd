"""Blends, second looks, order of the answers, and calls from many threads."""

import threading

import pytest
import timm
import torch
from helpers import spread_confidence, tiny_guidance, tiny_vit, varied_images
from slow import mostly_slow

import tinydrop_kernels as tdk
from tinydrop_kernels.engine import steps

REDUCED = {"tau": 0.6, "gamma": 1.0, "min_keep": 0.1, "coarsen": 0.5}


@pytest.fixture
def model():
    return tdk.patch(
        tiny_vit(img_size=64), tiny_guidance(sharpness=4.0), tdk.DropPolicy(**REDUCED, blend=0.0, second_look=None)
    )


@torch.inference_mode()
def test_blend_is_a_mixture_of_probabilities(model):
    images = varied_images(16, 64)
    target = model(images)
    exited = model.tinydrop.last.exited
    guided = steps.plan(model.tinydrop, images).guidance_logits
    model.tinydrop.policy = tdk.DropPolicy(**REDUCED, blend=0.3, second_look=None)
    out = model(images)
    assert 0 < exited.sum() < 16
    torch.testing.assert_close(out[exited], guided[exited].log_softmax(1))
    wanted = 0.7 * target.softmax(1) + 0.3 * guided.softmax(1)
    torch.testing.assert_close(out[~exited].exp(), wanted[~exited])


@torch.inference_mode()
def test_second_look_is_dense_where_the_first_is_in_doubt(model):
    images = varied_images(24, 64)
    first, dense = model(images), model.tinydrop.dense(images).log_softmax(1)
    exited = model.tinydrop.last.exited
    guided = steps.plan(model.tinydrop, images).guidance_logits
    confidence, predicted = first.softmax(1).max(1)
    agrees = predicted == guided.argmax(1)
    bars = confidence[~exited & agrees].median().item(), confidence[~exited].quantile(0.7).item()
    model.tinydrop.policy = tdk.DropPolicy(**REDUCED, blend=0.0, second_look=bars)
    out = model(images)
    stands = exited | (confidence > bars[1]) | (agrees & (confidence > bars[0]))
    assert torch.equal(model.tinydrop.last.second_look, ~stands)
    assert 2 < (~stands).sum() < (~exited).sum(), "some look twice and some do not, or nothing is tested"
    torch.testing.assert_close(out[stands], first[stands])
    torch.testing.assert_close(out[~stands], dense[~stands], atol=1e-5, rtol=1e-4)
    assert model.tinydrop.report().second_looks == (~stands).sum()


@torch.inference_mode()
def test_nothing_looks_twice_that_was_dense_already(model):
    images = varied_images(8, 64)
    model.tinydrop.policy = tdk.DropPolicy(None, float("inf"), second_look=(1.0, 1.0), blend=0.0)
    torch.testing.assert_close(model(images), model.tinydrop.dense(images).log_softmax(1), atol=1e-5, rtol=1e-4)
    assert not model.tinydrop.last.second_look.any()


@torch.inference_mode()
def test_the_order_of_the_batch_is_kept(model):
    """Images are packed level by level, but answers have the order of the images."""
    model.tinydrop.policy = tdk.DropPolicy(None, 1.0, 0.1, 0.7, blend=0.0, second_look=None)
    model.tinydrop.guidance.register_forward_hook(spread_confidence)
    images = varied_images(10, 64)
    together = model(images)
    assert len(set(model.tinydrop.last.grid_sizes)) > 2
    plan = steps.plan(model.tinydrop, images)
    assert torch.equal(steps.run(model.tinydrop, images, plan), together)
    for b, grid in enumerate(model.tinydrop.last.grid_sizes):
        part = next(part for part in plan.parts if part.grid == grid)
        assert b in part.images.tolist()
        single = plan._replace(
            selection=type(plan.selection)(*(t[b : b + 1] for t in plan.selection)),
            guidance_logits=plan.guidance_logits[b : b + 1],
        )
        packed, parts = tdk.ops.pack(single.selection.counts, single.selection.levels, plan.levels, 1)
        alone = steps.run(model.tinydrop, images[b : b + 1], single._replace(packed=packed, parts=parts))
        torch.testing.assert_close(alone, together[b : b + 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    mostly_slow(["test_byobnet", "tinynet_e", "mobilenetv3_small_050", "efficientvit_b0", "test_vit"], "test_vit"),
)
def test_many_threads(name):
    """In 200 calls from 8 threads, each answer and ``last`` is that of a single thread, for each kind of guidance."""
    size = (160, 160) if name == "test_vit" else (64, 64)
    guidance = tdk.Guidance(timm.create_model(name, num_classes=5).eval(), input_size=size)
    policy = tdk.DropPolicy(None, 1.0, 0.1, 0.5, blend=0.1, second_look=(0.2, 0.5))
    model = tdk.patch(tiny_vit(img_size=64), guidance, policy)
    batches = [varied_images(2, 64) for _ in range(8)]
    with torch.inference_mode():
        wanted = [(model(images), model.tinydrop.last.counts) for images in batches]
    wrong: list[object] = []

    def work(own: int) -> None:
        try:
            with torch.inference_mode():
                for turn in range(25):
                    which = (own + turn) % 8
                    out, (answer, counts) = model(batches[which]), wanted[which]
                    if not torch.equal(model.tinydrop.last.counts, counts):
                        wrong.append((own, turn, "counts"))
                    if not torch.allclose(out, answer, atol=1e-5, rtol=1e-4):
                        wrong.append((own, turn, "answers"))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@torch.inference_mode()
@pytest.mark.parametrize("hooked", [False, True])
def test_last_block_computes_what_is_read_unless_hooked(model, hooked):
    """The last MLP is given the class tokens alone, but all tokens if a hook needs to see them."""
    model.tinydrop.policy = tdk.DropPolicy.fixed(0.5)
    images = varied_images(3, 64)
    wanted, rows = model(images), []
    if hooked:
        model.blocks[-1].norm2.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    else:
        mlp = model.blocks[-1].mlp
        forward = type(mlp).forward
        type(mlp).forward = lambda self, x: (rows.append(len(x)) if self is mlp else None, forward(self, x))[1]
    try:
        out = model(images)
    finally:
        if not hooked:
            type(mlp).forward = forward
    total = 3 + int(model.tinydrop.last.counts.sum())
    assert rows == [total if hooked else 3]
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-5)
