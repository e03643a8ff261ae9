"""Pages of hand-written work folders in a browser: contrast, a phone's width, and paper."""

import browser
import numpy as np
import pypdfium2
import pytest
from drawn_run import STAGES, draw_run, hostile_gallery

from jaxuda.report import charts
from jaxuda.report.comparison import comparison_page
from jaxuda.report.page import run_page
from jaxuda.report.runs import read_run

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")
# 45 classes: their table does not fit on one sheet of paper.
CLASSES = [f"class-{index}" for index in range(44)] + ["construction--flat--crosswalk-plain, seen from far away"]
LONG = "a target whose name is so long that no title of a chart, and no column of a table, fits on a phone's screen"
LAYERS = ["image", "truth", "source only", "adapt", "entropy of adapt"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict:
    """The page of a run, and that of a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    target = {"name": LONG, "path": "", "split": "train"}
    stages = {name: STAGES[name] for name in ("source_only", "adapt", "oracle")}
    setting = {"done": 3, "stages": stages, "classes": CLASSES, "target": target}
    runs = [read_run(draw_run(folder / f"run{seed}", seed=seed, **setting)) for seed in (0, 1)]
    gallery = hostile_gallery(CLASSES)
    pages = {"run": run_page(runs[0], gallery), "comparison": comparison_page(runs, {0: gallery, 1: gallery})}
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page)
    return {name: folder / f"{name}.html" for name in pages}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened
        assert opened.problems == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_is_readable(page, pages, tmp_path, dark: bool) -> None:
    names = [f"{index}" for index in range(16)]
    values = np.linspace(-1, 1, 256).reshape(16, 16)  # every colour of the map
    heat_map = tmp_path / "map.svg"
    heat_map.write_bytes(charts.standalone(charts.heat_map(names, names, values, "all colours", (-1, 1))))
    for path, least in ((heat_map, 256), (pages["run"], 45 * 45), (pages["comparison"], 200)):
        page.open(path, dark)
        page.value("document.querySelectorAll('details').forEach((d) => { d.open = true })")
        shares = "document.querySelectorAll('.confusion td').forEach((d, i) => d.style.setProperty('--share', i % 101))"
        page.value(shares)
        found = page.value(browser.CONTRASTS)
        assert len(found) >= least and min(found) >= [4.5, ""], (path, sorted(found)[:3])


TEXTS = """[...document.querySelectorAll(".chart text")].filter((t) => t.checkVisibility()).map((t) => {
  const box = t.getBoundingClientRect(), svg = t.ownerSVGElement.getBoundingClientRect();
  const inside = box.left >= svg.left - 1 && box.right <= svg.right + 1;
  return [t.textContent, parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a, inside];
})"""
TABLES = """[...document.querySelectorAll(".scroll")].map((box) => {
  const cells = [...box.querySelectorAll("tr > :first-child")], caption = box.previousElementSibling;
  const before = caption.getBoundingClientRect().left;
  box.scrollIntoView();
  box.scrollLeft = 10000;
  const left = box.getBoundingClientRect().left, top = cells.at(-1).getBoundingClientRect();
  return {
    wide: box.scrollWidth > box.clientWidth,
    scrolled: box.scrollLeft > 0,
    hint: caption.querySelector(".hint").checkVisibility(),
    stayed: cells.every((cell) => Math.abs(cell.getBoundingClientRect().left - left) < 1),
    share: cells[0].getBoundingClientRect().width / box.clientWidth,
    still: caption.getBoundingClientRect().left === before && caption.getBoundingClientRect().right <= innerWidth,
  };
})"""


@pytest.mark.parametrize("name", ["run", "comparison"])
def test_a_phone_shows_text_at_its_size_and_tables_that_scroll(page, pages, name: str) -> None:
    page.open(pages[name], width=390, height=844)
    page.value("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    page.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.value("document.documentElement.scrollWidth") <= 390
    texts = page.value(TEXTS)
    assert len(texts) > 60 and min(size for _, size, _ in texts) >= 10.5
    assert [text for text, _, inside in texts if not inside] == []
    tables = page.value(TABLES)
    assert sum(table["wide"] for table in tables) >= 2
    for table in tables:
        assert table["wide"] == table["scrolled"] == table["hint"], table
        assert table["stayed"] and table["still"] and table["share"] < (0.5 if table["wide"] else 1.01), table


@pytest.mark.parametrize("width", [640, 1100, 1280])
def test_charts_fit_wider_screens(page, pages, width: int) -> None:
    page.open(pages["run"], width=width)
    page.value("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    texts = page.value(TEXTS)
    assert len(texts) > 60 and min(size for _, size, _ in texts) >= 9
    assert [text for text, _, inside in texts if not inside] == []
    hints = "[...document.querySelectorAll('.hint')].filter((hint) => hint.checkVisibility()).length"
    assert page.value(hints) == page.value(f"{TABLES}.filter((table) => table.wide).length")


def test_paper_has_all_layers_and_colours(page, pages, tmp_path) -> None:
    page.open(pages["run"], dark=True)  # paper is white all the same
    page.pdf(tmp_path / "page.pdf")
    sheets = list(pypdfium2.PdfDocument(tmp_path / "page.pdf"))
    texts = [sheet.get_textpage().get_text_bounded() for sheet in sheets]
    text = "\n".join(texts)
    images = [found for sheet in sheets for found in sheet.get_objects(filter=[pypdfium2.raw.FPDF_PAGEOBJ_IMAGE])]
    assert len(images) == 2 * len(LAYERS)
    assert all(text.count(name) >= 1 + 2 for name in LAYERS)  # in the introduction, and below each picture
    assert "Drag the slider" not in text and "scroll sideways" not in text
    # The table of results takes more than one sheet, and ends once.
    assert sum("class-0 " in part or "class-43 " in part for part in texts) >= 2
    assert text.count("mIoU (45 classes)") == text.count("pixel accuracy") == 1

    drawn = [sheet.render(scale=2).to_numpy()[..., 2::-1].reshape(-1, 3) for sheet in sheets]  # RGB
    assert (drawn[0][0] == 255).all()
    colours, counts = np.unique(np.concatenate(drawn) @ np.array([65536, 256, 1]), return_counts=True)
    colours = colours[:, None] // [65536, 256, 1] % 256

    def is_there(*colour: float) -> bool:
        """As an area, not only where an edge is smoothed."""
        return counts[(np.abs(colours - colour).max(1) <= 1)].sum() >= 30

    # The pictures show the first three classes alone; the colours of others are those of the legend.
    assert all(is_there(240 * index // len(CLASSES), 10, 20) for index in range(3, len(CLASSES)))
    shown = read_run(pages["run"].parent / "run0").result.last["confusion"]
    shares = 0.0055 * np.round(100 * np.diag(shown) / np.maximum(1, np.sum(shown, 1)))
    assert all(
        is_there(*((1 - share) * np.array([255, 255, 255]) + share * np.array([0, 114, 178]))) for share in shares
    )
