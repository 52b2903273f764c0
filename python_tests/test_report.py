"""`gankern report`: the page's structure, and the page in a browser."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from gankern.cli import main
from gankern.training import make_config, train
from gankern.training.report import PLOTS, build_report
from gankern.training.run import read_stats

BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
ALARM = {
    "kind": "G collapsed",
    "kimg": 0.064,
    "since": 0.032,
    "seen": "samples are <b>alike</b>",
    "figures": {},
    "cure": "go back",
    "severe": True,
}


# Tests that share a fixture.
pytestmark = pytest.mark.xdist_group("report")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three ticks with four grids, to which an alarm and metrics are added."""
    options = {"width": 2, "d_width": 2, "z_dim": 5, "batch": 16, "grid": 3}
    options |= {"kimg": 0.096, "tick_kimg": 0.032, "sample_ticks": 1, "data": "digits:16"}
    run = train(make_config(**options, out=str(tmp_path_factory.mktemp("runs"))))
    rows = read_stats(run)
    rows[1]["alarms"] = [ALARM]
    for i, row in enumerate(rows):
        row["metrics"] = {"KD-EffLite0": 0.5 - 0.1 * i, "KD-EffLite0 error": 0.02, "recall": 0.1}
    (run / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


class Outline(html.parser.HTMLParser):
    """Counts elements, and collects identifiers and addresses."""

    VOID = {"meta", "img", "input", "br", "link"}

    def __init__(self, page):
        super().__init__()
        self.tags, self.ids, self.addresses, self.open = {}, [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.addresses.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_structure(run):
    page = build_report(run)
    outline = Outline(page)
    assert not outline.open
    assert len(outline.ids) == len(set(outline.ids))
    assert all(address.startswith("#") for address in outline.addresses)
    assert {a[1:] for a in outline.addresses} <= set(outline.ids)
    assert outline.tags["svg"] == outline.tags["figure"]
    for title in ("Loss", "D&#x27;s mean logit", "Gradient norms", "Weight norms", "Images/s"):
        assert f'aria-label="{title}"' in page, title
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>|http-equiv', "", page)
    assert "default-src 'none'" in page
    grids = json.loads(re.search(r"id=grids>(.*?)</script>", page).group(1))
    assert [grid["kimg"] for grid in grids] == [0, 0.032, 0.064, 0.096]
    assert all(grid["src"].startswith("data:image/png;base64,") for grid in grids)
    assert "G collapsed" in page
    assert "samples are &lt;b&gt;alike&lt;/b&gt;" in page
    assert "KD-EffLite0" in page
    assert "<th>d_lr</th>" in page
    assert "<th>PyTorch</th>" in page
    assert "<th>this report</th>" in page


def test_every_number_of_a_tick_has_a_plot(run):
    shown = {name for plot in PLOTS for name in plot.names}
    apart = {"kimg", "step", "epoch", "time_s", "tick_s", "data_share", "alarms", "metrics"}
    assert read_stats(run)[0].keys() - apart <= shown


def test_grids_are_spread_evenly(run):
    page = build_report(run, most=2)
    grids = json.loads(re.search(r"id=grids>(.*?)</script>", page).group(1))
    assert [grid["kimg"] for grid in grids] == [0, 0.096]


def test_command(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", str(run), "--out", str(tmp_path / "page.html")])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/page.html: 0.")
    assert (tmp_path / "page.html").read_text() == build_report(run)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path)])
    assert stop.value.code == 2
    assert "not a run folder" in capsys.readouterr().err


def test_run_without_a_tick(tmp_path):
    (tmp_path / "config.json").write_text(make_config().to_json())
    page = build_report(tmp_path)
    assert "No statistics yet." in page
    assert not Outline(page).open


@pytest.fixture(scope="module")
def browse(run, tmp_path_factory):
    """Opens the page in headless Chromium at an address part; returns the DOM or a screenshot."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH")
    folder = tmp_path_factory.mktemp("page")
    (folder / "report.html").write_text(build_report(run))

    def open_page(part, *options):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", *options]
        command += [f"--user-data-dir={folder / 'profile'}", f"file://{folder}/report.html{part}"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
        assert result.returncode == 0, result.stderr
        return result.stdout

    open_page.folder = folder
    return open_page


def test_page_opens_without_errors_and_the_slider_moves(browse):
    shown = {}
    for part, kimg in (("", 0.096), ("#kimg=0", 0), ("#kimg=0.06", 0.064)):
        dom = browse(part, "--dump-dom")
        assert 'data-errors="0"' in dom
        assert re.search(r'<output id="when">(.*?) kimg', dom).group(1) == f"{kimg:g}"
        shown[kimg] = re.search(r'id="grid"[^>]* src="([^"]*)"', dom).group(1)
    assert len(set(shown.values())) == 3


def test_screenshot(browse):
    picture = browse.folder / "page.png"
    browse("#kimg=0.032", f"--screenshot={picture}", "--window-size=1100,2600")
    with Image.open(picture) as image:
        image = image.convert("RGB")
        assert image.width >= 1000
        colours = image.getcolors(1 << 24)
    background = max(colours)[0] / (image.width * image.height)
    assert 0.3 < background < 0.99  # neither blank nor full
    blue, orange = (31, 119, 180), (255, 127, 14)  # of the curves
    for wanted in (blue, orange):
        near = sum(
            n for n, c in colours if max(abs(a - b) for a, b in zip(c, wanted, strict=True)) < 40
        )
        assert near > 200, wanted
