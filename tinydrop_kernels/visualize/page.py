"""An HTML page of the kept patches, which needs no other file and no network."""

import html
import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from string import Template
from typing import NamedTuple
from urllib.parse import quote

from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.predict.prediction import Candidate, Prediction
from tinydrop_kernels.report import Report

FEW = 0.5  # an image is in the filter "few" if at most this fraction of its dense patches was kept
NOT_ASKED = '<tr class="silent"><th scope="row">target</th><td colspan="2">not run</td></tr>'


class Card(NamedTuple):
    """The page's entry for one image."""

    row: Prediction
    file: str  # name of the image's PNG file, which is in the page's folder
    pictures: tuple[str, ...]  # URIs of the input, the saliency and the kept patches


FILTERS: dict[str, tuple[str, Callable[[Prediction], bool]]] = {  # name in the URL: label on the page, condition
    "exited": ("exited", lambda row: row.exited),
    "second-look": ("got a second look", lambda row: row.second_look),
    "few": (f"kept at most {FEW:.0%} of the patches", lambda row: not row.exited and row.kept <= FEW * row.patches),
    "disagreed": ("models disagree on", lambda row: row.disagreed),
}


def render(model: TimmModule, report: Report, cards: Sequence[Card]) -> str:
    """Return the page as HTML text.

    Args:
        model: the patched model.
        report: the report on all images, which opens the page.
        cards: one card per image, in order.
    """
    tinydrop = model.tinydrop
    models = f"{_architecture(model)}, guided by {_architecture(tinydrop.guidance.model)}"
    blend = f"A target’s answer contains {tinydrop.policy.blend:.0%} of the guidance model’s probabilities."
    template = Template(files("tinydrop_kernels.visualize").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=_text(f"What the model saw: {models}"),
        models=_text(models),
        facts="".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _facts(report).items()),
        notes=_notes(report),
        blend=blend if tinydrop.policy.blend else "",
        policy=_text(str(tinydrop.policy)),
        filters="\n      ".join(_filter(name, cards) for name in FILTERS),
        cards="\n".join(map(_card, cards)),
    )


def _facts(report: Report) -> dict[str, str]:
    kept = f"{report.mean_keep:.1%} <small>for images that did not exit</small>" if report.patches else "all exited"
    facts = {
        "images": f"{report.images}",
        "exits": f"{report.exits} <small>{report.exits / report.images:.1%}</small>",
        "second looks": f"{report.second_looks} <small>{report.second_looks / report.images:.1%}</small>",
        "patches kept": kept,
        "FLOPs saved": f"{report.flops_saved:.1%} <small>guidance included</small>",
    }
    if report.speed_up:
        facts["speed"] = f"{report.speed_up:.2f} × <small>of dense</small>"
    return facts


def _notes(report: Report) -> str:
    items = "".join(f"<li>{_text(note[0].upper() + note[1:])}.</li>" for note in report.notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _filter(name: str, cards: Sequence[Card]) -> str:
    told, is_so = FILTERS[name]
    count = sum(is_so(card.row) for card in cards)
    disabled = "" if count else " disabled"
    return f'<label><input type="checkbox" name="{name}"{disabled}> {told} <span>{count}</span></label>'


def _card(card: Card) -> str:
    row = card.row
    own = " ".join(name for name, (_, is_so) in FILTERS.items() if is_so(row))
    name = row.name.replace("\\", "/").rsplit("/", 1)[-1]
    seen = "nothing" if row.exited else _seen(row)
    alternatives = ("the input", "the saliency from the guidance model", f"what the target saw: {seen}")
    captions = ("input", "guidance", "target, not run" if row.exited else "target")
    pictures = "".join(
        f'<figure><img src="{address}" alt="{_text(alternative)}"><figcaption>{caption}</figcaption></figure>'
        for address, alternative, caption in zip(card.pictures, alternatives, captions, strict=True)
    )
    fate = "<b>Exited</b>" if row.exited else _seen(row)
    if row.second_look:
        fate += "; <b>second look</b>"
    answers = [
        _answer("guidance", row.guidance, row) if row.guidance else _only_sure(row),
        NOT_ASKED if row.exited else _answer("target", row.top[0], row),
    ]
    if row.dense:
        answers.append(_answer("dense", row.dense, row))
    return (
        f'<article data-is="{own}"><h2 title="{_text(row.name)}"><a href="{quote(card.file)}">{_text(name)}</a></h2>'
        f'<div class="pictures">{pictures}</div><p class="fate">{fate}</p>'
        f"<table>{''.join(answers)}</table></article>"
    )


def _seen(row: Prediction) -> str:
    rows, columns = row.grid
    return f"{row.kept} of {row.patches} patches ({row.kept / row.patches:.0%}), {rows} × {columns} grid"


def _answer(who: str, candidate: Candidate, row: Prediction) -> str:
    differs = ' class="differs"' if who != "guidance" and row.guidance and candidate.label != row.guidance.label else ""
    name = _text(candidate.name)
    return (
        f'<tr{differs}><th scope="row">{who}</th><td class="name" title="{name}">{name}</td>'
        f"{_sure(candidate.probability)}</tr>"
    )


def _only_sure(row: Prediction) -> str:
    """Return the guidance model's row without a class, because its classes are not the target's."""
    return f'<tr><th scope="row">guidance</th><td class="name silent">other classes</td>{_sure(row.confidence)}</tr>'


def _sure(probability: float) -> str:
    if not math.isfinite(probability):
        return '<td class="sure">not a number</td>'
    return f'<td class="sure" style="--p: {probability:.1%}">{probability:.1%}</td>'


def _architecture(model: TimmModule) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)


def _text(text: str) -> str:
    """Return the text escaped for HTML. Characters that UTF-8 cannot encode become question marks."""
    return html.escape(text.encode(errors="replace").decode())
