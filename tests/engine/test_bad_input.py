"""Bad arguments raise one clear error that names the argument, before any work is done."""

import pytest
import torch
from helpers import tiny_guidance, tiny_vit

import tinydrop_kernels as tdk

BAD_IMAGES = {
    "not a tensor": (lambda: [[1.0]], TypeError, "images: got list"),
    "no batch": (lambda: torch.randn(3, 32, 32), ValueError, "images: got 3 dimensions"),
    "too many dimensions": (lambda: torch.randn(1, 1, 3, 32, 32), ValueError, "images: got 5 dimensions"),
    "one channel": (lambda: torch.randn(2, 1, 32, 32), ValueError, "images: got 1 channels, expected 3"),
    "channels last": (lambda: torch.randn(2, 32, 32, 3), ValueError, "images: got 32 channels"),
    "bytes": (lambda: torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "images: got torch.uint8"),
    "half for a float model": (lambda: torch.zeros(2, 3, 32, 32).half(), TypeError, "images: got torch.float16"),
    "too small": (lambda: torch.randn(2, 3, 24, 32), ValueError, "images: got 24 x 32, expected 32 x 32"),
    "too large": (lambda: torch.randn(2, 3, 32, 40), ValueError, "images: got 32 x 40"),
    "other device": (lambda: torch.empty(2, 3, 32, 32, device="meta"), ValueError, "images: got them on meta"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(patched, images, case):
    make, error, message = BAD_IMAGES[case]
    patched(images)
    before = patched.tinydrop.last
    worked = []
    hook = patched.tinydrop.guidance.register_forward_pre_hook(lambda *_: worked.append(1))
    with pytest.raises(error, match=f"^{message}"):
        patched(make())
    hook.remove()
    assert not worked and patched.tinydrop.last is before


def test_size_no_multiple_of_the_patch():
    vit = tdk.patch(tiny_vit(dynamic_img_size=True), tiny_guidance(), tdk.DropPolicy.fixed(0.5))
    assert vit(torch.randn(2, 3, 40, 64)).shape == (2, 5)
    with pytest.raises(ValueError, match="^images: got 36 x 64, expected multiples of the patch"):
        vit(torch.randn(2, 3, 36, 64))


def test_empty_batch_is_as_in_timm(patched):
    assert patched(torch.empty(0, 3, 32, 32)).shape == (0, 5)


def test_guidance_that_is_the_target(vit):
    with pytest.raises(ValueError, match="^guidance: got the model itself"):
        tdk.patch(vit, vit)


def test_guidance_with_other_classes(vit):
    with pytest.raises(ValueError, match="^guidance: it knows 6 classes and the model 5"):
        tdk.patch(vit, tiny_guidance(6))


def test_guidance_with_other_channels(vit):
    with pytest.raises(ValueError, match="^guidance: it sees 1 channels and the model 3"):
        tdk.patch(vit, tiny_guidance(in_chans=1))


def test_no_model():
    for call in (tdk.patch, tdk.unpatch):
        with pytest.raises((TypeError, ValueError), match="^model: "):
            call(None)


def test_size_that_only_the_positions_refuse():
    vit = tiny_vit()
    vit.patch_embed.strict_img_size = False
    tdk.patch(vit, tiny_guidance(), tdk.DropPolicy.fixed(0.5))
    with pytest.raises(ValueError, match="^images: got 24 x 32"):
        vit(torch.randn(2, 3, 24, 32))


def test_pool_removed_after_patching(patched, images):
    patched.reset_classifier(5, "")
    with pytest.raises(tdk.UnsupportedModelError, match="since it was patched, it has .*global_pool=''; supported"):
        patched(images)


def test_policy_of_another_type():
    with pytest.raises(TypeError, match="^tau: got '0.5'"):
        tdk.DropPolicy(tau="0.5")


def test_guidance_of_another_kind(vit):
    with pytest.raises(TypeError, match="^guidance: got int"):
        tdk.patch(vit, 7)
