"""Classification of image files, bytes and arrays with a patched model, one row per image, and its evaluation."""

from tinydrop_kernels.predict.evaluation import Evaluation, Score, evaluate
from tinydrop_kernels.predict.prediction import Prediction
from tinydrop_kernels.predict.predictor import Predictor

__all__ = ["Evaluation", "Prediction", "Predictor", "Score", "evaluate"]
