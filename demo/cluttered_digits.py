"""Cluttered digits: handwritten digits hidden in photographs, made on the fly.

As in cluttered MNIST, one handwritten digit is pasted at a random place of a photograph, among fragments of other
digits. The digits are scikit-learn's copy of the UCI optical digits, and the photographs are public-domain ones of
scikit-image. The class is the digit, so a model that knows where to look can drop most of the image.

``split="train"`` and ``split="test"`` have no digit image and no photograph in common.
"""

import numpy as np
import torch
import torch.nn.functional as F
from skimage import data as photographs
from skimage.color import gray2rgb
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

IMAGE_SIZE = 224
CLASS_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TRAIN_DIGITS = 1297  # the first 1297 of scikit-learn's 1797 digits; the other 500 are for testing
TRAIN_PHOTOGRAPHS = ("astronaut", "camera", "brick", "grass", "gravel", "moon", "hubble_deep_field")
TEST_PHOTOGRAPHS = ("chelsea", "coffee", "rocket")
STROKE_SIZE = 64  # side in pixels that the 8 x 8 digits are upsampled to when they are loaded
FRAGMENTS = 8


class Cluttered(Dataset):
    """A data set of ``length`` images of cluttered digits.

    An item is ``(image, label, box)``. The image is uint8 ``(224, 224, 3)``, the label is the digit, and the box is
    int64 ``(top, left, bottom, right)``, the digit's place in pixels.

    Args:
        split: ``"train"`` or ``"test"``. It selects the handwriting and the photographs.
        length: number of images.
        seed: seed of the random numbers. Image ``i`` depends on ``(seed, i)`` alone.
        easy: number of easier images at the start. The first has a digit twice as large and no fragments, and the
            difficulty rises to that of the other images.
    """

    def __init__(self, split: str, length: int, seed: int = 0, easy: int = 0):
        digits = load_digits()
        chosen = slice(None, TRAIN_DIGITS) if split == "train" else slice(TRAIN_DIGITS, None)
        strokes = torch.from_numpy(digits.images[chosen] / 16.0).float()[:, None]
        strokes = F.interpolate(strokes, size=STROKE_SIZE, mode="bicubic", align_corners=False)
        self.strokes = strokes[:, 0].clamp(0, 1)
        self.labels = digits.target[chosen]
        names = TRAIN_PHOTOGRAPHS if split == "train" else TEST_PHOTOGRAPHS
        self.photographs = [_as_rgb(getattr(photographs, name)()) for name in names]
        self.length = length
        self.seed = seed
        self.easy = easy

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, np.ndarray]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, index))
        canvas = self._background(rng)
        ease = max(0.0, 1 - index / self.easy) if self.easy else 0.0
        for _ in range(round(FRAGMENTS * (1 - ease))):
            stroke = self._stroke(rng, rng.integers(len(self.strokes)), size=rng.integers(48, 89))
            side = int(rng.integers(12, 25))
            top, left = rng.integers(0, stroke.shape[0] - side, size=2)
            _paste(rng, canvas, stroke[top : top + side, left : left + side])
        chosen = int(rng.integers(len(self.strokes)))
        box = _paste(rng, canvas, self._stroke(rng, chosen, size=rng.integers(56, 97) * (1 + ease)))
        return (canvas * 255).round().astype(np.uint8), int(self.labels[chosen]), box

    def _background(self, rng) -> np.ndarray:
        photograph = self.photographs[rng.integers(len(self.photographs))]
        side = int(rng.integers(150, min(photograph.shape[:2]) + 1))
        top = int(rng.integers(photograph.shape[0] - side + 1))
        left = int(rng.integers(photograph.shape[1] - side + 1))
        crop = torch.from_numpy(photograph[top : top + side, left : left + side]).permute(2, 0, 1)[None]
        crop = F.interpolate(crop, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False, antialias=True)
        pixels = crop[0].permute(1, 2, 0).numpy()
        return 0.6 * (pixels[:, ::-1] if rng.random() < 0.5 else pixels)  # darker than the strokes

    def _stroke(self, rng, index, size) -> np.ndarray:
        """Return a digit, rotated by up to 15 degrees, as opacities in [0, 1] of shape ``(size, size)``."""
        angle = float(rng.uniform(-np.pi / 12, np.pi / 12))
        rotation = torch.tensor([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]]).float()
        grid = F.affine_grid(rotation[None], [1, 1, int(size), int(size)], align_corners=False)
        return F.grid_sample(self.strokes[index][None, None], grid, align_corners=False)[0, 0].numpy()


def _as_rgb(photograph: np.ndarray) -> np.ndarray:
    rgb = gray2rgb(photograph) if photograph.ndim == 2 else photograph
    return rgb.astype(np.float32) / 255.0


def _paste(rng, canvas: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Blend a stroke in a random light colour into ``canvas`` at a random place. Return (top, left, bottom, right)."""
    height, width = opacity.shape
    top = int(rng.integers(canvas.shape[0] - height + 1))
    left = int(rng.integers(canvas.shape[1] - width + 1))
    region = canvas[top : top + height, left : left + width]
    alpha = 0.9 * opacity[..., None]
    region[:] = region * (1 - alpha) + rng.uniform(0.7, 1.0, size=3).astype(np.float32) * alpha
    return np.array([top, left, top + height, left + width])
