"""Tests of the page of kept patches: it is complete, escapes all names, and works in a real browser."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from fakes import FakePatched
from PIL import Image

from tinydrop_kernels.predict.prediction import Candidate, Prediction
from tinydrop_kernels.predict.predictor import Predictor
from tinydrop_kernels.visualize.gallery import Gallery
from tinydrop_kernels.visualize.page import Card, render

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BRIGHTNESS = (0, 80, 150, 255)  # FakePatched: disagreed, second look, disagreed, exited


@pytest.fixture
def page(tmp_path):
    """Return the path of a page of eight images, two of each kind."""
    files = []
    for i, value in enumerate(BRIGHTNESS * 2):
        files.append(tmp_path / f"{'a long name of a photograph ' * 4}{i}.png")
        Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(files[-1])
    (tmp_path / "out").mkdir()
    predictor = Predictor(FakePatched(), batch_size=3)
    gallery = Gallery(tmp_path / "out", predictor)
    for seen in predictor.batches(files):
        gallery.add(seen)
    return gallery.write()


def a_row(**changes) -> Prediction:
    sure = Candidate(1, "bee", 0.75)
    row = Prediction(0, "a/b.png", False, 0.75, 4, 16, (4, 4), False, (sure,), sure, None)
    return replace(row, **changes)


def rendered(*rows: Prediction) -> str:
    model = FakePatched()
    model(torch.zeros(len(rows), 3, 8, 8))
    return render(model, model.report(), [Card(row, "0001_b.png", ("data:,1", "data:,2", "data:,3")) for row in rows])


class Elements(HTMLParser):
    """Parser that collects every element with its attributes, and the elements that were not closed."""

    VOID = frozenset(("meta", "img", "input"))

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(page):
    found = Elements(page.read_text())
    assert found.open == []
    images = [attributes for tag, attributes in found.elements if tag == "img"]
    assert len(images) == 24 and all(image["src"].startswith("data:image/webp;base64,") for image in images)
    assert all(image["alt"] for image in images)
    assert not {"link", "iframe", "object"} & {tag for tag, _ in found.elements}
    assert "http:" not in page.read_text() and "https:" not in page.read_text() and "@import" not in page.read_text()
    (policy,) = [a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_every_image_has_a_file(page):
    links = [attributes["href"] for tag, attributes in Elements(page.read_text()).elements if tag == "a"]
    assert len(links) == len(set(links)) == 8
    for link in links:
        assert Image.open(page.parent / link).size == (3 * 8 + 2 * 8, 8)
    assert len(list(page.parent.iterdir())) == 9


def test_cards_are_what_they_are(page):
    cards = [attributes["data-is"] for tag, attributes in Elements(page.read_text()).elements if tag == "article"]
    assert cards == ["few disagreed", "second-look few", "few disagreed", "exited"] * 2


def test_answers_are_told():
    bee, ant = Candidate(1, "bee", 0.75), Candidate(0, "ant", 0.5)
    text = rendered(a_row(top=(ant,), guidance=bee, dense=ant))
    assert "4 of 16 patches (25%), 4 × 4 grid" in text
    rows = re.findall(r'<th scope="row">(\w+)</th><td class="name" title="(\w+)">.*?>([\d.]+%)</td>', text)
    assert rows == [("guidance", "bee", "75.0%"), ("target", "ant", "50.0%"), ("dense", "ant", "50.0%")]
    text = rendered(a_row(exited=True, kept=0, top=(bee,)))
    assert "<b>Exited</b>" in text and '<th scope="row">target</th><td colspan="2">not run</td>' in text
    assert "other classes" in rendered(a_row(guidance=None))
    assert "not a number" in rendered(a_row(top=(Candidate(0, "ant", float("nan")),)))


def test_names_cannot_break_the_page():
    evil = '<script>alert("1")</script>&"\''
    text = rendered(a_row(name=f"folder/{evil}.png", top=(Candidate(0, evil, 0.5),)))
    assert "<script>alert" not in text and Elements(text).open == []
    assert "&lt;script&gt;alert" in text
    assert "caf?.png" in rendered(a_row(name="caf\udce9.png"))  # a file name that is not valid UTF-8


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("a/b c.tar.gz", "0001_b_c.tar.png"),
        ("#3", "0001_image.png"),
        ("x/..", "0001_...png"),
        ("caf\udce9.png", "0001_caf_.png"),
        ("鳥" * 200 + ".jpg", f"0001_{'鳥' * 40}.png"),
    ],
)
def test_files_have_safe_names(tmp_path, name, file):
    predictor = Predictor(FakePatched())
    seen = predictor.classify(torch.zeros(1, 3, 8, 8))
    Gallery(tmp_path, predictor).add(seen._replace(rows=[replace(seen.rows[0], name=name)]))
    assert [path.name for path in tmp_path.iterdir()] == [file]


CHECK = """
const result = {width: innerWidth, page: document.documentElement.scrollWidth, overflow: 0, states: []};
for (const card of document.querySelectorAll("article"))
  for (const part of [card, ...card.querySelectorAll("figure, table, .fate")])
    result.overflow += part.scrollWidth > part.clientWidth;
const state = () => result.states.push([
  location.hash, [...document.querySelectorAll("article")].filter(card => card.offsetParent).length,
  document.querySelector("output").textContent, !!document.querySelector(".empty").offsetParent]);
const box = name => document.querySelector("input[name=" + name + "]");
state();
box("disagreed").click(); state();
box("few").click(); state();
box("exited").click(); state();
result.focusable = [...document.querySelectorAll("input, button, summary, a")].filter(part => {
  part.focus(); return document.activeElement === part && part.offsetParent; }).length;
document.querySelector("button").click();
setTimeout(state);
"""


FRAME = """<body><iframe src="inner.html{fragment}" width="{width}" height="900" frameborder="0"></iframe>
<script>addEventListener("message", event => {{ document.body.textContent = "RESULT" + event.data + "END"; }});</script>
"""


def opened(page, width, fragment="", script=CHECK):
    """Return the result of a script in the page, opened in a browser at this width.

    The page is in a frame, because browser windows have a minimum width.
    """
    if BROWSER is None:
        pytest.skip("no Chromium on this machine to open the page in")
    script = f"{script}; setTimeout(() => parent.postMessage(JSON.stringify(result), '*'), 50);"
    page.with_name("inner.html").write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    probe = page.with_name("probe.html")
    probe.write_text(FRAME.format(fragment=fragment, width=width))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1400,1000"]
    flags += ["--virtual-time-budget=2000", f"--user-data-dir={page.parent / 'profile'}", "--dump-dom"]
    done = subprocess.run([BROWSER, *flags, probe.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r"RESULT(.*)END</body>", done.stdout)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_filters_and_nothing_overflows(page, width):
    result = opened(page, width)
    assert result["width"] == result["page"] == width and result["overflow"] == 0
    assert result["states"] == [
        ["", 8, "8 of 8 images", False],
        ["#disagreed", 4, "4 of 8 images", False],
        ["#few,disagreed", 4, "4 of 8 images", False],
        ["#exited,few,disagreed", 0, "0 of 8 images", True],
        ["", 8, "8 of 8 images", False],
    ]
    assert result["focusable"] == 4 + 1 + 1  # the filters, the button, the explanation; the links are filtered away


def test_a_browser_opens_a_filtered_view(page):
    script = """
    const shown = [...document.querySelectorAll("article")].filter(card => card.offsetParent).length;
    const checked = [...document.querySelectorAll("input:checked")].map(box => box.name);
    const result = [shown, checked];
    """
    assert opened(page, 800, "#second-look,few", script) == [2, ["second-look", "few"]]
    assert opened(page, 800, "#nonsense", script) == [8, []]
