"""The page of `fastlt report` in a browser: it opens without a network or an error, fits its window, and can be read.

make test-browser        FASTLT_SCREENSHOTS=FOLDER keeps pictures of what was tested
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from devtools import Page, find_browser
from made_up_runs import long_tail, write_run

from fastlt import cli
from fastlt.recipe import load_recipe
from fastlt.run.preflight import prepare
from fastlt.run.trainer import Trainer

pytestmark = pytest.mark.browser
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits_lt.yaml"
WINDOWS = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]

# What lies beyond the right edge of the window, but for what a part of the page scrolls.
TOO_WIDE = """[...document.querySelectorAll("body *")].filter((e) => {
  const box = e.getBoundingClientRect();
  if (box.width === 0 || box.right <= innerWidth + 1) return false;
  for (let p = e.parentElement; p; p = p.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(p).overflowX)) return false;
  return true;
}).map((e) => e.outerHTML.slice(0, 120))"""
IMAGES = """Promise.all([...document.images].map((i) => i.decode().then(() => i.naturalWidth > 0, () => false)))"""
LINKS = """[...document.querySelectorAll("a[href]")].map((a) => a.getAttribute("href"))
  .filter((href) => !href.startsWith("#") || !document.getElementById(href.slice(1)))"""
IDS = """(() => { const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  return ids.filter((id, i) => ids.indexOf(id) !== i); })()"""
# Words of a figure that cover each other by more than a hair.
OVERLAPS = """[...document.querySelectorAll("figure svg")].flatMap((svg) => {
  const texts = [...svg.querySelectorAll("text")].filter((t) => t.textContent.trim());
  const boxes = texts.map((t) => t.getBoundingClientRect());
  const found = [];
  for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
    const a = boxes[i], b = boxes[j];
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (x > 2 && y > 3.5) found.push([svg.getAttribute("aria-label"), texts[i].textContent, texts[j].textContent]);
  }
  return found;
})"""
OUTSIDE = """[...document.querySelectorAll("figure svg")].flatMap((svg) => {
  const around = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter((t) => {
    const box = t.getBoundingClientRect();
    return box.left < around.left - 1 || box.right > around.right + 1 || box.bottom > around.bottom + 1;
  }).map((t) => `${svg.getAttribute("aria-label")}: ${t.textContent}`);
})"""
SMALL = """[...document.querySelectorAll("figure svg text")].map((t) => {
  const { c, d } = t.getScreenCTM(); // rotated or not
  return [parseFloat(getComputedStyle(t).fontSize) * Math.hypot(c, d), t.textContent];
}).filter(([size]) => size < 7)"""
# Words whose contrast with what lies behind them is low (WCAG 2: relative luminance).
PALE = """(() => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$|transparent/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  const words = "h1,h2,h3,h4,p,td,th button,a,summary,figure svg text,.pictures b,.pictures span";
  for (const e of document.querySelectorAll(words)) {
    if (!e.textContent.trim()) continue;
    const svg = e.closest("svg"), style = getComputedStyle(e);
    if (e.closest("[id*='on-fill']")) continue; // on a coloured patch
    const a = luminance(svg ? style.fill : style.color), b = luminance(behind(svg ? svg.parentElement : e));
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) found.push([contrast.toFixed(1), e.textContent.trim().slice(0, 60)]);
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    browser = find_browser()
    if browser is None:
        pytest.skip("needs a Chromium: none of the names that it goes by is on the PATH")
    page = Page(browser, tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture(scope="module")
def small(digits, tmp_path_factory):
    """Digits: two methods under two seeds, a run that stopped, and a folder that is no run."""
    place = tmp_path_factory.mktemp("small")
    words = [
        f"data.converted={digits}",
        f"runs={place / 'runs'}",
        "data.loader=resident",
        "num_threads=1",
        "log_every=5",
    ]
    words += ["stages.end_to_end.iterations=60", "stages.end_to_end.evaluate_every=10", "stages.end_to_end.warmup=5"]
    plain = ["stages.end_to_end.method=plain", "stages.end_to_end.meta_batch_size=null"]
    for name, more in (("difficulty", []), ("cross_entropy", plain)):
        for seed in (0, 1):
            Trainer(prepare(load_recipe(RECIPE, [*words, *more, f"name={name}-{seed}", f"seed={seed}"]))).fit()
    stopped = write_run(place / "runs", "stopped", long_tail(10), "stages.end_to_end.lr=0.05", finished=False)
    foreign = place / "holidays"
    foreign.mkdir()
    out = place / "report.html"
    folders = [str(folder) for folder in sorted((place / "runs").iterdir())]
    assert str(stopped) in folders
    assert cli.main(["report", *folders, str(foreign), "--out", str(out), "--files"]) == 2
    return out


@pytest.fixture(scope="module")
def sixty(tmp_path_factory):
    """60 classes, the most that are shown one by one, with long names."""
    place = tmp_path_factory.mktemp("sixty")
    names = [f"Genus{c:02d} longepithetus {c} var. <b>alba</b> & $co$" for c in range(60)]
    folders = [
        str(write_run(place, name, long_tail(60), f"stages.end_to_end.lr={lr}", seed=seed, class_names=names))
        for name, lr in (("ours_with_a_rather_long_name", 0.1), ("other", 0.2))
        for seed in (0, 1, 2)
    ]
    out = place / "report.html"
    assert cli.main(["report", *folders, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """As many classes as iNaturalist 2018 has."""
    place = tmp_path_factory.mktemp("large")
    counts = long_tail(8142)
    folders = [str(write_run(place, "large", counts, seed=seed, images=24426)) for seed in (0, 1)]
    out = place / "report.html"
    assert cli.main(["report", *folders, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
@pytest.mark.parametrize("name", ["small", "sixty", "large"])
def test_a_page_opens_fits_and_can_be_read(page, request, name, width, scheme):
    path = request.getfixturevalue(name)
    page.open(path, width, scheme)
    kept = os.environ.get("FASTLT_SCREENSHOTS")
    if kept:
        page.screenshot(Path(kept) / f"{name}-{width}-{scheme}.png")
    assert page.evaluate("document.querySelectorAll('figure svg').length") >= 6
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(TOO_WIDE) == []
    assert all(page.evaluate(IMAGES))
    assert page.evaluate(LINKS) == []
    assert page.evaluate(IDS) == []
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(SMALL) == []
    assert page.evaluate(PALE) == []
    assert page.errors == []
    assert [url for url in page.requested if not url.startswith(("file:", "data:"))] == []


CELLS = "[...document.querySelectorAll('#accuracy .table tbody tr')].map((row) => row.cells[{}].textContent)"
BOX = "document.querySelector('#accuracy .table')"


def test_a_table_is_sorted_filtered_and_shown_on(page, large):
    page.open(large, 1280, "light")
    assert page.evaluate(CELLS.format(1))[0] == "1000"
    assert len(page.evaluate(CELLS.format(1))) == 15
    page.evaluate(f"{BOX}.querySelectorAll('th button')[1].click()")
    page.evaluate(f"{BOX}.querySelectorAll('th button')[1].click()")  # upwards
    counts = [int(text) for text in page.evaluate(CELLS.format(1))]
    assert counts == [2] * 15
    page.evaluate(f"{BOX}.querySelector('.more button').click()")
    counts = [int(text) for text in page.evaluate(CELLS.format(1))]
    assert len(counts) == 165
    assert counts == sorted(counts)
    page.evaluate(f"{BOX}.querySelector('input').value = 'NUMBER 81'")
    page.evaluate(f"{BOX}.querySelector('input').dispatchEvent(new Event('input'))")
    names = page.evaluate(CELLS.format(0))
    assert all("number 81" in name for name in names)
    assert page.evaluate(f"{BOX}.querySelector('.more span').textContent") == "15 of 53 rows"  # 81, 810-819, 8100-8141
    assert page.errors == []


def test_the_parts_of_a_page_that_someone_reads_are_there(page, small):
    page.open(small, 1280, "light")
    text = page.evaluate("document.body.innerText")
    for part in ("Overview", "Accuracy", "Training", "Weights and difficulties", "Confusion", "Reliability", "Time"):
        assert part in text, part
    assert "unfinished: stopped at stage end_to_end, iteration 600" in text
    assert "holidays holds no run: recipe.yaml is missing" in text
    assert page.evaluate("document.querySelectorAll('.pictures img').length") > 0
    assert "stages.end_to_end.method" in text, "in which keys the recipes differ"
