"""A pipeline gives the same answers as calls with one batch after the other."""

import pytest
import torch
from helpers import tiny_guidance, tiny_vit, varied_images

import tinydrop_kernels as tdk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def patched(second_look=None):
    policy = tdk.DropPolicy(0.6, 1.0, 0.1, 0.5, blend=0.2, second_look=second_look)
    return tdk.patch(tiny_vit().to(DEVICE), tiny_guidance(sharpness=4.0), policy)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("second_look", [None, (0.3, 0.5)], ids=["once", "second look"])
@torch.inference_mode()
def test_same_answers_in_order(overlap, second_look):
    model = patched(second_look)
    batches = [varied_images(number + 3 * number)[3 * number :] for number in (4, 1, 7, 3, 4, 8)]
    answered = list(tdk.Pipeline(model, overlap)(iter(batches)))
    assert len(answered) == len(batches)
    for batch, (images, logits, call) in zip(batches, answered, strict=True):
        wanted = model(batch.to(DEVICE))
        torch.testing.assert_close(logits, wanted)
        assert torch.equal(images, batch.to(DEVICE))
        assert torch.equal(call.counts, model.tinydrop.last.counts)
        assert torch.equal(call.second_look, model.tinydrop.last.second_look)
    if second_look:
        assert any(call.second_look.any() for _, _, call in answered)


@pytest.mark.parametrize("overlap", [False, True])
def test_guidance_of_the_next_comes_before_the_answer(overlap):
    """With overlap, the next batch has been guided when a result is yielded, but the batch after that has not."""
    model, happened = patched(), []
    model.tinydrop.guidance.register_forward_hook(lambda *_: happened.append("guidance"))

    def batches():
        for number in range(3):
            happened.append("load")
            yield varied_images(2 + number)

    for answered in tdk.Pipeline(model, overlap)(batches()):
        happened.append(f"answer {len(answered.logits)}")
        assert model.tinydrop.report().images == len(answered.images)
    if overlap:
        expected = "load guidance load guidance answer 2 load guidance answer 3 answer 4"
    else:
        expected = "load guidance answer 2 load guidance answer 3 load guidance answer 4"
    assert " ".join(happened) == expected


def test_images_are_cast_and_no_graph_is_kept():
    model = patched().to(torch.bfloat16)
    (answered,) = tdk.Pipeline(model)([varied_images(3)])
    assert answered.images.dtype == answered.logits.dtype == torch.bfloat16 and not answered.logits.requires_grad


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("bad", ["batch", "loader"])
def test_what_comes_before_an_error_is_answered(overlap, bad):
    def batches():
        yield varied_images(2)
        yield varied_images(3)
        if bad == "loader":
            raise OSError("the disk is gone")
        yield varied_images(2)[:, :1]

    answered = []
    with pytest.raises((OSError, ValueError), match=r"^(the disk|images: got 1 channels)"):
        for _, logits, _ in tdk.Pipeline(patched(), overlap)(batches()):
            answered.append(len(logits))
    assert answered == [2, 3]


def test_a_pipeline_may_be_left_early():
    pipeline = tdk.Pipeline(patched(), overlap=True)
    answered = next(iter(pipeline(varied_images(2) for _ in range(4))))
    assert len(answered.logits) == 2 and len(list(pipeline([varied_images(3)]))) == 1


def test_bad_batches():
    model = patched()
    with pytest.raises(ValueError, match="^batches: got an empty batch"):
        list(tdk.Pipeline(model)([varied_images(2)[:0]]))
    with pytest.raises(ValueError, match="^images: got 1 channels"):
        list(tdk.Pipeline(model)([varied_images(2)[:, :1]]))
    with pytest.raises(ValueError, match="not patched"):
        tdk.Pipeline(tiny_vit())
    model.train()
    with pytest.raises(RuntimeError, match="training mode"):
        list(tdk.Pipeline(model)([varied_images(2)]))
