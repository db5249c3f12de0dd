"""Token dropping for timm's Vision Transformers that is faster, not only smaller on paper.

import timm, tinydrop_kernels as tdk
model = timm.create_model("vit_base_patch16_224.augreg_in21k_ft_in1k", pretrained=True).eval()
tdk.patch(model)          # the same call, the same shape of answer, the same state_dict
logits = model(images)
print(model.tinydrop.report())
tdk.unpatch(model)        # exactly the model as it was
"""

from tinydrop_kernels import ops
from tinydrop_kernels.checkpoints import CheckpointError
from tinydrop_kernels.families import UnsupportedModelError
from tinydrop_kernels.guidance import Guidance, GuidanceError
from tinydrop_kernels.patching import patch, unpatch
from tinydrop_kernels.policy import DropPolicy
from tinydrop_kernels.version import __version__

__all__ = [
    "CheckpointError",
    "DropPolicy",
    "Guidance",
    "GuidanceError",
    "UnsupportedModelError",
    "__version__",
    "ops",
    "patch",
    "unpatch",
]
