"""Classification of image files, bytes and arrays with a patched model, one row per image."""

from tinydrop_kernels.predict.prediction import Prediction
from tinydrop_kernels.predict.predictor import Predictor

__all__ = ["Prediction", "Predictor"]
