"""Folders that commands read: checkpoints, and images in class folders."""

import numpy as np
from PIL import Image
from timm.models import save_for_hf

NAMES = ["ant", "bee", "cat", "dog", "eel"]
CONFIG = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "input_size": (3, 32, 32)}


def save_model(model, folder, names=NAMES):
    """Save a checkpoint as timm does, with the names of its classes if there are some."""
    config = {"label_names": names} if names else {}
    save_for_hf(model, folder, model_config=config, data_config=CONFIG, safe_serialization=True)


def save_images(folder, counts, side=40, size=(40, 40)):
    """Save so many images of noise for each class, and one file that is no image.

    Args:
        folder: gets a folder for each of NAMES.
        counts: numbers of images, one for each class.
        side: height and width of the noise.
        size: width and height that it is resized to.
    """
    rng = np.random.default_rng(0)
    for name, count in zip(NAMES, counts, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize(size).save(folder / name / f"{number}.png")
    (folder / "ant" / "broken.png").write_text("no image")
