"""Tests that the fit minimises what it says, and that the fitted model learns, is saved, and is refused by name."""

import copy
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import tiny_guidance, tiny_vit, varied_images
from torch import nn

import tinydrop_kernels as tdk
from tinydrop_kernels.checkpoints import class_names, load_model
from tinydrop_kernels.guidance import fitting
from tinydrop_kernels.guidance.fitting import FittedGuidance, choose_decay, fit_each, fit_heads
from tinydrop_kernels.normalization import normalization_of

fit_one = partial(fit_each, progress=False)


@pytest.fixture(scope="module")
def target():
    """Return a ViT whose classes depend on the colours, and which is often sure."""
    torch.manual_seed(1)
    vit = tiny_vit()
    vit.head.weight.data.mul_(30)
    vit.head.bias.data.zero_()
    vit.pretrained_cfg = vit.pretrained_cfg | {"label_names": ("ant", "bee", "cat", "dog", "eel")}
    return vit


@pytest.fixture(scope="module")
def photos():
    torch.manual_seed(2)
    return varied_images(200)


@pytest.fixture(scope="module")
def fitted(target, photos):
    return fit_one(target, photos.split(64), [timm.create_model("test_byobnet")])[0]


def predicted(guidance: tdk.Guidance, target: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return guidance(images, *normalization_of(target, 3)).logits.argmax(1)


def problem(images: int, classes: int = 4, dim: int = 6):
    """Return features with unequal means and scales, and probabilities that depend on them."""
    features = torch.randn(images, dim) * torch.logspace(-2, 2, dim) + torch.linspace(-3, 300, dim)
    scaled = (features - features.mean(0)) / features.std(0)
    return features, (scaled @ torch.randn(dim, classes)).softmax(1)


@pytest.mark.parametrize("decay", [1.0, 0.01])
def test_the_gradient_of_the_objective_is_zero(decay):
    """The formula in float64 has no gradient at the solution, in terms of the standardised features."""
    features, wanted = problem(300)
    (head,) = fit_heads(features, wanted, [decay])
    wide, mean, std = features.double(), features.double().mean(0), features.double().std(0)
    std = std.clamp_min(std.mean() / 100)
    error = (F.linear(wide, head.weight.double(), head.bias.double()).softmax(1) - wanted) / len(features)
    slope = error.T @ ((wide - mean) / std) + decay * head.weight.double() * std
    assert slope.abs().max() < 1e-3 and error.sum(0).abs().max() < 1e-3


def test_a_weaker_decay_does_not_depend_on_the_fits_before():
    features, wanted = problem(300)
    path, alone = fit_heads(features, wanted, [1.0, 0.1])[1], fit_heads(features, wanted, [0.1])[0]
    logits, again = F.linear(features, *path), F.linear(features, *alone)
    assert (logits - again).abs().max() < 1e-2 * logits.abs().max()


def test_a_constant_feature_has_no_weight():
    features, wanted = problem(100)
    features = torch.cat((features, torch.full((100, 1), 3.0)), dim=1)
    (head,) = fit_heads(features, wanted, [0.01])
    assert head.weight.isfinite().all() and not head.weight[:, -1].any()


def test_the_decay_is_strong_where_nothing_can_be_learned():
    features, wanted = problem(400)
    assert choose_decay(features, wanted)[0] <= 0.003
    assert choose_decay(features, wanted[torch.randperm(400)])[0] >= 0.3


def test_held_out_images_are_not_fitted():
    """The logits that judge an image do not depend on what the image should be."""
    features, wanted = problem(100)
    held_out = torch.arange(100) % 10 == 9
    other = torch.where(held_out[:, None], 1 - wanted, wanted)
    (one, logits), (two, again) = choose_decay(features, wanted), choose_decay(features, other)
    heads = fit_heads(features[~held_out], wanted[~held_out], fitting.DECAYS)
    for decay, found in ((one, logits), (two, again)):
        head = heads[fitting.DECAYS.index(decay)]
        torch.testing.assert_close(found, F.linear(features[held_out], *head))


def test_it_learns_the_target_without_labels(target, fitted):
    images = varied_images(300)
    truth = target(images).argmax(1)
    assert truth.bincount().max() < 200, "a constant answer would be right often"
    assert (predicted(fitted.guidance, target, images) == truth).double().mean() > 0.85
    assert fitted.agreement > 0.8 and fitted.images == 200
    assert fitted.flops == pytest.approx(6.2e7, rel=0.01)  # timm's test_byobnet at 160 pixels


def test_agreement_is_that_of_the_held_out_images(target, photos, monkeypatch):
    monkeypatch.setattr(fitting, "choose_decay", lambda own, wanted: (0.1, torch.eye(5)[torch.zeros(20).long()]))
    (found,) = fit_one(target, [photos], [tiny_guidance()])
    assert found.agreement == (target(photos[9::10]).argmax(1) == 0).double().mean().item()


def test_the_backbone_sees_its_own_normalisation(target, photos):
    """The head is fitted to timm's own features of the images, as the backbone expects them."""
    backbone = timm.create_model("test_byobnet")
    backbone.pretrained_cfg = backbone.pretrained_cfg | {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    guidance = tdk.Guidance(backbone)
    (mean, std), (own_mean, own_std) = (
        torch.tensor(pair)[..., None, None] for pair in (normalization_of(target, 3), (guidance.mean, guidance.std))
    )
    small = F.interpolate(photos, size=guidance.input_size, mode="bilinear", antialias=True)
    seen = (small * std + mean - own_mean) / own_std
    wanted = backbone.eval().forward_head(backbone.forward_features(seen), pre_logits=True)
    _, _, (features,) = fitting._collect(target, [guidance], photos.split(64), 5, progress=False)
    torch.testing.assert_close(features, wanted, atol=1e-4, rtol=1e-3)


def test_labels_count_as_much_as_the_answers(target, photos):
    """With labels that are always class 0, every image gets at least about half of its probability there."""
    photos, backbone = photos[:100], tiny_guidance()
    (alone,) = fit_one(target, [photos], [backbone])
    (both,) = fit_one(target, [(photos, torch.zeros(100).long())], [backbone])
    normalization = normalization_of(target, 3)
    said = [one.guidance(photos, *normalization).logits.softmax(1)[:, 0].mean() for one in (alone, both)]
    answered = target(photos).softmax(1)[:, 0].mean()
    assert said[0] == pytest.approx(answered.item(), abs=0.02)
    assert said[1] == pytest.approx((1 + answered.item()) / 2, abs=0.02)


def test_a_patched_target_gives_its_dense_answers(target, photos, fitted):
    patched = tdk.patch(copy.deepcopy(target), tiny_guidance(), tdk.DropPolicy.cascade(0.01))
    (again,) = fit_one(patched, photos.split(64), [load_of(fitted)])
    torch.testing.assert_close(again.model.head.fc.weight, fitted.model.head.fc.weight, atol=1e-3, rtol=1e-2)
    assert patched.tinydrop.last is None and patched.tinydrop.policy == tdk.DropPolicy.cascade(0.01)


def load_of(fitted: FittedGuidance) -> nn.Module:
    """Return the backbone with a head that must not matter."""
    backbone = copy.deepcopy(fitted.model)
    backbone.reset_classifier(7)
    return backbone


def test_the_given_model_stays_as_it_is(target, photos):
    backbone = timm.create_model("test_byobnet", num_classes=7).train()
    before, config = copy.deepcopy(backbone.state_dict()), dict(backbone.pretrained_cfg)
    fit_one(target, [photos[:40]], [backbone])
    assert backbone.training and backbone.num_classes == 7 and backbone.pretrained_cfg == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_inference_mode_and_for_the_target_in_its_dtype(target, photos, dtype):
    with torch.inference_mode():
        images = photos.clone()  # an inference tensor, which autograd refuses
        vit = copy.deepcopy(target).to(dtype)
        guidance = tdk.fit_guidance(vit, images.split(64), timm.create_model("test_byobnet"), progress=False)
        answers = tdk.patch(vit, guidance)(images[:8].to(dtype))
    assert next(guidance.parameters()).dtype == torch.float32
    assert answers.dtype == dtype and answers.shape == (8, 5)


def test_the_best_agrees_most_and_then_costs_least(target, photos, monkeypatch):
    def one(agreement, flops):
        return FittedGuidance(None, f"{agreement} {flops}", agreement, flops, 0.1, 20)

    fits = {"a": one(0.8, 1), "b": one(0.9, 9), "c": one(0.9, 5)}
    monkeypatch.setattr(fitting, "fit_each", lambda model, loader, names, progress: [fits[name] for name in names])
    assert tdk.fit_guidance(target, [photos], ["a", "b", "c"]) == "0.9 5"
    assert tdk.fit_guidance(target, [photos], "a") == "0.8 1"


@pytest.mark.parametrize("name", ["test_byobnet", pytest.param("efficientformerv2_s0", marks=pytest.mark.slow)])
def test_saved_and_loaded(target, photos, name, tmp_path):
    """The folder gives the same answers in timm's own model. EfficientFormer has two heads, which are averaged."""
    (found,) = fit_one(target, [photos[:40]], [timm.create_model(name)])
    found.save(tmp_path / "guidance")
    loaded = load_model(str(tmp_path / "guidance"))
    assert class_names(loaded) == ["ant", "bee", "cat", "dog", "eel"] == class_names(found.model)
    images = torch.randn(3, 3, *found.guidance.input_size)
    torch.testing.assert_close(found.guidance(images).logits, loaded(images), atol=1e-2, rtol=1e-3)
    patched = tdk.patch(copy.deepcopy(target), str(tmp_path / "guidance"))
    assert patched(photos[:4]).shape == (4, 5)


def test_a_model_that_cannot_be_loaded_is_noticed_when_it_is_saved(fitted, tmp_path):
    model = copy.deepcopy(fitted.model)
    model.extra = nn.Linear(2, 2)  # timm cannot know of it
    with pytest.raises(tdk.CheckpointError, match="^guidance: the weights of .* could not be loaded: .*extra"):
        fitted._replace(model=model).save(tmp_path / "guidance")


@pytest.mark.slow
def test_a_distilled_transformer(target, photos):
    """Each head sees its own token. Equal heads give the head of the mean token."""
    backbone = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64)
    (found,) = fit_one(target, photos.split(64), [backbone])
    assert torch.equal(found.model.head.weight, found.model.head_dist.weight)
    assert found.agreement > 0.7


class SquaredLogits(timm.models.ByobNet):
    """A model whose logits are not linear in its pooled features."""

    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x, pre_logits=pre_logits) ** (1 if pre_logits else 2)


def not_linear():
    model = timm.create_model("test_byobnet")
    model.__class__ = SquaredLogits
    return model


@pytest.mark.parametrize(
    ("guidance", "error", "message"),
    [
        (lambda: 7, TypeError, "guidance: got int, expected a timm name or a timm model"),
        (lambda: tdk.Guidance(tiny_guidance()), TypeError, "guidance: got Guidance, expected"),
        (lambda: "no_such_model", ValueError, "guidance: got 'no_such_model', expected the name of a timm model"),
        (list, ValueError, "guidance: got none, expected one or more"),
        (lambda: nn.Linear(2, 2), tdk.GuidanceError, "guidance: Linear cannot be given a head of 5 classes"),
        (
            lambda: timm.create_model("levit_128s"),
            tdk.GuidanceError,
            "guidance: the classifier of LevitDistilled is NormLinear, expected nn.Linear with a bias",
        ),
        (
            not_linear,
            tdk.GuidanceError,
            "guidance: the logits of SquaredLogits are not its classifier on its pooled features",
        ),
        (lambda: timm.create_model("test_byobnet", in_chans=1), ValueError, "guidance: it sees 1 channels"),
    ],
)
def test_backbones_that_are_refused(target, guidance, error, message):
    def loader():
        raise AssertionError("images were read before the backbone was refused")
        yield

    with pytest.raises(error, match=f"^{message}"):
        tdk.fit_guidance(target, loader(), guidance(), progress=False)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: timm.create_model("resnet18"), tdk.UnsupportedModelError, ""),
        (lambda: tiny_vit(num_classes=0), ValueError, "model: got one with 0 classes, expected a classifier of 2"),
        (lambda: tiny_vit(num_classes=1), ValueError, "model: got one with 1 classes, expected a classifier of 2"),
        (lambda: tiny_vit().train(), ValueError, "model: it is in training mode"),
        (lambda: tdk.patch(tiny_vit(), tiny_guidance(), multi_label=True), ValueError, "model: it is multi-label"),
    ],
)
def test_targets_that_are_refused(model, error, message):
    with pytest.raises(error, match=f"^{message}"):
        tdk.fit_guidance(model(), [], tiny_guidance(), progress=False)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "loader: got 0 images, expected at least 20"),
        ([torch.randn(19, 3, 32, 32)], ValueError, "loader: got 19 images, expected at least 20"),
        ([torch.full((20, 3, 32, 32), float("nan"))], ValueError, "model: its answers .* are not finite"),
        (["photo.jpg"], TypeError, "loader: got a batch of str"),
        ([torch.zeros(20, 3, 32, 32, dtype=torch.uint8)], TypeError, "loader: got images in torch.uint8"),
        ([(torch.randn(20, 3, 32, 32), torch.full((20,), 5))], ValueError, "loader: got labels 5 to 5, expected 0 to"),
        ([(torch.randn(20, 3, 32, 32), torch.zeros(19).long())], ValueError, r"loader: got labels int64 \(19,\)"),
        ([(torch.randn(2, 3, 32, 32), torch.zeros(2).long()), torch.randn(20, 3, 32, 32)], ValueError, "loader: got b"),
        ([torch.randn(20, 1, 32, 32)], ValueError, "images: got 1 channels, expected 3"),
    ],
)
def test_images_that_are_refused(target, loader, error, message):
    with pytest.raises(error, match=f"^{message}"):
        tdk.fit_guidance(target, loader, tiny_guidance(), progress=False)
