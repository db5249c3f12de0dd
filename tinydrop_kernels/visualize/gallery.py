"""A folder of pictures of the kept patches, and an HTML page that shows all of them."""

import base64
import io
import re
from pathlib import Path

from PIL import Image

from tinydrop_kernels.predict.prediction import PredictedBatch
from tinydrop_kernels.predict.predictor import Predictor
from tinydrop_kernels.predict.whole_file import replacing
from tinydrop_kernels.visualize.page import Card, render
from tinydrop_kernels.visualize.pictures import as_pictures, on_own_grid, saliency, side_by_side

PAGE = "index.html"
LARGEST = 256  # pixels of the longer side of a picture on the page
LONGEST = 120  # bytes of an image's name that its PNG file name keeps, because file systems limit names to 255 bytes


class Gallery:
    """A writer of pictures of a predictor's batches, and of a page with all of them.

    Args:
        folder: an existing folder for the files.
        predictor: the predictor that classified the batches. Its report opens the page.

    Attributes:
        cards: one card per image so far.
    """

    def __init__(self, folder: Path, predictor: Predictor):
        self.folder = folder
        self.predictor = predictor
        self.cards: list[Card] = []

    def add(self, seen: PredictedBatch) -> None:
        """Write a PNG file per image of a batch: the input, the saliency and the kept patches, side by side.

        Raises:
            OSError: a file cannot be written.
        """
        for i, (picture, row) in enumerate(zip(as_pictures(self.predictor.model, seen.images), seen.rows, strict=True)):
            pictures = picture, saliency(picture, seen.call, i), on_own_grid(picture, seen.call, i)
            file = f"{len(self.cards) + 1:04d}_{_as_file_name(row.name)}.png"
            side_by_side(pictures).save(self.folder / file)
            self.cards.append(Card(row, file, tuple(map(_as_uri, pictures))))

    def write(self) -> Path:
        """Write the page and return its path.

        Raises:
            OSError: the page cannot be written. An earlier page then stays as it is.
        """
        path, predictor = self.folder / PAGE, self.predictor
        assert predictor.report is not None  # callers write only after a batch was added
        with replacing(path) as part:
            part.write_text(render(predictor.model, predictor.report, self.cards), encoding="utf-8")
        return path


def _as_file_name(name: str) -> str:
    """Return a path's last part without its ending, limited to characters that all file systems accept."""
    stem = Path(name).stem if not name.startswith("#") else "image"
    return re.sub(r"[^\w.-]+", "_", stem).encode()[:LONGEST].decode(errors="ignore")


def _as_uri(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=75, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
