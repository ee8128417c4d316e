"""Sphinx settings of the guide: the committed notebooks as a site that needs no network (`make guide`)."""

import hashlib
import importlib.util
import json
import posixpath
import re
import shutil
import tomllib
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import download_reference, pending_xref

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]  # the one place that names it

project = html_title = PROJECT["name"]
html_show_copyright = False
extensions = ["myst_nb", "sphinx_copybutton", "sphinx.ext.mathjax"]
exclude_patterns = ["README.md", "docs/index.md", "**/.ipynb_checkpoints"]  # the start page takes the first two in
highlight_language = "none"  # a fence without a language is a drawing or an output, not Python
myst_enable_extensions = ["dollarmath", "html_image"]  # README sets the width of its pictures
myst_heading_anchors = 3
nb_execution_mode = "off"  # the outputs are those of the committed run
nb_render_markdown_format = "gfm"  # an adapter's card holds a table
copybutton_selector = "div.highlight pre:not(.cell_output pre)"  # code is copied, outputs are read

# MathJax comes out of a wheel: its program and fonts, 1.5 MB of the 24 that the wheel's own extension would copy.
MATHJAX = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
MATHJAX_SHA256 = "0a6ded5abbce13331658dd239f34382abd06492c74b71b61e8caa8112ec55fa5"  # tex-chtml.js of MathJax 3.2.2
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}  # the menu loads parts that are not copied

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["guide.css"]
html_js_files = ["guide.js"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_use_index = False
html_theme_options = {"footer_icons": [{"name": "Repository", "url": REPOSITORY, "html": "Repository", "class": ""}]}


def copy_mathjax(app):
    """Put MathJax beside the other static files, if it is the one that was tested."""
    program = (MATHJAX / "tex-chtml.js").read_bytes()
    if (found := hashlib.sha256(program).hexdigest()) != MATHJAX_SHA256:
        raise RuntimeError(f"tex-chtml.js has SHA-256 {found}, not {MATHJAX_SHA256}")
    fonts = "output/chtml/fonts/woff-v2"
    there = app.outdir / "_static" / "mathjax"
    shutil.copytree(MATHJAX / fonts, there / fonts, dirs_exist_ok=True)
    (there / "tex-chtml.js").write_bytes(program)


#: Cells that every notebook begins with, by their code or their tag, and what stands on their fold.
HEADS = {
    r"try:\n +import dpo_tutorial.*": "Code: get the package",
    r"parameters": "Code: settings",
    r"from dpo_tutorial import [\w, ]+\n+cfg = config\.from_notebook\(.*": "Code: make the config",
}


def prepare_cells(app, docname, source):
    """Fold the head cells, and give images the alt text and the width that lie with them: myst-nb asks the cell."""
    if not docname.startswith("notebooks/"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        tags, code = cell["metadata"].setdefault("tags", []), "".join(cell["source"])
        shown = cell["metadata"]["mystnb"] = {}
        for head, words in HEADS.items():
            if head in tags or re.fullmatch(head, code, re.DOTALL):
                tags.append("hide-input")
                shown |= {"code_prompt_show": words, "code_prompt_hide": words}
        for output in cell["outputs"]:
            if found := output.get("metadata", {}).get("image/png"):
                shown["image"] = {"alt": found["alt"]}
                if "width" in found:
                    shown["image"]["width"] = f"{found['width']}px"
    source[0] = json.dumps(notebook)


def readme_is_the_start_page(app, docname, source):
    """The start page takes the README in, so links to it, and into it, lead there."""
    source[0] = source[0].replace("](../README.md", "](../index.md")


def lead_out(app, doctree):
    """A link to a file that is no page leads to the repository; a badge that lies on a server becomes its text."""
    here = posixpath.dirname(app.env.docname)
    for link in [*doctree.findall(pending_xref), *doctree.findall(download_reference)]:
        path, mark, anchor = link["reftarget"].partition("#")
        path = posixpath.normpath(posixpath.join(here, path))
        if link["refdomain"] is None and (ROOT / path).is_file():
            target = f"{REPOSITORY}/blob/main/{path}{mark}{anchor}"
            link.replace_self(nodes.reference("", "", *link.children, refuri=target, internal=False))
    for image in list(doctree.findall(nodes.image)):
        if image["uri"].startswith("https:"):
            image.parent["classes"].append("guide-button")
            image.replace_self(nodes.inline("", image["alt"]))


def name_levels(app, pagename, templatename, context, doctree):
    """The captions of the navigation are headings; screen readers want to know of which level."""
    tree = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = tree.replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app):
    app.connect("builder-inited", copy_mathjax)
    app.connect("source-read", prepare_cells)
    app.connect("source-read", readme_is_the_start_page)
    app.connect("doctree-read", lead_out, priority=400)  # before images are collected
    app.connect("html-page-context", name_levels, priority=900)  # after the theme has written its navigation
