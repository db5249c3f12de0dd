"""Every public name has an example in its docstring, and the examples are true."""

import doctest
import inspect

import pytest
import timm
import torch

import tinydrop_kernels as tdk
from tinydrop_kernels import checkpoints, engine, families, ops, report
from tinydrop_kernels.guidance import fitting
from tinydrop_kernels.predict import images, row_file, whole_file

PUBLIC = {name: getattr(tdk, name) for name in tdk.__all__ if name not in ("__version__", "ops", "compare_with_dense")}
PUBLIC |= {f"ops.{name}": getattr(ops, name) for name in ops.__all__}
PUBLIC |= {
    "engine.TinyDrop": engine.TinyDrop,
    "families.family_of": families.family_of,
    "families.find_mismatch": families.find_mismatch,
    "checkpoints.load_model": checkpoints.load_model,
    "checkpoints.class_names": checkpoints.class_names,
    "checkpoints.difference_from_checkpoint": checkpoints.difference_from_checkpoint,
    "guidance.fitting.fit_each": fitting.fit_each,
    "predict.images.load_image": images.load_image,
    "predict.images.image_files": images.image_files,
    "predict.row_file.RowFile": row_file.RowFile,
    "predict.row_file.format_of": row_file.format_of,
    "predict.row_file.remaining": row_file.remaining,
    "predict.whole_file.replacing": whole_file.replacing,
    "report.Call": report.Call,
    "report.Report": report.Report,
    "visualize.kept_patches": tdk.visualize.kept_patches,
    "visualize.saliency": tdk.visualize.saliency,
    "visualize.as_pictures": tdk.visualize.as_pictures,
}


@pytest.mark.parametrize("name", PUBLIC)
def test_examples(name):
    if not (inspect.isclass(PUBLIC[name]) or inspect.isroutine(PUBLIC[name])):
        pytest.skip(f"{name} is a value, whose docstring is its type's")
    found = [test for test in doctest.DocTestFinder().find(PUBLIC[name], name, globs={}) if test.examples]
    assert found, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    printed = []
    for test in found:  # a fresh model for each, which it may patch
        model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
        guidance = timm.create_model("test_byobnet", num_classes=10).eval()
        test.globs = {"torch": torch, "timm": timm, "tdk": tdk, "ops": ops, "model": model, "guidance": guidance}
        test.globs["images"] = torch.randn(2, 3, 224, 224)
        runner.run(test, out=printed.append)
    assert not runner.failures, "".join(printed)
