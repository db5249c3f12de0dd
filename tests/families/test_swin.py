"""Tests that compare patched Swin and SwinV2 models with timm. Cells of the last stage's grid are dropped as a whole.

The expected logits of a subset come from timm's dense forward after ``set_input_size`` for the image's own grid. An
additive mask hides the dropped tokens from every window, and the features are pooled over the kept cells.
"""

import copy
import sys

import pytest
import timm
import torch
from counting import DEVICE, READS, SizesFromValues, assert_same_on_the_kernels, counted
from helpers import close, spread_confidence, tiny_guidance, varied_images, with_random_weights
from slow import mostly_slow
from timm.models.swin_transformer import window_partition
from torch.utils.flop_counter import FlopCounterMode
from zoo import SMALL_SWIN, SWIN, SWIN_V2, SWINS, make_swin, tiny_swin

import tinydrop_kernels as tdk
from tinydrop_kernels import ops
from tinydrop_kernels.engine import steps
from tinydrop_kernels.families import family_of
from tinydrop_kernels.families import swin_windows as windows


def masked_at_its_grid(model, image, grid, kept):
    """Return timm's logits of one image at its own grid of cells, with all cells masked except ``kept``."""
    model = copy.deepcopy(model)
    cell = image.shape[-2] // family_of(model).grid_size(model, image)[0]
    size = (grid[0] * cell, grid[1] * cell)
    if size != tuple(image.shape[-2:]):
        image = torch.nn.functional.interpolate(image, size=size, mode="bicubic", antialias=True)
        model.set_input_size(img_size=size)
    cells = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    cells[kept.long()] = True
    for stage in model.layers:
        for block in stage.blocks:
            rows, columns = block.input_resolution
            seen = (
                cells.view(1, *grid, 1).repeat_interleave(rows // grid[0], 1).repeat_interleave(columns // grid[1], 2)
            )
            seen = window_partition(seen.roll([-n for n in block.shift_size], (1, 2)), block.window_size)
            # The mask is finite, because -inf would give NaN in windows where every token is masked.
            hidden = torch.where(seen.flatten(1), 0.0, -1e4)[:, None].expand(-1, block.window_area, -1)
            block.attn_mask = hidden if block.attn_mask is None else block.attn_mask + hidden
    features = model.forward_features(image).flatten(1, 2)[:, cells]
    return model.forward_head(features[:, None])


@pytest.mark.parametrize("key", SWINS)
def test_keep_everything_is_dense_timm(key):
    model, images = make_swin(key)
    with torch.inference_mode():
        wanted = model(images)
        tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(1.0))
        close(model(images), wanted)


@pytest.mark.parametrize("coarsen", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("key", mostly_slow(SWINS, "v1", "v1, shifted one way", "v2"))
def test_subsets_and_levels_are_timm_masked_at_those_sizes(key, coarsen):
    model, images = make_swin(key)
    images = torch.cat([images, images.flip(0) * 2])
    tdk.patch(
        model, tiny_guidance(sharpness=60.0), tdk.DropPolicy(None, 1.0, 0.15, coarsen, blend=0.0, second_look=None)
    )
    model.tinydrop.guidance.register_forward_hook(spread_confidence)
    with torch.inference_mode():
        out = model(images)
        kept, grids = model.tinydrop.last.kept, model.tinydrop.last.grid_sizes
        tdk.unpatch(model)
        assert len(set(grids)) == 1 if coarsen == 0 else len(set(grids)) > 1
        dropped = [len(cells) < rows * columns for cells, (rows, columns) in zip(kept, grids, strict=True)]
        assert any(dropped) == (coarsen < 1)
        for b, (cells, grid) in enumerate(zip(kept, grids, strict=True)):
            close(out[b : b + 1], masked_at_its_grid(model, images[b : b + 1], grid, cells))


NAMES = [n for f in ("swin_*", "swinv2_*") for n in timm.list_models(f) if not n.startswith("swinv2_cr")]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_timm(name):
    """Check each Swin name of timm at its own image size, with half of the cells of one image."""
    model = with_random_weights(
        timm.create_model(name, num_classes=5, embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1,) * 4)
    )
    image = varied_images(1, model.patch_embed.img_size[0])
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(0.5, coarsen=0.3))
    with torch.inference_mode():
        out = model(image)
        kept, grid = model.tinydrop.last.kept[0], model.tinydrop.last.grid_sizes[0]
        assert 0 < len(kept) < grid[0] * grid[1] < 49 * 4
        close(out, masked_at_its_grid(tdk.unpatch(model), image, grid, kept))


@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(name, dtype):
    model, images = tiny_swin(name), varied_images(6, 128)
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(0.3, coarsen=0.5))
    with torch.inference_mode():
        wanted, kept = model(images), model.tinydrop.last.selection.indices
        out = model.to(dtype)(images.to(dtype))
        same = (model.tinydrop.last.selection.indices == kept).all(dim=1)
    assert same.any() and out.dtype == dtype
    assert (out[same].float() - wanted[same]).abs().max() <= 2e-2 * wanted.abs().max()


@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
def test_autocast(name):
    model, images = tiny_swin(name), varied_images(4, 128)
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(0.3, coarsen=0.5))
    with torch.inference_mode():
        wanted, kept = model(images), model.tinydrop.last.selection.indices
        with torch.autocast("cpu", torch.bfloat16):
            out = model(images)
        same = (model.tinydrop.last.selection.indices == kept).all(dim=1)
        assert same.any()
        assert (out[same].float() - wanted[same]).abs().max() <= 2e-2 * wanted.abs().max()
        assert torch.equal(model(images), wanted), "nothing that autocast made is kept"


@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
def test_exits_blend_and_second_look(name):
    model, images = tiny_swin(name), varied_images(8, 128)
    guidance = tiny_guidance()
    policy = tdk.DropPolicy(tau=0.6, gamma=1.0, min_keep=0.1, coarsen=0.5, blend=0.3, second_look=(1.0, 1.0))
    with torch.inference_mode():
        dense = model(images)
        tdk.patch(model, guidance, policy)
        model.tinydrop.guidance.register_forward_hook(spread_confidence)
        out, last = model(images), model.tinydrop.last
        assert last.exited.any() and not last.exited.all() and last.second_look.any()
        own = steps.guide(model.tinydrop, images).logits
        close(out[last.exited], own[last.exited].log_softmax(1))
        probabilities = 0.7 * dense.softmax(1) + 0.3 * own.softmax(1)
        close(out[last.second_look], probabilities[last.second_look].log())


@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
def test_every_image_as_if_alone(name):
    model, images = tiny_swin(name), varied_images(6, 128)
    images[2] = float("nan")
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy(0.6, 1.0, 0.1, coarsen=0.4, blend=0.0, second_look=None))
    with torch.inference_mode():
        together = model(images)
        for b in range(6):
            torch.testing.assert_close(
                together[b : b + 1], model(images[b : b + 1]), atol=1e-5, rtol=1e-4, equal_nan=True
            )
    assert together[2].isnan().all() and together.isnan().any(1).sum() == 1


@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
def test_same_answers_on_the_kernels(name):
    model, images = tiny_swin(name, img_size=32, window_size=2, depths=(2, 1)), varied_images(3, 32)
    assert_same_on_the_kernels(model.to(DEVICE), images.to(DEVICE))


@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
def test_features_are_in_place(name):
    model, images = tiny_swin(name), varied_images(3, 128)
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(1.0))
    with torch.inference_mode():
        features, mask = model.tinydrop.features(images)
        close(features, model.forward_features(images).permute(0, 3, 1, 2))
        assert mask.all() and mask.shape == (3, 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
def test_windows_are_found_without_reading_back(name, monkeypatch):
    """Check that a batch on the Triton kernels reads values back only once, in pack, for any windows."""
    model = tiny_swin(name, img_size=32, window_size=2, depths=(2, 1)).to(DEVICE)
    images = varied_images(3, 32).to(DEVICE)
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy(tau=0.6, gamma=1.0, min_keep=0.1, coarsen=0.5, second_look=None))
    reads = []

    def counting(name, method):
        def read(*args, **kwargs):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith(("tinydrop_kernels", "timm")):
                reads.append(f"{caller}: {name}")
            return method(*args, **kwargs)

        return read

    with torch.inference_mode(), ops.use_backend("triton"):
        model(images)  # the first call computes the biases
        for read in READS:
            monkeypatch.setattr(torch.Tensor, read, counting(read, getattr(torch.Tensor, read)))
        with SizesFromValues() as sizes:
            model(images)
    assert not model.tinydrop.last.exited.all()
    assert sizes.found == [] and reads == ["tinydrop_kernels.ops.packing: tolist"]


@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
def test_gradients_are_timms(name):
    model, images = tiny_swin(name), torch.randn(2, 3, 128, 128)
    wanted = torch.autograd.grad(model(images).square().sum(), list(model.parameters()), allow_unused=True)
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(1.0))
    out = torch.autograd.grad(model(images).square().sum(), list(model.parameters()), allow_unused=True)
    for (parameter, _), got, expected in zip(model.named_parameters(), out, wanted, strict=True):
        assert (got - expected).norm() <= 1e-4 * expected.norm() + 1e-6, parameter


@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
def test_biases_follow_the_weights(name):
    """Check that biases are kept between calls at every grid and recomputed when the weights change."""
    model, images = tiny_swin(name), varied_images(3, 128)
    attention = model.layers[0].blocks[0].attn
    weight = attention.relative_position_bias_table if name == SWIN else attention.cpb_mlp[0].weight
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(0.3, coarsen=0.5))
    with torch.no_grad():
        before = model(images)
        assert torch.equal(model(images), before)
        weight.mul_(3.0)
        assert not torch.equal(model(images), before)
        weight.div_(3.0)
        torch.testing.assert_close(model(images), before)


@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
def test_unpatching_leaves_the_model_as_it_was(name):
    model, images = tiny_swin(name), torch.randn(2, 3, 128, 128)
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        wanted = model(images)
        tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(0.3, coarsen=0.5))
        model(images)
        assert torch.equal(model.tinydrop.dense(images), wanted)
        tdk.unpatch(model)
        assert torch.equal(model(images), wanted)
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == before
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in state.items())


@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
def test_copies_and_hooks_on_what_is_called(name):
    model, images = tiny_swin(name), torch.randn(2, 3, 128, 128)
    block = model.layers[1].blocks[0]
    called = [model.patch_embed.norm, block.norm1, block.mlp, block.attn.proj, model.layers[2].downsample, model.norm]
    called += [model.head.fc, model.head.drop] + ([block.attn.qkv] if name == SWIN else [])
    for module in called:
        module.register_forward_hook(lambda module, args, out: 1.5 * out)
    with torch.inference_mode():
        wanted = model(images)
        tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(1.0))
        close(model(images), wanted)
        close(copy.deepcopy(model)(images), wanted)


def test_a_projection_that_is_more_than_its_weight_is_called():
    model, images = tiny_swin(), torch.randn(3, 3, 128, 128)
    model.patch_embed.proj.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.warns(UserWarning, match="keeps its dense grid"):
        tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(0.5, coarsen=0.2))
    with torch.inference_mode():
        out, kept = model(images), model.tinydrop.last.kept
        tdk.unpatch(model)
        for b, cells in enumerate(kept):
            assert len(cells) < 16
            close(out[b : b + 1], masked_at_its_grid(model, images[b : b + 1], (4, 4), cells))


def test_a_model_whose_coarser_grids_timm_would_pad_keeps_its_own():
    model, images = tiny_swin(img_size=(128, 256), window_size=4), torch.randn(2, 3, 128, 256)
    with pytest.warns(UserWarning, match="keeps its dense grid"):
        tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(0.5, coarsen=0.2))
    with torch.inference_mode():
        model(images)
    assert set(model.tinydrop.last.grid_sizes) == {(4, 8)}


@pytest.mark.slow
def test_torch_compile():
    """Check that compiled and eager answers agree, and that new batches cause no recompilation after the first few."""
    model = tiny_swin(img_size=32, window_size=4, depths=(2, 1))
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy(tau=0.6, gamma=1.0, min_keep=0.1, coarsen=0.5, second_look=None))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for call in range(6):
            images = varied_images(8, 32)
            with torch._dynamo.config.patch(error_on_recompile=call >= 4):
                torch.testing.assert_close(compiled(images), model(images), atol=1e-5, rtol=1e-4)


class Other(timm.models.SwinTransformer):
    def forward_features(self, x):
        return 2 * super().forward_features(x)


def hooked(*path):
    def build():
        model = tiny_swin(SWIN_V2)
        module = model
        for name in path:
            module = module[name] if isinstance(name, int) else getattr(module, name)
        module.register_forward_hook(lambda module, args, out: out)
        return model

    return build


def own_method():
    model = tiny_swin()
    model.layers[0].blocks[0]._attn = lambda x: x
    return model


def own_block():
    class Block(timm.models.swin_transformer.SwinTransformerBlock):
        pass

    model = tiny_swin()
    model.layers[0].blocks[0].__class__ = Block
    return model


def changed_merging():
    model = tiny_swin()
    model.layers[1].downsample = torch.nn.Conv2d(16, 32, 2)
    return model


def other_mask():
    model = tiny_swin()
    model.layers[0].blocks[1].attn_mask.zero_()
    return model


def active_dropout():
    model = tiny_swin(img_size=128, window_size=4, attn_drop_rate=0.1)
    model.layers[0].blocks[0].attn.attn_drop.train()
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda: tiny_swin(img_size=160, window_size=4),
            "40 x 40 in windows of 4 x 4|in windows of 4 x 4, which timm pads",
        ),
        (lambda: tiny_swin(img_size=144, window_size=4), "36 x 36 patches, which timm pads to merge.*multiples of 8"),
        (lambda: tiny_swin(img_size=64, window_size=4, always_partition=True), "in windows of 4 x 4, which timm pads"),
        (lambda: tiny_swin(img_size=128, window_size=4, strict_img_size=False), "dynamic_img_size"),
        (lambda: tiny_swin(img_size=128, window_size=4, global_pool=""), "global_pool=''"),
        (lambda: Other(**SMALL_SWIN, img_size=128, window_size=4).eval(), "forward_features that is not timm's"),
        (hooked("layers"), "hooks or .* on layers,"),
        (hooked("layers", 1), "hooks or .* on layers.1,"),
        (hooked("layers", 1, "blocks", 0), "hooks or .* on layers.1.blocks.0,"),
        (hooked("layers", 1, "blocks", 0, "attn"), "hooks or .* on layers.1.blocks.0.attn,"),
        (hooked("layers", 1, "blocks", 0, "attn", "softmax"), "hooks or .*attn.softmax,"),
        (hooked("layers", 1, "blocks", 0, "attn", "cpb_mlp", 0), "hooks or .*attn.cpb_mlp.0,"),
        (hooked("head"), "hooks or .* on head,"),
        (hooked("head", "global_pool"), "hooks or .* on head.global_pool,"),
        (own_method, "other methods"),
        (own_block, "blocks of Block and WindowAttention"),
        (changed_merging, "beginning with Conv2d"),
        (other_mask, "blocks that are not timm's"),
        (active_dropout, "attn_drop .*random in train mode"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(build, reason):
    model = build()
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    with pytest.raises(tdk.UnsupportedModelError, match=f"with .*{reason}"):
        tdk.patch(model, tiny_guidance())
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.layers[0].blocks[0].register_forward_hook(lambda *_: None), "hooks or .* on layers.0"),
        (lambda model: model.reset_classifier(5, "") or setattr(model, "num_classes", 5), "global_pool=''"),
        (
            lambda model: setattr(model, "forward_features", model.forward_features),
            "forward_features that is not timm's",
        ),
        (lambda model: model.patch_embed.set_input_size((160, 160)), "which timm pads|blocks of a grid of"),
    ],
)
def test_changes_of_a_patched_model_are_seen(change, reason):
    model = tdk.patch(tiny_swin(), tiny_guidance(), tdk.DropPolicy.fixed(0.5))
    change(model)
    with pytest.raises(tdk.UnsupportedModelError, match=f"since it was patched, .*{reason}"):
        model(torch.randn(1, 3, 128, 128))


def test_the_wrong_size_is_refused():
    model = tdk.patch(tiny_swin(), tiny_guidance(), tdk.DropPolicy.fixed(0.5))
    with pytest.raises(ValueError, match="images: got 96 x 128, expected 128 x 128"):
        model(torch.randn(1, 3, 96, 128))


@pytest.mark.parametrize("key", mostly_slow(SWINS, "v1", "v1, catavgmax", "v2"))
def test_flops(key):
    """Check that the formula is exact for dense calls, and an upper bound for the attention of packed calls."""
    model, images = make_swin(key)
    family = family_of(model)
    dense = family.dense_flops(model, len(images), family.grid_size(model, images))
    assert dense == counted(model, images)
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(0.5, coarsen=0.5))
    with torch.no_grad():
        model(images)  # the biases are computed here and kept, so later calls do not count them
    attention, others = by_attention(model, images)
    report = model.tinydrop.report()
    assert report.dense_flops == dense
    assert 0 <= report.flops - others - attention <= attention

    tdk.unpatch(model)
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(1.0))
    assert model(images) is not None and model.tinydrop.report().flops == sum(by_attention(model, images))


def by_attention(model, images):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    attention = counter.get_flop_counts()["Global"][torch.ops.tinydrop.varlen_attention]
    return attention, counter.get_total_flops() - attention


@pytest.mark.parametrize("grid", [(2, 3), (1, 1)], ids=str)
def test_four_neighbours_lie_as_timm_merges_them(grid):
    """Check at every stage that merging is a view of the packed rows."""
    numbers = torch.arange(grid[0] * 8 * grid[1] * 8).view(1, grid[0] * 8, grid[1] * 8, 1)
    cells = torch.arange(grid[0] * grid[1], dtype=torch.int32)
    packed = windows.patch_numbers(cells, grid, 8).flatten()
    for _ in range(3):
        merged = numbers.reshape(1, numbers.shape[1] // 2, 2, numbers.shape[2] // 2, 2, -1).permute(0, 1, 3, 4, 2, 5)
        numbers = merged.flatten(3)
    assert torch.equal(packed.long(), numbers.flatten())
    assert (windows.patch_numbers(torch.tensor([-1], dtype=torch.int32), grid, 8) == -1).all()
