"""`gankern report`: the page's structure, and the page in a browser."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageOps

from gankern.cli import main
from gankern.data import make_grid, open_dataset
from gankern.training import make_config, train
from gankern.training.report import PLOTS, build_report
from gankern.training.run import read_stats

KEPT = Path(__file__).resolve().parents[1] / ".ci/work/report.png"  # for a person to look at
TINTS = {0: (200, 0, 200), 0.032: (200, 100, 0), 0.064: (0, 160, 160), 0.096: (0, 200, 0)}
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
    """A run of three ticks with an alarm, metrics and, of TINTS, four grids added to it."""
    options = {"width": 2, "d_width": 2, "z_dim": 5, "batch": 16, "grid": 3}
    options |= {"kimg": 0.096, "tick_kimg": 0.032, "sample_ticks": 1, "data": "digits:16"}
    run = train(make_config(**options, out=str(tmp_path_factory.mktemp("runs"))))
    rows = read_stats(run)
    rows[1]["alarms"] = [ALARM]
    for i, row in enumerate(rows):
        row["metrics"] = {
            "generated images": 1000,
            "real images": 900,
            "KD-EffLite0": 0.5 - 0.1 * i,
            "KD-EffLite0 error": 0.02,
            "recall": 0.1 + 0.2 * i,
            "classes": {"seven": {"recall": 0.25}, "t<wo": {"recall": 0.5}},
        }
    for (kimg, tint), start in zip(TINTS.items(), (0, 9, 18, 27), strict=True):
        images, _ = open_dataset("digits:16").batch(range(start, 5000, 500))
        grid = ImageOps.colorize(make_grid(images[:9], 3).convert("L"), tint, "white")
        grid.save(run / "samples" / f"{round(1000 * kimg):012d}.png")
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
    assert "Quality at 0.096 kimg, 1,000 generated images and 900 real images" in page
    assert "<th>KD-EffLite0</th><td>0.3 ± 0.02</td>" in page
    assert "<th>t&lt;wo</th><td>0.5</td>" in page
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


def screenshot(browse, kimg):
    """The page as it looks, with the samples of some moment."""
    picture = browse.folder / "page.png"
    browse(f"#kimg={kimg}", f"--screenshot={picture}", "--window-size=1100,2600")
    with Image.open(picture) as image:
        return image.convert("RGB")


def near(image, colour):
    """Where an image has about this colour, as a mask."""
    far = ImageChops.difference(image, Image.new("RGB", image.size, colour)).split()
    return ImageChops.lighter(ImageChops.lighter(*far[:2]), far[2]).point(lambda v: 255 * (v < 40))


def count(mask):
    return mask.histogram()[255]


def test_screenshot(browse):
    early, late = screenshot(browse, 0.032), screenshot(browse, 0.096)
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    late.save(KEPT)
    assert late.width >= 1000
    background = max(late.getcolors(1 << 24))[0] / (late.width * late.height)
    assert 0.3 < background < 0.99  # neither blank nor full
    # The curves, in the lower half; the alarm's name, at the top.
    top, bottom = late.crop((0, 0, late.width, 300)), late.crop((0, 1300, late.width, late.height))
    for colour in ((31, 119, 180), (255, 127, 14)):
        assert count(near(bottom, colour)) > 200, colour
    assert count(near(top, (208, 64, 32))) > 50
    # Each shows its own samples alone.
    for image, own in ((early, 0.032), (late, 0.096)):
        for kimg, tint in TINTS.items():
            seen = count(near(image.crop((0, 300, 600, 900)), tint))
            assert seen > 100_000 if kimg == own else seen < 100, (own, kimg, seen)
    # Above them the slider's knob has gone from the first third to the end.
    first_row = near(late, TINTS[0.096]).getbbox()[1]
    left, _, right, _ = (
        ImageChops.difference(early, late).crop((0, 0, late.width, first_row - 5)).getbbox()
    )
    assert left < 250
    assert right > 540
