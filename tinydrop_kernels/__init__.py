"""Token dropping for timm's Vision Transformers that saves time, not only FLOPs.

import timm, tinydrop_kernels as tdk
model = timm.create_model("vit_base_patch16_224.augreg_in21k_ft_in1k", pretrained=True).eval()
tdk.patch(model)          # same call, same shape of the answers, same state_dict
answers = model(images)   # log-probabilities, because the guidance model answers some of the images
print(model.tinydrop.report())
tdk.unpatch(model)        # exactly the model as it was
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tinydrop_kernels.version import __version__

if TYPE_CHECKING:
    from tinydrop_kernels import ops
    from tinydrop_kernels.benchmarking import benchmark, compare_with_dense
    from tinydrop_kernels.calibration import calibrate
    from tinydrop_kernels.checkpoints import CheckpointError
    from tinydrop_kernels.engine import Pipeline
    from tinydrop_kernels.families import UnsupportedModelError
    from tinydrop_kernels.guidance import Guidance, GuidanceError
    from tinydrop_kernels.guidance.fitting import fit_guidance
    from tinydrop_kernels.ops import Saliency
    from tinydrop_kernels.patching import dense, is_patched, patch, patched, unpatch
    from tinydrop_kernels.policy import DropPolicy
    from tinydrop_kernels.policy.calibrated import CalibratedPolicy, PolicyFileError
    from tinydrop_kernels.predict import Evaluation, Prediction, Predictor, evaluate

__all__ = [
    "CalibratedPolicy",
    "CheckpointError",
    "DropPolicy",
    "Evaluation",
    "Guidance",
    "GuidanceError",
    "Pipeline",
    "PolicyFileError",
    "Prediction",
    "Predictor",
    "Saliency",
    "UnsupportedModelError",
    "__version__",
    "benchmark",
    "calibrate",
    "compare_with_dense",
    "dense",
    "evaluate",
    "fit_guidance",
    "is_patched",
    "ops",
    "patch",
    "patched",
    "unpatch",
]

# The module that defines each public name. Names are imported at first use, so that `ops` works without timm installed.
_HOMES = {
    "CalibratedPolicy": "policy.calibrated",
    "CheckpointError": "checkpoints",
    "DropPolicy": "policy",
    "Evaluation": "predict",
    "Guidance": "guidance",
    "GuidanceError": "guidance",
    "Pipeline": "engine",
    "PolicyFileError": "policy.calibrated",
    "Prediction": "predict",
    "Predictor": "predict",
    "Saliency": "ops",
    "UnsupportedModelError": "families",
    "benchmark": "benchmarking",
    "calibrate": "calibration",
    "compare_with_dense": "benchmarking",
    "dense": "patching",
    "evaluate": "predict",
    "is_patched": "patching",
    "fit_guidance": "guidance.fitting",
    "patch": "patching",
    "patched": "patching",
    "unpatch": "patching",
}
_ROOMS = ("calibration", "checkpoints", "engine", "families", "guidance", "ops", "policy", "predict", "visualize")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        value: Any = import_module(f"tinydrop_kernels.{name}")
    elif name in _HOMES:
        value = getattr(import_module(f"tinydrop_kernels.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'tinydrop_kernels' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
