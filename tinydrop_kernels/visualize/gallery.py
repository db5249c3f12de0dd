"""A folder of pictures of what a patched model looked at, and a page of all of them."""

import base64
import io
import re
from pathlib import Path

from PIL import Image

from tinydrop_kernels.predict.prediction import PredictedBatch
from tinydrop_kernels.predict.predictor import Predictor
from tinydrop_kernels.predict.row_file import RowFile
from tinydrop_kernels.visualize.page import Card, render
from tinydrop_kernels.visualize.pictures import as_pictures, on_own_grid, saliency, side_by_side

PAGE = "index.html"
LARGEST = 256  # pixels of the longer side of a picture on the page
LONGEST = 120  # bytes of an image's name in that of its PNG file


class Gallery:
    """Collects what batches of a predictor looked at.

    Args:
        folder: where the files go; it exists.
        predictor: its model is who looked, and its report is what the page begins with.

    Attributes:
        cards: one for each image so far.
    """

    def __init__(self, folder: Path, predictor: Predictor):
        self.folder = folder
        self.predictor = predictor
        self.cards: list[Card] = []

    def add(self, seen: PredictedBatch) -> None:
        """Draw a batch, and write a PNG file for each image: input, saliency and what the target saw, side by side.

        Raises:
            OSError: a file cannot be written.
        """
        for i, (picture, row) in enumerate(zip(as_pictures(self.predictor.model, seen.images), seen.rows, strict=True)):
            pictures = picture, saliency(picture, seen.call, i), on_own_grid(picture, seen.call, i)
            file = f"{len(self.cards) + 1:04d}_{_as_file_name(row.name)}.png"
            side_by_side(pictures).save(self.folder / file)
            self.cards.append(Card(row, file, tuple(map(_as_uri, pictures))))

    def write(self) -> Path:
        """Write the page, and say where it is.

        Raises:
            RowFileError: it cannot be written.
        """
        path, predictor = self.folder / PAGE, self.predictor
        assert predictor.report is not None  # or there would be no card
        with RowFile(path) as file:
            file.write(render(predictor.model, predictor.report, self.cards))
        return path


def _as_file_name(name: str) -> str:
    """The last part of a path without its ending, in letters that no system minds."""
    stem = Path(name).stem if not name.startswith("#") else "image"
    return re.sub(r"[^\w.-]+", "_", stem).encode()[:LONGEST].decode(errors="ignore")


def _as_uri(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=75, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
