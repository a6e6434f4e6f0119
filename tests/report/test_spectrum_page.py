"""The spectrum report as a page: what is in it, and that a browser draws it."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from krontune.kron import KronShape
from krontune.plan import Spectrum, spectrum_report
from krontune.report.spectrum import sort_table, write_spectrum_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HEADINGS = [
    "Chosen rank, layer by layer",
    "Spectra",
    "Cumulative energy",
    "Energy per parameter against the factor shape",
    "Channel sort (norm)",
]
N_PICTURES = 5


def falling(kind: str, layer: int, label: str, order: str | None) -> Spectrum:
    """A spectrum that falls the faster, the deeper the layer; and faster still where its channels are sorted."""
    p = int(label.removeprefix("p=")) if label.startswith("p=") else 4
    rate = 0.1 + 0.2 * layer + (0.2 if order else 0.0)
    sigma = [math.exp(-rate * k) for k in range(16)]
    energy = sum(math.exp(-2 * rate * k) for k in range(64))
    name = f"model.layers.{layer}.{kind}"
    shape = KronShape(64 // p, p, p, 64 // p)
    return Spectrum(name, f"model.layers.*.{kind}", layer, label, shape, order, None, energy, sigma)


@pytest.fixture
def report() -> dict:
    return spectrum_report(
        [
            falling(kind, layer, label, order)
            for kind in ("self_attn.q_proj", "mlp.up_proj")
            for layer in range(6)
            for order in (None, "norm")
            for label in ("auto", "p=1", "p=2", "square")
        ]
    )


@pytest.fixture
def page(report: dict, tmp_path: Path) -> Path:
    write_spectrum_page(tmp_path / "report.html", report, "packaged:<tiny>")
    return tmp_path / "report.html"


def test_the_page_has_every_part_and_nothing_from_elsewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<title>Spectra of packaged:&lt;tiny&gt;</title>" in text
    assert re.findall(r"<h2>([^<]+)</h2>", text) == HEADINGS
    assert text.count('src="data:image/png;base64,') == text.count("<img ") == N_PICTURES
    assert not re.search(r"https?://|<script|<link", text)


def test_gains_of_sorting_are_those_of_the_shares(report: dict) -> None:
    header, rows, numeric = sort_table(report)
    assert header == ["module", "energy at 8", "sorted", "gain by layer, points"]
    gains = [layer["gain_at"]["8"] for layer in report["layers"] if layer["channel_sort"] and layer["label"] == "auto"]
    assert rows[0][3] == f"{100 * min(gains):+.1f} to {100 * max(gains):+.1f}"
    assert all(gain > 0 for gain in gains)
    assert len(numeric) == len(header)


def browse(page: Path, *options: str) -> str:
    """What headless Chromium writes on standard output."""
    profile = page.parent / "profile"
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", *options]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.integration
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_draws_it(page: Path, tmp_path: Path) -> None:
    """Every picture is decoded and drawn in full, the table is there, and nothing is wider than the window."""
    probe = tmp_path / "probe.html"
    script = (
        "<script>onload = () => { document.title = JSON.stringify({"
        "drawn: [...document.images].filter(i => i.complete && i.naturalWidth > 300 && i.width > 300).length,"
        "rows: document.querySelectorAll('table')[0].rows.length,"
        "fits: document.documentElement.scrollWidth <= innerWidth}) }</script>"
    )
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{script}</body>"), encoding="utf-8")
    dom = browse(probe, "--dump-dom", "--window-size=1000,1400")
    assert f'<title>{{"drawn":{N_PICTURES},"rows":3,"fits":true}}</title>' in dom
    browse(page, f"--screenshot={tmp_path / 'page.png'}", "--window-size=1000,3000", "--hide-scrollbars")
    with Image.open(tmp_path / "page.png") as picture:
        colors = {color: n for n, color in picture.convert("RGB").getcolors(10**7)}
    assert colors[(255, 255, 255)] > 10**6
    assert len(colors) > 200  # text alone has shades of grey
    assert colors.get((0xD1, 0x49, 0x5B), 0) > 50  # the threshold's line
