"""Tests that compare Guidance with autograd through timm's models, and tests of images, threads, dtypes and errors."""

import copy
import io
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import tiny_guidance, tiny_vit, with_random_weights
from slow import mostly_slow
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from tinydrop_kernels import Guidance, GuidanceError
from tinydrop_kernels.guidance.gradcam import Cam
from tinydrop_kernels.ops.types import Saliency

# Every supported kind of head, and every guidance model that the paper or this project lists.
HEADS = {
    "efficientformer_l1": Cam.ROWS,  # NLC features, the mean of two heads
    "efficientformer_l3": Cam.ROWS,
    "efficientformerv2_s0": Cam.ROWS,
    "efficientformerv2_s1": Cam.ROWS,
    "efficientformerv2_s2": Cam.ROWS,
    "efficientformerv2_l": Cam.ROWS,
    "levit_128s": Cam.ROWS,  # BatchNorm before each of two heads
    "levit_conv_128s": Cam.ROWS,
    "mobilevit_xxs": Cam.ROWS,
    "mobilevitv2_050": Cam.ROWS,
    "efficientvit_m0": Cam.ROWS,  # BatchNorm before the head
    "resnet18": Cam.ROWS,
    "efficientnet_b0": Cam.ROWS,
    "mobilenetv2_100": Cam.ROWS,
    "repvit_m1": Cam.ROWS,
    "fastvit_t8": Cam.ROWS,
    "swiftformer_xs": Cam.ROWS,
    "swin_tiny_patch4_window7_224": Cam.ROWS,  # NHWC features
    "tiny_vit_5m_224": Cam.POOLED,  # LayerNorm after the pool
    "convnext_atto": Cam.POOLED,
    "edgenext_xx_small": Cam.POOLED,
    "mobilenetv3_large_100": Cam.POOLED,
    "mobilenetv3_small_050": Cam.POOLED,  # convolution and activation after the pool
    "mobilenetv4_conv_small": Cam.POOLED,
    "efficientvit_b0": Cam.HEAD,  # convolution and activation before the pool
    "deit_tiny_patch16_224": Cam.LAST_BLOCK,  # class token
    "deit_tiny_distilled_patch16_224": Cam.LAST_BLOCK,  # and a second one
}
# One small model of each kind.
SMALL: dict[Cam, Callable[[], nn.Module]] = {
    Cam.ROWS: tiny_guidance,
    Cam.POOLED: lambda: with_random_weights(timm.create_model("test_convnext", num_classes=5)),
    Cam.HEAD: lambda: tiny_vit(class_token=False, global_pool="map"),
    Cam.LAST_BLOCK: tiny_vit,
}
TARGET = {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}

every_kind = pytest.mark.parametrize("cam", SMALL, ids=lambda cam: cam.name)


def small(cam: Cam) -> Guidance:
    guidance = Guidance(SMALL[cam](), input_size=(32, 32) if cam in (Cam.HEAD, Cam.LAST_BLOCK) else (64, 96))
    assert guidance.cam is cam and guidance.feature_size in ((4, 4), (2, 3))
    return guidance


def cam_of(guided, guidance: Guidance, classes: int) -> Tensor:
    """Return the plain Grad-CAM map. For ``Cam.ROWS`` it is computed here, because Guidance does not."""
    if guidance.cam is not Cam.ROWS:
        assert guided.features is None and guided.saliency.dtype == torch.float32
        return guided.saliency
    assert guided.saliency is None
    p, top = guided.logits.softmax(1).topk(classes)
    weight = torch.einsum("bk,bkc->bc", p, guidance.class_weight[top])
    return torch.einsum("blc,bc->bl", guided.features, weight).relu().view(-1, *guidance.feature_size)


def cam_by_autograd(model: nn.Module, features: Tensor, head: Callable[[Tensor], Tensor], classes: int) -> Tensor:
    """Return Grad-CAM from its definition: ReLU of the features weighted by the mean gradient of the logits."""
    features = features.detach().requires_grad_()
    logits = head(features)
    p, top = logits.detach().softmax(1).topk(classes)
    (p * logits.gather(1, top)).sum().backward()
    cells, gradient = features.detach(), features.grad
    if features.ndim == 4:
        axes = (1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else (2, 3)
        channel = 3 if axes == (1, 2) else 1
        return (cells * gradient.mean(axes, keepdim=True)).sum(channel).relu()
    skip = getattr(model, "num_prefix_tokens", 0)
    cells, gradient = cells[:, skip:], gradient[:, skip:]
    return (cells * gradient.mean(1, keepdim=True)).sum(2).relu()


def assert_same_map(got: Tensor, wanted: Tensor) -> None:
    """Assert that two maps are equal up to a positive factor per image, which does not change the ranking."""
    got, wanted = got.flatten(1), wanted.flatten(1)
    assert (wanted.amax(1) > 0).all()
    got, wanted = (m / m.amax(1, keepdim=True) for m in (got, wanted))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def assert_as_exact_as(got: Tensor, other: Tensor, exact: Tensor) -> None:
    """Assert that our float32 result is about as close to float64 as timm's own float32 result on this CPU."""
    off = float((other.double() - exact).abs().max())
    torch.testing.assert_close(got.double(), exact, atol=1e-5 + 10 * off, rtol=0)
    assert off < 1e-2 * float(exact.abs().max()), "or nothing is tested"


def make_unsure(model: nn.Module, images: Tensor) -> None:
    """Scale the classifiers so that a random model's logits are about 1 and several classes are probable."""
    classifiers = model.get_classifier()
    with torch.no_grad():
        spread = model(images).std()
        for classifier in classifiers if isinstance(classifiers, tuple | list) else (classifiers,):
            for linear in classifier.modules():
                if isinstance(linear, nn.Linear):
                    linear.weight.div_(spread)
                    linear.bias.div_(spread)


@pytest.mark.parametrize(
    ("name", "inference_mode"),
    mostly_slow(
        [(name, True) for name in HEADS] + [("convnext_atto", False), ("deit_tiny_patch16_224", False)],
        *((name, True) for name in ("convnext_atto", "deit_tiny_patch16_224", "mobilevit_xxs", "resnet18")),
    ),
)
def test_agrees_with_autograd(name, inference_mode):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    torch.manual_seed(8)  # with this seed no map of these random models is all zero
    model = with_random_weights(timm.create_model(name, pretrained=False, num_classes=7))
    images = torch.randn(2, 3, *resolve_model_data_config(model)["input_size"][1:])
    make_unsure(model, images)
    guidance = Guidance(model)
    assert guidance.cam is HEADS[name] and guidance.input_size == images.shape[2:]

    exact = copy.deepcopy(model).double()

    def features(model, images):
        if guidance.cam is not Cam.LAST_BLOCK:
            return model.forward_features(images)
        return model.blocks[:-1](model.norm_pre(model._pos_embed(model.patch_embed(images))))

    def head(model, tokens):
        if guidance.cam is not Cam.LAST_BLOCK:
            return model.forward_head(tokens)
        return model.forward_head(model.norm(model.blocks[-1](tokens)))

    def cam_by_timm(model, images, classes):
        cam = cam_by_autograd(model, features(model, images), partial(head, model), classes)
        return cam.flatten(1) / cam.flatten(1).amax(1, keepdim=True)

    wanted = model(images).detach()
    assert (wanted.softmax(1).topk(3).values > 0.02).all(), "three classes matter"
    for classes in (1, 3):
        with torch.inference_mode(inference_mode):
            guided = guidance(images, saliency=Saliency(classes))
            got = cam_of(guided, guidance, classes).clone()
        assert_as_exact_as(guided.logits.clone(), wanted, exact(images.double()).detach())
        got = got.flatten(1) / got.flatten(1).amax(1, keepdim=True)
        assert_as_exact_as(got, cam_by_timm(model, images, classes), cam_by_timm(exact, images.double(), classes))


@pytest.mark.parametrize(
    "name", ["eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224", "beit_base_patch16_224"]
)
def test_last_block_with_other_arguments(name):
    """Check that the last block gets the rotations and biases that the model passes to its blocks."""
    options = {"use_shared_rel_pos_bias": True} if name.startswith("beit") else {}
    model = with_random_weights(timm.create_model(name, depth=2, num_classes=5, **options))
    guidance = Guidance(model)
    assert guidance.cam is Cam.LAST_BLOCK
    images, seen = torch.randn(2, 3, *guidance.input_size), []
    with torch.inference_mode():
        guided = guidance(images)
    model.blocks[-1].register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    logits = model(images)
    (((tokens, *args), kwargs),) = seen
    assert args or kwargs
    torch.testing.assert_close(guided.logits.clone(), logits.detach(), atol=1e-4, rtol=1e-4)

    def head(tokens):
        return model.forward_head(model.norm(model.blocks[-1](tokens, *args, **kwargs)))

    assert_same_map(guided.saliency, cam_by_autograd(model, tokens, head, classes=1))


class FixedLogits(nn.Module):
    """A model with one feature per class. The logit of a class is its pooled feature times its strength."""

    def __init__(self, strengths: list[float]):
        super().__init__()
        self.num_classes, self.in_chans, self.num_prefix_tokens = len(strengths), len(strengths), 0
        self.pretrained_cfg = {"input_size": (len(strengths), 2, 2), "mean": (0.0,) * 3, "std": (1.0,) * 3}
        self.strengths = nn.Parameter(torch.tensor(strengths))

    def forward_features(self, images: Tensor) -> Tensor:
        return images

    def forward_head(self, features: Tensor) -> Tensor:
        pooled = features.mean((2, 3)) * self.strengths
        return pooled + 0 * pooled**3 + 1e-2 * pooled.sin()  # not affine, so that Guidance computes the map itself

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(images)


def test_ties_go_to_the_lower_class_and_all_classes_may_be_asked_for():
    guidance = Guidance(FixedLogits([1.0, 1.0, 1.0]))
    assert guidance.cam is not Cam.ROWS
    # All three logits are equal, and the feature of each class lies in another cell.
    images = torch.zeros(1, 3, 2, 2)
    images[0, 0, 0, 0] = images[0, 1, 0, 1] = images[0, 2, 1, 0] = 4.0
    for classes, lit in ((1, [[1, 0], [0, 0]]), (2, [[1, 1], [0, 0]]), (3, [[1, 1], [1, 0]]), (9, [[1, 1], [1, 0]])):
        saliency = guidance(images, saliency=Saliency(classes)).saliency
        torch.testing.assert_close(saliency / saliency.amax(), torch.tensor([lit]).float())


@pytest.mark.parametrize("weights", [(0.5, 0.0), (0.0, 2.0), (0.5, 2.0)], ids=["norm", "center", "both"])
@every_kind
def test_norm_and_center(cam, weights, images):
    guidance, (norm, center) = small(cam), weights
    guided = guidance(images, saliency=Saliency(1, norm, center))
    if cam is Cam.ROWS:
        assert guided.saliency is None and guided.features is not None, "left to the operator"
        return
    plain = guidance(images).saliency
    model = guidance.model
    with torch.no_grad():
        if cam is Cam.LAST_BLOCK:
            cells = model.blocks[:-1](model.norm_pre(model._pos_embed(model.patch_embed(images))))[:, 1:]
        elif cam is Cam.HEAD:
            cells = model.forward_features(images)
        else:
            larger = F.interpolate(images, size=(64, 96), mode="bilinear", antialias=True)
            cells = model.forward_features(larger).flatten(2).transpose(1, 2)
    lengths = (cells**2).sum(2).sqrt().view_as(plain)
    rows, columns = guidance.feature_size
    corner = math.hypot(0.5 / rows - 0.5, 0.5 / columns - 0.5)
    for image in range(len(images)):
        for row in range(rows):
            for column in range(columns):
                wanted = 0.0
                for weight, values in ((1.0, plain[image]), (norm, lengths[image])):
                    spread = (values.max() - values.min()).item()
                    wanted += weight * (values[row, column] - values.min()).item() / spread if spread else 0.0
                away = math.hypot((row + 0.5) / rows - 0.5, (column + 0.5) / columns - 0.5)
                wanted += center * (1 - away / corner)
                assert guided.saliency[image, row, column].item() == pytest.approx(wanted, abs=1e-4)


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


def seen_by_the_stem(guidance: Guidance, *args, **kwargs) -> Tensor:
    seen = []
    stem = next(m for m in guidance.modules() if isinstance(m, nn.Conv2d))
    handle = stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    guidance(*args, **kwargs)
    handle.remove()
    return seen[0]


def test_own_preprocessing_is_honoured(images):
    """Check that images normalised for the target are renormalised and resized for the guidance model."""
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    guidance = Guidance(tiny_guidance(), input_size=(24, 40), **own)
    seen = seen_by_the_stem(guidance, images, **TARGET)
    channels = {name: torch.tensor(values)[:, None, None] for name, values in TARGET.items()}
    raw = images * channels["std"] + channels["mean"]
    raw = F.interpolate(raw, size=(24, 40), mode="bilinear", align_corners=False, antialias=True)
    wanted = (raw - torch.tensor(own["mean"])[:, None, None]) / torch.tensor(own["std"])[:, None, None]
    torch.testing.assert_close(seen, wanted, atol=1e-5, rtol=1e-5)
    assert seen.is_contiguous(memory_format=torch.channels_last)


def test_images_of_its_own_are_left_as_they_are(images):
    guidance = Guidance(tiny_guidance(), input_size=(32, 32))
    assert torch.equal(seen_by_the_stem(guidance, images), images)
    assert torch.equal(seen_by_the_stem(guidance, images, guidance.mean, guidance.std), images)


def test_statistics_are_made_once(images, monkeypatch):
    guidance = Guidance(tiny_guidance())
    wanted = guidance(images, **TARGET).logits
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a copy from the host at each call"))
    assert torch.equal(guidance(images, **TARGET).logits, wanted)


def test_one_channel(images):
    guidance = Guidance(timm.create_model("mobilenetv3_small_050", num_classes=5, in_chans=1), input_size=(32, 32))
    assert guidance.mean == (pytest.approx(0.449),)
    grey = images[:, :1]
    seen = seen_by_the_stem(guidance, grey, mean=(0.4, 0.5, 0.6), std=(0.5, 0.5, 0.5))
    torch.testing.assert_close(seen, (grey * 0.5 + 0.5 - guidance.mean[0]) / guidance.std[0])


@pytest.mark.slow
@every_kind
def test_many_threads(cam):
    """Check 200 calls by 8 threads on one guidance model, each with its own images, statistics and saliency."""
    guidance = small(cam)
    asked = [
        (torch.randn(2, 3, 32 + 8 * (i % 3), 32), (0.1 * i,) * 3, (0.5,) * 3, Saliency(1 + i % 3, 0.1 * i, 0.0))
        for i in range(8)
    ]
    wanted = [guidance(*arguments) for arguments in asked]

    def call(i: int) -> None:
        with torch.inference_mode(i % 3 == 0):
            guided = guidance(*asked[i % len(asked)])
            for got, right in zip(guided, wanted[i % len(asked)], strict=True):
                if right is not None:
                    torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(call, range(200)))
    finally:
        sys.setswitchinterval(interval)


@every_kind
def test_made_and_first_used_in_inference_mode(cam, images):
    """Check that no stored tensor is an inference tensor, because autograd could not save it in a later call."""
    with torch.inference_mode():
        guidance = small(cam)
        wanted = guidance(images, **TARGET)
        others = copy.deepcopy(guidance), small(cam).double().float()
    later = images.clone().requires_grad_()
    for again in (guidance, *others):
        guided = again(later, **TARGET)
        assert not any(tensor.requires_grad for tensor in guided if tensor is not None)
        assert not any(tensor.is_inference() for tensor in (*again.parameters(), *again.buffers()))
    for got, right in zip(guidance(later, **TARGET), wanted, strict=True):
        assert right is None or torch.equal(got, right)
    scale, offset = next(iter(guidance._rescalings.values()))
    ((later * scale + offset) * scale).sum().backward()
    assert later.grad.isfinite().all()


def test_parameters_made_in_inference_mode_can_guide():
    with torch.inference_mode():
        model = timm.create_model("mobilenetv3_small_050", num_classes=7)
        guidance = Guidance(model)
        guided = guidance(torch.randn(2, 3, 224, 224))
    assert guidance.cam is Cam.POOLED and guided.saliency.shape == (2, 7, 7)


def test_a_model_that_was_used_with_autograd_can_guide():
    """Check a model whose attention has cached biases together with their autograd graph."""
    model = timm.create_model("efficientformerv2_s0", num_classes=7).eval()
    model(torch.randn(1, 3, 224, 224))
    cached = [m for m in model.modules() if getattr(m, "attention_bias_cache", None)]
    assert cached
    assert Guidance(model).cam is Cam.ROWS
    assert all(m.attention_bias_cache for m in cached), "the original is left alone"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@every_kind
def test_dtypes(cam, dtype, images):
    guidance = small(cam)
    wanted = guidance(images, **TARGET)
    made = Guidance(SMALL[cam]().to(dtype))
    assert made.cam is cam and next(made.parameters()).dtype == dtype
    guidance.to(dtype)
    saliency = Saliency(3, 0.5, 0.5)
    guided = guidance(images.to(dtype), **TARGET)
    assert guided.logits.dtype == (dtype if dtype == torch.float64 else torch.float32)
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    largest = wanted.logits.abs().max()
    torch.testing.assert_close(guided.logits.float() / largest, wanted.logits / largest, atol=tolerance, rtol=0)
    if cam is not Cam.ROWS:
        assert guidance(images.to(dtype), saliency=saliency).saliency.dtype == torch.float32


@every_kind
def test_the_head_stays_in_float32(cam, images):
    """Check that casting to half precision and back leaves the head exact, and that logits are not rounded."""
    guidance = small(cam)
    before = {name: tensor.clone() for name, tensor in guidance.model.state_dict().items()}
    guidance.half()
    narrow = {name for name, tensor in guidance.model.state_dict().items() if tensor.dtype == torch.float16}
    logits = guidance(images.half()).logits
    assert not torch.equal(logits, logits.half().float())
    after = guidance.float().model.state_dict()
    heads = {name for name in before if torch.is_floating_point(before[name])} - narrow
    assert narrow and heads and all(torch.equal(before[name], after[name]) for name in heads)


@every_kind
def test_autocast(cam, images):
    guidance = small(cam)
    wanted = guidance(images)
    with torch.autocast("cpu", torch.bfloat16):
        guided, made = guidance(images), small(cam)
    assert guided.logits.dtype == torch.float32
    assert guided.saliency is None or guided.saliency.dtype == torch.float32
    largest = wanted.logits.abs().max()
    torch.testing.assert_close(guided.logits.float() / largest, wanted.logits / largest, atol=0.1, rtol=0)
    assert made.cam is cam, "probed in float32"


@every_kind
def test_copies_are_independent_and_pickles_are_whole(cam, images):
    guidance = small(cam)
    wanted = guidance(images, **TARGET)
    file = io.BytesIO()
    torch.save(guidance, file)
    file.seek(0)
    for other in (copy.deepcopy(guidance), torch.load(file, weights_only=False)):
        for got, right in zip(other(images, **TARGET), wanted, strict=True):
            assert right is None or torch.equal(got, right)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not torch.equal(other(images, **TARGET).logits, wanted.logits), "it uses its own weights"
        other.double()(images.double(), **TARGET)
    assert torch.equal(guidance(images, **TARGET).logits, wanted.logits)
    assert len(list(guidance.parameters())) <= len(list(SMALL[cam]().parameters()))


@pytest.mark.slow
@every_kind
def test_torch_compile(cam, images):
    guidance = small(cam)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda images: tuple(t for t in guidance(images, **TARGET) if t is not None), backend="aot_eager"
    )
    with torch.inference_mode():
        compiled(images)  # the first call computes the normalisation factors
        got, wanted = compiled(images), [t for t in guidance(images, **TARGET) if t is not None]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * b.abs().max().item(), rtol=1e-4)
    assert not any(t.is_inference() for pair in guidance._rescalings.values() for t in pair)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential()], ids=["Linear", "Sequential"])
def test_no_timm_classifier_is_refused(model):
    with pytest.raises(GuidanceError, match="^guidance: got .*expected a timm classifier"):
        Guidance(model)


def test_feature_extractor_is_refused():
    with pytest.raises(GuidanceError, match="num_classes=0"):
        Guidance(timm.create_model("test_byobnet", num_classes=0))


class TwoHeads(FixedLogits):
    def forward_head(self, features: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward_head(features)
        return logits, logits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoHeads([1.0, 2.0, 3.0]), "the head of TwoHeads gives a tuple, expected logits of shape (batch, 3)"),
        (lambda: tiny_vit(global_pool=""), "the head of VisionTransformer gives shape (2, 17, 5), expected logits of"),
        (
            lambda: timm.create_model("resnet18", num_classes=5, global_pool=""),
            "the head of ResNet fails on its own features: ",
        ),
        (
            lambda: timm.create_model("mobilenetv3_small_050", num_classes=5, global_pool=""),
            "the head of MobileNetV3 ",
        ),
    ],
    ids=["tuple", "all tokens", "whole map", "whole map through a convolution"],
)
def test_what_does_not_answer_with_logits_is_refused(make, message):
    with pytest.raises(GuidanceError) as refusal:
        Guidance(make())
    assert str(refusal.value).startswith(f"guidance: {message}")


def test_head_that_is_nearly_linear_for_weak_features_is_not_taken_for_linear():
    """Check an attention pool with small weights, whose MLP is nonlinear only for strong features."""
    assert Guidance(tiny_vit(class_token=False, global_pool="map")).cam is Cam.HEAD


@pytest.mark.parametrize("name", ["cait_xxs24_224", "xcit_nano_12_p16_224"])
def test_class_token_beside_the_last_block_is_refused(name):
    with pytest.raises(GuidanceError, match="has a class token, but its Grad-CAM cannot be computed"):
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
    assert all(parameter.requires_grad for parameter in model.parameters())
