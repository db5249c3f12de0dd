"""A contact sheet of a call, with each image above its kept patches."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from tinydrop_kernels.report import Call
from tinydrop_kernels.visualize import kept_patches

GAP = 8
CAPTION_HEIGHT = 18


def contact_sheet(
    images: Sequence[Image.Image],
    call: Call,
    captions: Sequence[str] | None = None,
    columns: int = 8,
    width: int = 224,
) -> Image.Image:
    """Draw each image of a call, and below it the patches that the target was given and their number.

    Args:
        images: the RGB images of the call in order, or the first few.
        call: the record of the call, ``model.tinydrop.last``.
        captions: text above each image, such as its class.
        columns: number of images side by side. Further images go below.
        width: width of each image on the page, in pixels.

    Raises:
        ValueError: there are no images, more images than in the call, or another number of captions.
    """
    if not 0 < len(images) <= len(call.grid_sizes):
        raise ValueError(f"images: got {len(images)}, expected 1 to {len(call.grid_sizes)}, those of the call")
    captions = [""] * len(images) if captions is None else captions
    if len(captions) != len(images):
        raise ValueError(f"captions: got {len(captions)}, expected {len(images)}, one for each image")
    originals = list(images)
    originals = [picture.resize((width, round(width * picture.height / picture.width))) for picture in originals]
    height = max(picture.height for picture in originals)
    columns = min(columns, len(originals))
    bands = -(-len(originals) // columns)
    row_height = CAPTION_HEIGHT + height + GAP
    page = Image.new("RGB", (columns * (width + GAP) + GAP, bands * 2 * row_height + GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for i, original in enumerate(originals):
        left, top = GAP + i % columns * (width + GAP), GAP + i // columns * 2 * row_height
        seen = kept_patches(original, call, i)
        for picture, caption in ((original, captions[i]), (seen, _what_was_kept(call, i))):
            draw.text((left, top), _shortened(caption, font, width), "black", font)
            page.paste(picture, (left, top + CAPTION_HEIGHT))
            top += row_height
    return page


def _what_was_kept(call: Call, index: int) -> str:
    if call.exited[index]:
        return "exit"
    rows, columns = call.grid_sizes[index]
    again = ", then dense" if call.second_look[index] else ""
    return f"{int(call.counts[index])} of {rows} x {columns}{again}"


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
