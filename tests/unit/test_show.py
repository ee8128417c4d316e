"""Views and figures: what a model wrote stays text, and every figure says in words what it shows."""

import copy
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from importlib import resources

import matplotlib
import numpy as np
import PIL.Image
import pytest
from IPython.core.formatters import DisplayFormatter
from IPython.display import Image
from matplotlib.figure import Figure

from dpo_tutorial import config, knobs, show
from dpo_tutorial.pairs import sources

HOSTILE = """<script>alert(1)</script><img src=x onerror=alert(2)>"'&amp;</td></table><a href="javascript:alert(3)">"""
OURS = {
    "style", "table", "caption", "thead", "tbody", "tr", "th", "td", "div", "p", "span", "details", "summary",
}  # fmt: skip


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
    assert page.attributes <= {"class", "scope", "title", "role", "aria-label", "style"}, page.attributes
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


def test_a_question_late_in_a_conversation_is_marked_as_such():
    prompt = [{"role": r, "content": t} for r, t in (("user", "Why?"), ("assistant", "So."), ("user", "And then?"))]
    said = {"text": "Later.", "finished": True}
    assert Page(show.answers([prompt], [said], [said])).cells[3] == "[question 2 of a conversation] And then?"


def test_tokens_show_a_hostile_answer_as_text_and_count_both_parts(tokenizer):
    prompt = tokenizer("hello\n", add_special_tokens=False)["input_ids"]
    answer = tokenizer(HOSTILE, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    view = show.tokens(tokenizer, prompt, answer)
    page = assert_only_text(view)
    assert page.text.endswith("hello⏎\n" + HOSTILE + "<|im_end|>")
    assert f"({len(prompt)} + {len(answer)} tokens)" in page.text
    assert view.data.count("title='prompt token") == len(prompt)
    assert view.data.count("title='answer token") == len(answer)


@pytest.mark.parametrize("mark", [*"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"], ids=ascii)
def test_what_turns_text_round_is_shown_as_a_sign_and_turns_nothing(tokenizer, mark):
    turning = copy.deepcopy(tokenizer)
    turning.add_tokens([mark])
    ids = turning(f"a{mark}b", add_special_tokens=False)["input_ids"]
    shares = [("a", 0.1), (mark, -0.2), ("b", 0.3)]
    shown = {"prompt": [], "chosen": shares, "rejected": shares, "reward_chosen": 0.2, "reward_rejected": 0.2}
    figure = show.heat_map_figure(shown)
    drawn = "".join(text.get_text() for axis in figure.axes for text in axis.texts)
    for text in (show.tokens(turning, ids, ids).data, show.heat_map(shown).data, drawn):
        assert f"[U+{ord(mark):X}]" in text and mark not in text


def test_a_single_token_that_is_a_whole_tag_is_shown_as_text(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "&quot;"])
    ids = tokenizer("<script>alert(1)</script><img src=x onerror=alert(2)>&quot;", add_special_tokens=False)[
        "input_ids"
    ]
    assert len(ids) == 3
    page = assert_only_text(show.tokens(tokenizer, ids, ids))
    assert page.text.endswith("<script>alert(1)</script><img src=x onerror=alert(2)>&quot;" * 2)


def test_a_table_shortens_floats_and_leaves_other_values_whole():
    assert Page(show.table([{"x": 0.123456, "n": 1234567, "none": None, "ok": True}])).cells[4:] == [
        "0.1235",
        "1234567",
        "None",
        "True",
    ]


def test_the_config_table_has_every_knob_with_its_value():
    cfg = dataclasses.replace(knobs.Config(), beta=0.3, model=HOSTILE)
    page = assert_only_text(show.config_table(cfg))
    rows = [page.cells[i : i + 5] for i in range(5, len(page.cells), 5)]
    assert [row[1] for row in rows] == config.known_parameters()
    assert {row[1]: row[2] for row in rows}["BETA"] == "0.3"
    assert {row[1]: row[2] for row in rows}["MODEL"] == HOSTILE


SHOWN = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": [("Air", 0.4), (" scatters", 0.25), (" blue.\n", -0.1)], "reward_chosen": 0.55,
    "rejected": [("Great", -0.8), (" question", -0.05), ("!", 0.0)], "reward_rejected": -0.85,
}  # fmt: skip


def spans(view, text):
    """Style attributes of the spans that hold exactly this text."""
    return re.findall(rf"<span([^>]*)>{re.escape(text)}</span>", view.data)


def test_the_heat_map_shows_both_answers_whole_with_their_rewards():
    page = assert_only_text(show.heat_map(SHOWN))
    for words in (
        "chosen: reward +0.55 over 3 tokens", "rejected: reward -0.85 over 3 tokens", "full colour: ±0.80",
        "Air scatters blue.⏎", "Great question!",
        "Up most: “Air” +0.40, “scatters” +0.25. Down most: “blue.” -0.10.",
        "Up most: none. Down most: “Great” -0.80, “question” -0.05.",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.cells[:4] == ["token", "reward", "Air", "+0.400"] and page.cells[-2:] == ["!", "+0.000"]


def test_heat_map_colours_follow_sign_and_size_on_one_scale_for_both_answers():
    view = show.heat_map(SHOWN)
    (up,), (down,), (zero,) = spans(view, "Air"), spans(view, "Great"), spans(view, "!")
    assert "rgba(0, 114, 178, 0.30)" in up and "dpo-down" not in up  # half of the largest value, in blue
    assert "rgba(230, 159, 0, 0.60)" in down and "dpo-down" in down  # the largest, in orange, underlined as well
    assert ", 0.00)" in zero and "title='+0.000'" in zero
    style, body = view.data.split("</style>")
    assert "color:" not in body and "color: inherit" in style, "text keeps the page's own colour, light or dark"


def test_the_heat_map_shows_hostile_tokens_as_text():
    hostile = SHOWN | {"chosen": [(HOSTILE, 0.5)], "rejected": [("$x_1$" + HOSTILE, -0.5)]}
    page = assert_only_text(show.heat_map(hostile))
    assert page.text.count(HOSTILE) >= 4, "in the line, in the words for screen readers, in the table"
    assert show.heat_map_figure(hostile).axes[1].texts[0].get_text() == "$x_1$" + HOSTILE


def test_the_held_out_table_has_both_columns_with_intervals():
    one = {"rate": 0.9, "low": 0.8, "high": 0.95}
    mean = {"mean": 1.25, "low": 1.0, "high": 1.5}
    after = dict.fromkeys(("accuracy", "pick_the_longer", "pick_the_shorter"), one) | {"ties": 2}
    after |= dict.fromkeys(("margin", "reward_chosen", "reward_rejected"), mean)
    before = after | {"accuracy": {"rate": 0.5, "low": 0.4, "high": 0.6}, "ties": 98}
    cells = Page(show.held_out_table(before, after)).cells
    assert cells[3:6] == ["accuracy", "0.50 by construction", "0.90 (0.80 to 0.95)"]
    assert cells[6:9] == ["ties", "98", "2"] and cells[9:12] == ["margin", "0", "1.25 (1.00 to 1.50)"]


@pytest.mark.parametrize("end", [math.nan, None], ids=["measured", "read from JSON"])
def test_a_value_without_an_interval_says_so(end):
    assert show.change({"difference": 0.5, "low": end, "high": end}) == "+0.50 (no interval: one value)"


def test_the_change_table_writes_shares_means_and_signed_changes():
    found = {
        "before": {"kept": {"rate": 0.25, "low": 0.1, "high": 0.4}, "tokens": {"mean": 80, "low": 70, "high": 90}},
        "after": {"kept": {"rate": 0.75, "low": 0.6, "high": 0.9}, "tokens": {"mean": 50, "low": 40, "high": 60}},
        "change": {
            "kept": {"difference": 0.5, "low": 0.3, "high": 0.7, "p": 0.002},
            "tokens": {"difference": -30, "low": -40, "high": -20, "p": 0.041},
        },
    }  # fmt: skip
    cells = Page(show.change_table(found, "form")).cells
    kept = ["kept", "0.25 → 0.75", "+0.50 (+0.30 to +0.70)", "0.002, moved"]
    tokens = ["tokens", "80.00 → 50.00", "-30.00 (-40.00 to -20.00)", "0.041, moved"]
    assert cells[4:8] == kept and cells[8:] == tokens
    found["target"] = {"kept": {"rate": 1.0}, "tokens": {"mean": 40.0}}
    found["change"]["kept"]["corrected"], found["change"]["tokens"]["corrected"] = 0.004, 0.082
    cells = Page(show.change_table(found, "form")).cells
    assert cells[:5] == ["form", "before → after", "chosen answers", "change, same prompts", "corrected p"]
    assert cells[5:10] == [*kept[:2], "1.00", kept[2], "0.004, moved"]
    assert cells[10:] == [*tokens[:2], "40.00", tokens[2], "0.082"]


def test_the_judges_stand_below_the_policy_with_the_paired_difference():
    share = {"rate": 0.75, "low": 0.6, "high": 0.9, "n": 40}
    against = {"shorter": {"share": share | {"rate": 0.5}, "difference": {"difference": 0.25, "low": 0.1, "high": 0.4}}}
    cells = Page(show.against_table(against, share)).cells
    assert cells[3:6] == ["policy", "0.75 (0.60 to 0.90)", ""]
    assert cells[6:] == ["shorter", "0.50 (0.60 to 0.90)", "+0.25 (+0.10 to +0.40)"]


def test_a_kind_of_rejected_answer_has_a_row_and_each_judge_of_words_a_column():
    judges = {"policy": 1.0, "word counts": 0.5, "shorter": 0.6, "likelier per token": 0.7}
    cells = Page(show.kinds_table({"form": {"n": 9} | {name: {"rate": rate} for name, rate in judges.items()}})).cells
    assert cells == ["rejected answer", "pairs", "policy", "word counts", "form", "9", "1.00", "0.50"]


def test_the_table_of_instructions_leaves_out_a_part_without_requests():
    before, after = ({"rate": r, "low": low, "high": h, "n": 8} for r, low, h in ((0.5, 0.3, 0.7), (0.25, 0.1, 0.5)))
    part = {
        "before": before, "after": after,
        "gained": 0, "lost": 2, "p": 0.5, "smallest": {"power_80": None},
    }  # fmt: skip
    cells = Page(show.instructions_table(part | {"within_style": part, "against_style": None})).cells
    row = ["8", "0.50 (0.30 to 0.70)", "0.25 (0.10 to 0.50)", "0, 2", "0.5", "none"]
    assert cells[7:] == ["all", *row, "within the style", *row]


def test_each_request_is_shown_with_both_answers_and_whether_they_follow():
    text = {"text": "Yes.", "tokens": 2, "finished": True}
    found = show.requests_table(
        [{"prompt": "One word?"}], {"before": [text], "after": [text | {"text": "<b>"}]},
        {"before": [True], "after": [False]},
    )  # fmt: skip
    assert Page(found).cells == ["request", "base", "after DPO", "One word?", "followed: Yes.", "not followed: <b>"]


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


PARTS = [
    {"shortest": -20, "longest": -3, "accuracy": rate(0.6)}, {"shortest": 4, "longest": 30, "accuracy": rate(0.9)},
]  # fmt: skip


def average(value):
    return {"mean": value, "low": value - 0.1, "high": value + 0.2}


TENTHS = {"chosen": [average(0.4), average(0.2)], "rejected": [average(-0.7), average(-0.2)]}

AUDITED = {
    "train": {"rows": 1200, "kept": 1090, "dropped": {"tied scores": 100, "too long": 10}},
    "test": {"rows": 42, "kept": 40, "dropped": {"empty answer": 2}},
}
STORED = json.loads((resources.files("dpo_tutorial.show") / "stored_run.json").read_text(encoding="utf-8"))

FIGURES = {
    "bars": (
        lambda: show.bars({"fp32": 538.0, "NF4": 99.5}, "MB", "Weights"),
        ["Weights", "fp32 538 MB", "NF4 99.5 MB"],
    ),
    "lengths": (lambda: show.lengths([10, 20, 30, 99], 64), ["4 pair", "median 25", "limit 64", "1 over"]),
    "nf4_levels": (lambda: show.nf4_levels(np.linspace(-1, 1, 640), np.linspace(-1, 1, 16)), ["640", "16"]),
    "lora_shapes": (
        lambda: show.lora_shapes("q_proj", 576, 192, 16, 32),
        ["W is 576 × 192, 110,592 frozen", "times 2, B is 576 × 16 and A is 16 × 192", "12,288 trainable", "11.1%"],
    ),
    "pipeline": (show.pipeline, ["Six notebooks", "01 setup gives config, seeds", "06 compare gives verdict"]),
    "training_curves": (lambda: show.training_curves(HISTORY), ["3 steps", "0.693", "0.412", "0.87"]),
    "reward_curves": (
        show.reward_curves,
        [
            f"{STORED['train'][-1]['step']} steps",
            " and ".join(f"{side} {STORED['eval'][-1][f'eval_rewards/{side}']:.2f}" for side in ("chosen", "rejected")),
        ],
    ),
    "margins": (
        lambda: show.margins([{"margin": m} for m in (1.0, 2.0, -0.5, 0.0)]),
        ["4 held-out", "2 above 0", "0.62"],
    ),
    "rates": (lambda: show.rates({"rule": rate(0.25)}, {"rule": rate(0.75)}), ["keep each rule", "rule 0.25 to 0.75"]),
    "loss_curve": (lambda: show.loss_curve(0.1), ["ln 2", "from 6 to 0"]),
    "distance_by_beta": (
        lambda: show.distance_by_beta([0.1, 1.0, 10.0], [2.0, 0.5, 0.1], [1.0, 10.0], [0.51, 0.1]),
        ["beta 1: 0.510 nats", "beta 10: 0.100 nats"],
    ),
    "by_length_gap": (
        lambda: show.by_length_gap(PARTS, rate(0.8)),
        ["-20 to -3 tokens: 0.60", "+4 to +30 tokens: 0.90"],
    ),
    "calibration": (
        lambda: show.calibration({"bins": [{"confidence": 0.6, "accuracy": rate(0.7)}]}),
        ["0.60 said, 0.70 right"],
    ),
    "by_position": (lambda: show.by_position(TENTHS), ["chosen: +0.40 in the first tenth, +0.60 in all", "-0.90"]),
    "heat_map_figure": (
        lambda: show.heat_map_figure(SHOWN),
        ["chosen: reward +0.55 over 3 tokens", "Down most: “Great” -0.80"],
    ),
    "dropped_rows": (
        lambda: show.dropped_rows(AUDITED),
        ["train: 1,090 of 1,200 rows kept, 100 tied scores, 10 too long;", "test: 40 of 42 rows kept, 2 empty answer."],
    ),
}


def labels(axis):
    return [t.get_text() for t in axis.get_legend().get_texts()]


def inside(axis, x):
    low, high = axis.get_xlim()
    return low <= x <= high


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_names_its_numbers_in_its_alt_text(name):
    make, said = FIGURES[name]
    before = matplotlib.pyplot.get_fignums()
    figure = make()
    assert isinstance(figure, Figure)
    assert matplotlib.pyplot.get_fignums() == before, "else a notebook shows it twice"
    for part in said:
        assert part in show.alt_text(figure)


@pytest.mark.parametrize("values", [(1.0, 2.0, -0.5), (0.0, 0.0), (0.3,), (0.1, 5.0)])
def test_no_bar_of_the_margins_straddles_zero_and_none_is_lost(values):
    (axis,) = show.margins([{"margin": v} for v in values]).axes
    bars = axis.patches
    assert sum(bar.get_height() for bar in bars) == len(values)
    assert all(bar.get_x() >= -1e-9 or bar.get_x() + bar.get_width() <= 1e-9 for bar in bars)


def test_bars_are_as_long_as_their_values_and_carry_them_as_labels():
    axis = show.bars({"fp32": 538.0, "NF4": 99.5}, "MB", "Weights").axes[0]
    assert [patch.get_width() for patch in axis.patches] == [538.0, 99.5]
    assert [t.get_text() for t in axis.texts] == ["538 MB", "99.5 MB"]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["fp32", "NF4"]
    assert axis.get_xlim()[0] == 0 and axis.get_xlim()[1] > 538


def test_dropped_rows_draws_every_row_once_in_each_half_and_writes_the_sums():
    whole, parts = show.dropped_rows(AUDITED).axes
    assert sum(patch.get_width() for patch in whole.patches) == 1242
    assert sum(patch.get_width() for patch in parts.patches) == 112
    assert [t.get_text() for t in whole.texts] == ["1,090 of 1,200 kept", "40 of 42 kept"]
    assert [t.get_text() for t in parts.get_yticklabels()] == ["tied scores", "too long", "empty answer"]
    assert [t.get_text() for t in parts.texts] == ["100", "10", "2"]
    assert labels(whole) == ["kept", "dropped"] and labels(parts) == ["train", "test"]


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
    assert drawn["before the first update"].get_ydata()[0] == STEPS[0]["loss"]


def segments(axis):
    """(low, high) of each error bar on an axis, by the label of its series."""
    found = {}
    for container in axis.containers:
        _, _, (bars,) = container.lines
        found[container.get_label()] = [(s[:, 1].min(), s[:, 1].max()) for s in bars.get_segments()]
    return found


def test_accuracy_by_length_gap_is_drawn_with_intervals_chance_and_the_whole():
    axis = show.by_length_gap(PARTS, rate(0.8)).axes[0]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["-20 to -3", "+4 to +30"]
    assert np.allclose(segments(axis)["accuracy, 95% interval"], [(0.5, 0.7), (0.8, 1.0)])
    drawn = {line.get_label(): line.get_ydata()[0] for line in axis.lines}
    assert drawn["all pairs"] == 0.8 and drawn["chance"] == 0.5


def test_calibration_draws_accuracy_over_confidence_and_the_diagonal():
    bins = [{"confidence": c, "accuracy": rate(a)} for c, a in ((0.6, 0.5), (0.9, 0.95))]
    axis = show.calibration({"bins": bins}).axes[0]
    points = axis.containers[0].lines[0]
    assert list(points.get_xdata()) == [0.6, 0.9] and list(points.get_ydata()) == [0.5, 0.95]
    diagonal = {line.get_label(): line for line in axis.lines}["right as often as it says"]
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0.5, 1]


def test_rewards_by_position_are_drawn_for_both_sides_with_their_intervals():
    axis = show.by_position(TENTHS).axes[0]
    drawn = {c.get_label(): list(c.lines[0].get_ydata()) for c in axis.containers}
    assert drawn == {"chosen": [0.4, 0.2], "rejected": [-0.7, -0.2]}
    assert np.allclose(segments(axis)["chosen"], [(0.3, 0.6), (0.1, 0.4)])


def test_distance_by_beta_draws_the_optimum_and_what_was_reached():
    axis = show.distance_by_beta([0.1, 1.0], [2.0, 0.5], [1.0], [0.51]).axes[0]
    line, dots = axis.lines
    assert list(line.get_ydata()) == [2.0, 0.5] and list(dots.get_ydata()) == [0.51]
    assert axis.get_xscale() == "log"


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
    drawn = PIL.Image.open(io.BytesIO(image.data))
    assert drawn.width == 2 * metadata["image/png"]["width"] == 2 * 672, "two pixels for each that a page shows"
    assert drawn.convert("RGB").getpixel((0, 0)) == (255, 255, 255), "few colours, and white is one of them"


def test_what_ultrafeedback_is_adds_up_and_holds_no_text():
    counts = sources.ultrafeedback_counts()
    assert counts["tied"] + sum(counts["gaps"]) == counts["rows"], "no pair has its scores the wrong way round"
    assert all(sum(n) == counts["rows"] for n in counts["words"].values())
    figure = show.ultrafeedback(counts)
    assert len(figure.axes[0].patches) == 1 + len(counts["gaps"])
    assert f"{counts['tied']} have equal scores" in show.alt_text(figure)
