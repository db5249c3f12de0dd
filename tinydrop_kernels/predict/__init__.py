"""From image files, bytes and arrays to rows."""

from tinydrop_kernels.predict.prediction import Prediction
from tinydrop_kernels.predict.predictor import Predictor

__all__ = ["Prediction", "Predictor"]
