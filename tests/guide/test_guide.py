"""The built guide as a reader's browser shows it: complete, without a network, light and dark, on a phone and a desk.

`make guide` builds it, then runs this with the packages of docs/requirements.txt alone: no torch, no conftest.
"""

import functools
import html
import http.server
import importlib.util
import json
import re
import shutil
import threading
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.guide

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "guide" / "html"
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = {"phone": 390, "desk": 1280}


class Links(HTMLParser):
    """What a page points at, with the tag that does, and its anchors."""

    def __init__(self, page):
        super().__init__()
        self.found, self.anchors = [], set()
        self.feed((SITE / page).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        self.found += [(tag, given[name]) for name in ("href", "src") if given.get(name)]


def page_of(notebook):
    return f"notebooks/{notebook.stem}.html"


def cells(notebook, kind):
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [c | {"source": "".join(c["source"])} for c in found if c["cell_type"] == kind]


def equations(notebook):
    """How many formulas its prose holds: `$$…$$`, then `$…$` in what is left."""
    prose = "\n\n".join(cell["source"] for cell in cells(notebook, "markdown"))
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", prose, flags=re.S)
    rest, shown = re.subn(r"\$\$.+?\$\$", "", prose, flags=re.S)
    return shown + len(re.findall(r"\$[^$\n]+\$", rest))


# --- files ----


def test_every_notebook_and_every_page_of_the_docs_and_the_benchmarks_is_in_the_guide():
    sources = [*NOTEBOOKS, *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "docs").glob("*.md")]
    expected = {p.relative_to(ROOT).with_suffix(".html").as_posix() for p in sources} - {"docs/index.html"}
    assert set(PAGES) == expected | {"index.html", "search.html"}
    assert not [p.name for p in SITE.rglob("*") if p.suffix in (".doctree", ".pickle", ".ipynb")], "not for readers"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for tag, target in Links(page).found:
        parts = urlsplit(target)
        if parts.scheme:
            assert tag == "a" and parts.scheme == "https", f"{tag} needs {target}"
            owned = target.removeprefix(f"{REPOSITORY}/blob/main/")
            assert owned == target or (ROOT / unquote(urlsplit(owned).path)).is_file(), target
            continue
        file = ((SITE / page).parent / unquote(parts.path)).resolve() if parts.path else SITE / page
        assert file.is_file(), target
        if parts.fragment and file.suffix == ".html":
            anchors = Links(file.relative_to(SITE.resolve()).as_posix()).anchors if parts.path else Links(page).anchors
            assert unquote(parts.fragment) in anchors, target


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_figure_keeps_the_text_that_stands_for_it(notebook):
    outputs = [output for cell in cells(notebook, "code") for output in cell["outputs"]]
    expected = [o["metadata"]["image/png"]["alt"] for o in outputs if "image/png" in o.get("data", {})]
    shown = re.findall(r'<img alt="([^"]*)" src="\.\./_images', (SITE / page_of(notebook)).read_text(encoding="utf-8"))
    assert [html.unescape(alt) for alt in shown] == expected


# --- browser ----


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)), None) or pytest.fail(f"none of {BROWSERS} is installed")
    with sync_playwright() as playwright:
        alone = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu", alone])
        yield running
        running.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def address():
    """The site as a server gives it: from the disk a browser would not let the search read its own pages."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def visit(browser, address):
    """Open a page; what it asks of another host, what fails and what it complains about fails the test."""
    faults, contexts = [], []

    def opened(page, width="desk", scheme="light"):
        context = browser.new_context(
            viewport={"width": WIDTHS[width], "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: message.type in ("error", "warning") and faults.append(message.text))
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("requestfailed", lambda request: faults.append(f"failed: {request.url}"))
        tab.on("request", lambda r: r.url.startswith((address, "data:")) or faults.append(f"asked for: {r.url}"))
        tab.on("response", lambda response: response.ok or faults.append(f"{response.status}: {response.url}"))
        tab.goto(address + page)
        tab.evaluate("window.MathJax?.startup?.promise")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture(scope="session")
def axe():
    return (Path(importlib.util.find_spec("axe_playwright_python").origin).parent / "axe.min.js").read_text("utf-8")


@pytest.mark.parametrize(("width", "scheme"), [("phone", "dark"), ("desk", "light")])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_and_everybody_can_use_it(page, width, scheme, visit, axe):
    tab = visit(page, width, scheme)
    wide = tab.evaluate("document.documentElement.scrollWidth")
    assert wide == WIDTHS[width], "the page goes sideways"
    cut = "[...document.querySelectorAll('div.math')].filter(e => e.scrollHeight > e.clientHeight).length"
    assert tab.evaluate(cut) == 0, "an equation is cut off below"
    tab.evaluate(axe)
    found = tab.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    grave = [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")]
    assert grave == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_code_is_whole_at_any_width_and_the_head_cells_are_folded(notebook, visit):
    for width in WIDTHS:
        tab = visit(page_of(notebook), width)
        texts = tab.evaluate("[...document.querySelectorAll('.cell_input pre')].map(e => e.textContent.trimEnd())")
        assert texts == [cell["source"].rstrip() for cell in cells(notebook, "code")], "what the button copies"
        seen = tab.evaluate("[...document.querySelectorAll('.cell_input pre')].map(e => e.checkVisibility())")
        folded = [text for text, visible in zip(texts, seen, strict=True) if not visible]
        assert len(folded) >= 2 and "import dpo_tutorial" in folded[0]
        tab.evaluate("document.querySelectorAll('details').forEach(box => box.open = true)")
        boxes = "[...document.querySelectorAll('.cell pre, .highlight-python pre')]"
        assert tab.evaluate(f"{boxes}.every(e => e.scrollWidth <= e.clientWidth)"), "a line leaves its box"


VISIBLE = """element => {
  const box = element.getBoundingClientRect();
  let left = Math.max(box.left, 0), right = Math.min(box.right, innerWidth);
  for (let outer = element.parentElement; outer; outer = outer.parentElement) {
    if (getComputedStyle(outer).overflowX === 'visible') continue;
    const edge = outer.getBoundingClientRect();
    left = Math.max(left, edge.left);
    right = Math.min(right, edge.right);
  }
  return element.checkVisibility({opacityProperty: true, visibilityProperty: true}) && box.height > 0
    ? right - left : 0;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_tables_and_heat_maps_are_seen(width, scheme, visit):
    for notebook in NOTEBOOKS:
        tab = visit(page_of(notebook), width, scheme)
        for element in tab.query_selector_all("table:not(details table), .dpo-tokens"):
            assert element.evaluate(VISIBLE) > 90, (notebook.stem, element.inner_text()[:60])
        if notebook.stem.startswith("06"):
            assert len(tab.query_selector_all(".cell_output .dpo")) > 5
            shades = tab.evaluate(
                "[...document.querySelectorAll('.dpo-tokens span')].map(e => getComputedStyle(e).backgroundColor)"
            )
            assert len(set(shades)) > 20, "a heat map without its colours"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_equation_is_set(notebook, visit):
    tab = visit(page_of(notebook))
    count = equations(notebook)
    assert len(tab.query_selector_all("mjx-container")) == count == len(tab.query_selector_all(".math"))
    assert not tab.query_selector_all("mjx-merror")
    assert all(box.bounding_box()["height"] > 5 for box in tab.query_selector_all("mjx-container"))
    fonts = "document.fonts.ready.then(() => [...document.fonts].filter(f => f.status === 'loaded').length)"
    assert tab.evaluate(fonts) > 0 or not count, "set, but in no font of MathJax"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_opens_in_colab_or_kaggle(notebook, visit):
    tab = visit(page_of(notebook), "phone")
    slug = REPOSITORY.removeprefix("https://github.com/")
    there = f"{slug}/blob/main/notebooks/{notebook.name}"
    buttons = tab.query_selector_all("a.guide-button")
    assert all(button.is_visible() for button in buttons)
    assert {button.inner_text(): button.get_attribute("href") for button in buttons} == {
        "Open in Colab": f"https://colab.research.google.com/github/{there}",
        "Open in Kaggle": f"https://kaggle.com/kernels/welcome?src=https://github.com/{there}",
    }


def test_the_search_finds_a_word_of_a_notebook(visit):
    tab = visit("search.html?q=calibration")
    tab.wait_for_selector("ul.search li a")
    hits = [a.get_attribute("href") for a in tab.query_selector_all("ul.search li a")]
    assert any("notebooks/06_compare.html" in hit for hit in hits), hits
