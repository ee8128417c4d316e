"""Views and figures: what a model wrote stays text, and every figure says in words what it shows."""

import copy
import dataclasses
import math
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from IPython.display import Image
from matplotlib.figure import Figure

from dpo_tutorial import config, show

HOSTILE = """<script>alert(1)</script><img src=x onerror=alert(2)>"'&amp;</td></table><a href="javascript:alert(3)">"""
OURS = {"style", "table", "caption", "thead", "tbody", "tr", "th", "td", "div", "p", "span"}


class Page(HTMLParser):
    """Tags, attributes and visible text of an HTML view, as a browser would find them."""

    def __init__(self, view):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self._style = set(), set(), "", False
        self.cells = []
        self.feed(view.data)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self._style = tag == "style"
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        self._style = False

    def handle_data(self, data):
        if not self._style:
            self.text += data
            if self.cells:
                self.cells[-1] += data


def assert_only_text(view):
    page = Page(view)
    assert page.tags <= OURS, page.tags - OURS
    assert page.attributes <= {"class", "scope", "title", "role", "aria-label"}, page.attributes
    assert "<script" not in view.data and "<img" not in view.data
    return page


# --- views ----


def test_a_table_shows_hostile_cells_keys_and_caption_as_text():
    page = assert_only_text(show.table([{HOSTILE: HOSTILE, "list": [HOSTILE, 1]}], HOSTILE))
    assert page.cells == [HOSTILE, "list", HOSTILE, f"{HOSTILE}, 1"]
    assert page.text.startswith(HOSTILE), "the caption comes first"


def test_a_conversation_shows_hostile_roles_and_contents_as_text():
    page = assert_only_text(show.conversation([{"role": HOSTILE, "content": HOSTILE}]))
    assert page.cells == ["role", "content", HOSTILE, HOSTILE]


def test_answers_show_hostile_prompts_answers_and_labels_as_text():
    prompt = [{"role": "system", "content": "hidden"}, {"role": "user", "content": HOSTILE}]
    whole, cut = {"text": HOSTILE, "finished": True}, {"text": HOSTILE, "finished": False}
    page = assert_only_text(show.answers([prompt], [whole], [cut], HOSTILE, HOSTILE + "2"))
    assert page.cells == ["prompt", HOSTILE, HOSTILE + "2", HOSTILE, HOSTILE, HOSTILE + " […cut at the token limit]"]
    assert "hidden" not in page.text


def test_answers_of_different_counts_are_refused():
    with pytest.raises(ValueError):
        show.answers([[{"content": "a"}]], [], [])


def test_tokens_show_a_hostile_answer_as_text_and_count_both_parts(tokenizer):
    prompt = tokenizer("hello\n", add_special_tokens=False)["input_ids"]
    answer = tokenizer(HOSTILE, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    view = show.tokens(tokenizer, prompt, answer)
    page = assert_only_text(view)
    assert page.text.endswith("hello⏎\n" + HOSTILE + "<|im_end|>")
    assert f"({len(prompt)} + {len(answer)} tokens)" in page.text
    assert view.data.count("title='prompt token") == len(prompt)
    assert view.data.count("title='answer token") == len(answer)


def test_a_single_token_that_is_a_whole_tag_is_shown_as_text(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "&quot;"])
    ids = tokenizer("<script>alert(1)</script><img src=x onerror=alert(2)>&quot;", add_special_tokens=False)[
        "input_ids"
    ]
    assert len(ids) == 3
    page = assert_only_text(show.tokens(tokenizer, ids, ids))
    assert page.text.endswith("<script>alert(1)</script><img src=x onerror=alert(2)>&quot;" * 2)


def test_a_table_puts_every_value_under_its_own_key():
    page = Page(show.table([{"a": "1", "b": "2"}, {"b": "4", "a": "3"}]))
    assert page.cells == ["a", "b", "1", "2", "3", "4"]


def test_a_table_without_rows_says_so():
    assert "no rows" in show.table([]).data


def test_a_table_shortens_floats_and_leaves_other_values_whole():
    assert Page(show.table([{"x": 0.123456, "n": 1234567, "none": None, "ok": True}])).cells[4:] == [
        "0.1235",
        "1234567",
        "None",
        "True",
    ]


def test_the_config_table_has_every_knob_with_its_value():
    cfg = dataclasses.replace(config.Config(), beta=0.3, model=HOSTILE)
    page = assert_only_text(show.config_table(cfg))
    rows = [page.cells[i : i + 5] for i in range(5, len(page.cells), 5)]
    assert [row[1] for row in rows] == config.known_parameters()
    assert {row[1]: row[2] for row in rows}["BETA"] == "0.3"
    assert {row[1]: row[2] for row in rows}["MODEL"] == HOSTILE


# --- figures ----

STEPS = [
    {"step": n, "loss": loss, "rewards/accuracies": a, "rewards/margins": m, "rewards/chosen": c, "rewards/rejected": r}
    for n, loss, a, m, c, r in (
        (1, 0.6931, 0.0, 0.0, 0.0, 0.0),
        (2, 0.55, 0.75, 0.4, 0.3, -0.1),
        (3, 0.412, 1.0, 0.87, 0.5, -0.37),
    )
]
EVALS = [{f"eval_{k}": v for k, v in row.items() if k != "step"} | {"step": row["step"] - 1} for row in STEPS[::2]]
HISTORY = {"train": STEPS, "eval": EVALS}


def rate(value):
    return {"rate": value, "low": value - 0.1, "high": value + 0.1}


FIGURES = {
    "bars": (
        lambda: show.bars({"fp32": 538.0, "NF4": 99.5}, "MB", "Weights"),
        ["Weights", "fp32 538 MB", "NF4 99.5 MB"],
    ),
    "lengths": (lambda: show.lengths([10, 20, 30, 99], 64), ["4 pair", "median 25", "limit 64", "1 over"]),
    "nf4_levels": (lambda: show.nf4_levels(np.linspace(-1, 1, 640), np.linspace(-1, 1, 16)), ["640", "16"]),
    "training_curves": (lambda: show.training_curves(HISTORY), ["3 steps", "0.693", "0.412", "0.87"]),
    "margins": (
        lambda: show.margins([{"margin": m} for m in (1.0, 2.0, -0.5, 0.0)]),
        ["4 held-out", "2 above 0", "0.62"],
    ),
    "rates": (lambda: show.rates({"rule": rate(0.25)}, {"rule": rate(0.75)}, "Kept"), ["Kept", "rule 0.25 to 0.75"]),
    "loss_curve": (lambda: show.loss_curve(0.1), ["ln 2", "from 6 to 0", "from 1 to 0"]),
}


def labels(axis):
    return [t.get_text() for t in axis.get_legend().get_texts()]


def inside(axis, x):
    low, high = axis.get_xlim()
    return low <= x <= high


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_names_its_numbers_in_its_alt_text(name):
    make, said = FIGURES[name]
    figure = make()
    assert isinstance(figure, Figure)
    for part in said:
        assert part in show.alt_text(figure)


def test_every_function_that_makes_a_figure_is_tested_here():
    made = {n for n, f in vars(show).items() if getattr(f, "__annotations__", {}).get("return") == "Figure"}
    assert made == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_shown_once_because_pyplot_has_let_go_of_it(name):
    before = matplotlib.pyplot.get_fignums()
    FIGURES[name][0]()
    assert matplotlib.pyplot.get_fignums() == before


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_of_a_figure_has_a_title_and_an_x_label(name):
    for axis in FIGURES[name][0]().axes:
        assert axis.get_title() and axis.get_xlabel()


def test_bars_are_as_long_as_their_values_and_carry_them_as_labels():
    axis = show.bars({"fp32": 538.0, "NF4": 99.5}, "MB", "Weights").axes[0]
    assert [patch.get_width() for patch in axis.patches] == [538.0, 99.5]
    assert [t.get_text() for t in axis.texts] == ["538 MB", "99.5 MB"]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["fp32", "NF4"]
    assert axis.get_xlim()[0] == 0 and axis.get_xlim()[1] > 538


def test_bars_write_values_above_a_thousand_without_an_exponent():
    figure = show.bars({"all weights": 1614.0, "kept": 2000}, "MB", "What learning needs")
    written = " ".join(t.get_text() for t in figure.axes[0].texts) + show.alt_text(figure)
    assert "e+" not in written


def test_lengths_draws_every_pair_and_the_limit_even_where_no_pair_reaches_it():
    axis = show.lengths([10, 20, 30, 40], 256).axes[0]
    assert sum(patch.get_height() for patch in axis.patches) == 4
    assert [list(line.get_xdata()) for line in axis.lines] == [[256, 256]]
    assert labels(axis) == ["max_tokens = 256"] and inside(axis, 256)


def test_nf4_levels_draws_one_line_per_level():
    levels = np.array([-1.0, -0.3, 0.0, 0.4, 1.0])
    axis = show.nf4_levels(np.linspace(-1, 1, 64), levels).axes[0]
    assert [line.get_xdata()[0] for line in axis.lines] == list(levels)


def test_margins_counts_every_pair_and_marks_zero():
    axis = show.margins([{"margin": m} for m in (1.0, 2.0, 3.0, -0.5)]).axes[0]
    assert sum(patch.get_height() for patch in axis.patches) == 4
    assert axis.lines[0].get_xdata()[0] == 0 and inside(axis, 0)


def test_a_margin_of_zero_does_not_count_as_above_zero():
    assert "; 0 above 0" in show.alt_text(show.margins([{"margin": 0.0}] * 3))


def test_rates_draws_both_series_with_their_intervals():
    before, after = {"a": rate(0.25), "b": rate(0.5)}, {"a": rate(0.75), "b": rate(0.6)}
    axis = show.rates(before, after).axes[0]
    assert labels(axis) == ["base", "after DPO"]
    for container, values in zip(axis.containers, (before, after), strict=True):
        line, _, (bars,) = container.lines
        assert list(line.get_xdata()) == [v["rate"] for v in values.values()]
        for segment, value in zip(bars.get_segments(), values.values(), strict=True):
            assert np.allclose(segment[:, 0], [value["low"], value["high"]])
    assert [t.get_text() for t in axis.get_yticklabels()] == ["a", "b"]


def test_training_curves_draw_training_as_lines_and_validation_as_dots():
    loss, accuracy, reward = show.training_curves(HISTORY).axes
    drawn = {line.get_label(): line for axis in (loss, accuracy, reward) for line in axis.lines}
    for label, key in (
        ("loss", "loss"),
        ("accuracy", "rewards/accuracies"),
        ("chosen", "rewards/chosen"),
        ("rejected", "rewards/rejected"),
    ):
        assert list(drawn[f"{label} (train)"].get_xdata()) == [1, 2, 3]
        assert list(drawn[f"{label} (train)"].get_ydata()) == [row[key] for row in STEPS]
        assert list(drawn[f"{label} (val)"].get_xdata()) == [0, 2]
        assert list(drawn[f"{label} (val)"].get_ydata()) == [row[f"eval_{key}"] for row in EVALS]
        assert drawn[f"{label} (val)"].get_marker() == "o"
    assert drawn["ln 2: no preference"].get_ydata()[0] == pytest.approx(math.log(2))


def test_training_curves_do_without_validation():
    loss = show.training_curves({"train": STEPS, "eval": []}).axes[0]
    assert "loss (train)" in labels(loss) and "loss (val)" not in labels(loss)


def test_the_loss_curve_passes_ln_2_at_0_and_its_weight_one_half():
    axis = show.loss_curve(0.1).axes[0]
    loss, weight, point = axis.lines
    assert np.interp(0, loss.get_xdata(), loss.get_ydata()) == pytest.approx(math.log(2), abs=1e-3)
    assert np.interp(0, weight.get_xdata(), weight.get_ydata()) == pytest.approx(0.5, abs=1e-3)
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (0, math.log(2))
    assert np.allclose(loss.get_ydata(), -np.log(1 / (1 + np.exp(-loss.get_xdata()))))
    assert np.all(np.diff(loss.get_ydata()) < 0) and np.all(np.diff(weight.get_ydata()) < 0)
    assert "0.1" in axis.get_xlabel()


def test_a_picture_is_a_png_that_carries_its_alt_text_into_the_notebook():
    figure = show.lengths([10, 20, 30], 64)
    image = show.picture(figure)
    assert isinstance(image, Image)
    data, metadata = DisplayFormatter().format(image)
    assert metadata["image/png"]["alt"] == show.alt_text(figure) != ""
    assert image.data.startswith(b"\x89PNG") and "image/png" in data
