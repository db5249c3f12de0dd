"""Grad-CAM against autograd through the real timm classes, and what a guidance model is asked for."""

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import tiny_guidance, tiny_vit, with_random_weights

from tinydrop_kernels import Guidance, GuidanceError, ops
from tinydrop_kernels.guidance import Cam

# Every kind of head that the package claims to know, each by the smallest timm model that has it.
HEADS = {
    "efficientformer_l1": Cam.ROWS,  # NLC features, the mean of two heads
    "efficientformerv2_s0": Cam.ROWS,
    "levit_128s": Cam.ROWS,  # BatchNorm before each of two heads
    "levit_conv_128s": Cam.ROWS,
    "mobilevit_xxs": Cam.ROWS,
    "mobilevitv2_050": Cam.ROWS,
    "resnet18": Cam.ROWS,
    "efficientnet_lite0": Cam.ROWS,
    "mobilenetv2_100": Cam.ROWS,
    "repvit_m0_9": Cam.ROWS,
    "fastvit_t8": Cam.ROWS,
    "swiftformer_xs": Cam.ROWS,
    "swin_tiny_patch4_window7_224": Cam.ROWS,  # NHWC features
    "tiny_vit_5m_224": Cam.POOLED,  # LayerNorm after the pool
    "convnext_atto": Cam.POOLED,
    "edgenext_xx_small": Cam.POOLED,
    "mobilenetv3_small_050": Cam.POOLED,  # convolution and activation after the pool
    "mobilenetv4_conv_small_035": Cam.POOLED,
    "efficientvit_b0": Cam.HEAD,  # convolution and activation before the pool
    "deit_tiny_patch16_224": Cam.LAST_BLOCK,  # class token
}


def saliency_of(guided, guidance):
    """The map on the guidance model's own grid, whichever way it is had."""
    if guided.saliency is not None:
        return guided.saliency
    size = guidance.feature_size
    arguments = (guided.logits, guided.features, guidance.class_weight, size, size, None, 0.0, 1.0)
    return ops.select_tokens(*arguments).saliency


def grad_cam_by_autograd(model, features, head):
    """ReLU of the features weighted by the mean gradient of the top logit, from the definition."""
    features = features.detach().requires_grad_()
    logits = head(features)
    logits.gather(1, logits.argmax(1, keepdim=True)).sum().backward()
    cells, gradient = features.detach(), features.grad
    if features.ndim == 4:
        axes = (1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else (2, 3)
        channel = 3 if axes == (1, 2) else 1
        return (cells * gradient.mean(axes, keepdim=True)).sum(channel).relu().flatten(1)
    skip = getattr(model, "num_prefix_tokens", 0)
    cells, gradient = cells[:, skip:], gradient[:, skip:]
    return (cells * gradient.mean(1, keepdim=True)).sum(2).relu()


@pytest.mark.parametrize(
    ("name", "inference_mode"),
    [(name, True) for name in HEADS] + [("convnext_atto", False), ("deit_tiny_patch16_224", False)],
)
def test_agrees_with_autograd(name, inference_mode):
    torch.manual_seed(3)  # with it every one of these random models has a saliency that is not all zero
    model = with_random_weights(timm.create_model(name, num_classes=7))
    guidance = Guidance(model)
    assert guidance.cam is HEADS[name]
    images = torch.randn(2, 3, *guidance.input_size)
    with torch.inference_mode(inference_mode):
        guided = guidance(images)
        logits, saliency = guided.logits.clone(), saliency_of(guided, guidance).clone()

    if guidance.cam is Cam.LAST_BLOCK:
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        features = model.blocks[:-1](tokens)
        wanted = grad_cam_by_autograd(model, features, lambda x: model.forward_head(model.norm(model.blocks[-1](x))))
    else:
        wanted = grad_cam_by_autograd(model, model.forward_features(images), model.forward_head)
    torch.testing.assert_close(logits, model(images).detach(), atol=1e-4, rtol=1e-4)
    # up to the positive factor 1 / cells, which does not change the ranking
    saliency = saliency.flatten(1)
    assert wanted.max() > 0
    torch.testing.assert_close(saliency / saliency.amax(), wanted / wanted.amax(), atol=1e-5, rtol=1e-4)


def test_weights_are_the_same_in_half_precision():
    model = tiny_guidance()
    rows = Guidance(model).class_weight
    half = Guidance(model.half())
    assert half.cam is Cam.ROWS and half.class_weight.dtype == torch.float16
    torch.testing.assert_close(half.class_weight.float(), rows, atol=2e-3, rtol=2e-3)


def test_own_preprocessing_is_read_from_the_model():
    guidance = Guidance(timm.create_model("mobilevit_xxs"))
    assert guidance.input_size == (256, 256) and guidance.mean == (0, 0, 0) and guidance.std == (1, 1, 1)
    assert Guidance(tiny_vit(), input_size=(32, 32)).input_size == (32, 32)
    assert Guidance(tiny_vit()).input_size == (32, 32), "a fixed patch embedding knows better than the pretrained_cfg"


def test_own_preprocessing_is_honoured(images):
    """Images normalised for the target reach the guidance model as if normalised and resized for it."""
    import tinydrop_kernels as tdk

    vit, cnn = tiny_vit(), tiny_guidance()
    vit.pretrained_cfg = vit.pretrained_cfg | {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
    tdk.patch(
        vit, Guidance(cnn, input_size=(24, 40), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)), tdk.DropPolicy.fixed(1)
    )
    seen = []
    stem = next(m for m in vit.tinydrop.guidance.modules() if isinstance(m, torch.nn.Conv2d))
    handle = stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    vit(images)
    handle.remove()
    raw = images * torch.tensor([0.1, 0.2, 0.3])[:, None, None] + torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    raw = F.interpolate(raw, size=(24, 40), mode="bilinear", align_corners=False, antialias=True)
    wanted = (raw - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    torch.testing.assert_close(seen[0], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), torch.nn.Sequential()], ids=["Linear", "Sequential"])
def test_no_timm_classifier_is_refused(model):
    with pytest.raises(GuidanceError, match="^guidance: got .*accepted is a timm classifier"):
        Guidance(model)


def test_feature_extractor_is_refused():
    with pytest.raises(GuidanceError, match="num_classes=0"):
        Guidance(timm.create_model("test_byobnet", num_classes=0))


def test_parameters_made_in_inference_mode_can_guide():
    with torch.inference_mode():
        model = timm.create_model("mobilenetv3_small_050", num_classes=7)
        guidance = Guidance(model)
        guided = guidance(torch.randn(2, 3, 224, 224))
    assert guidance.cam is Cam.POOLED and guided.saliency.shape == (2, 7, 7)


def test_head_that_is_nearly_linear_for_weak_features_is_not_taken_for_linear():
    """An attention pool with small weights: its MLP bends only where features are strong."""
    assert Guidance(tiny_vit(class_token=False, global_pool="map")).cam is Cam.HEAD


@pytest.mark.parametrize("name", ["cait_xxs24_224", "xcit_nano_12_p16_224"])
def test_class_token_beside_the_last_block_is_refused(name):
    with pytest.raises(GuidanceError, match="has a class token, and no Grad-CAM of it"):
        Guidance(timm.create_model(name, num_classes=7))


def test_the_original_is_left_alone(images):
    import tinydrop_kernels as tdk

    model = tiny_guidance().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = tdk.patch(tiny_vit(), model, tdk.DropPolicy.fixed(0.5))
    shared = first.tinydrop.guidance
    second = tdk.patch(tiny_vit().bfloat16(), shared, tdk.DropPolicy.fixed(0.5))
    assert second(images.bfloat16()).dtype == torch.bfloat16
    assert first(images).dtype == torch.float32, "the second target has its own copy"
    assert model.training and all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_one_channel():
    import tinydrop_kernels as tdk

    vit = tdk.patch(tiny_vit(in_chans=1), timm.create_model("mobilenetv3_small_050", num_classes=5, in_chans=1))
    assert vit.tinydrop.guidance.mean == (pytest.approx(0.449),)
    assert vit(torch.randn(2, 1, 32, 32)).shape == (2, 5)
