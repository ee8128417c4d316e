"""Figures and HTML views. Everything a model or a dataset wrote is escaped before it becomes HTML."""

from __future__ import annotations

import ast
import html
import inspect
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
from IPython.display import HTML, Image
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import PreTrainedTokenizerBase

from . import dpo

# Okabe and Ito's colours: told apart with any colour vision, and visible on light and dark pages.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#808080"

_STYLE = """<style>
.dpo {border-collapse: collapse; font-size: 0.92em; color: inherit;}
.dpo th, .dpo td {border: 1px solid #8886; padding: 0.35em 0.6em; text-align: left !important; vertical-align: top;
  white-space: pre-wrap; overflow-wrap: anywhere; max-width: 36em;}
.dpo th {background: #8883;}
.dpo-tokens span {border-radius: 3px; padding: 1px 0; white-space: pre-wrap;}
.dpo-prompt {background: #80808033;} .dpo-answer {background: #0072B244; border-bottom: 2px solid #0072B2;}
.dpo-tokens .dpo-down {border-bottom: 2px dotted currentColor;}
.dpo-hidden {position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);}
</style>"""


def table(rows: Sequence[dict], caption: str = "") -> HTML:
    """An HTML table with one column per key of the first row; every cell is escaped text."""
    return HTML(_STYLE + _table(rows, caption))


def _table(rows: Sequence[dict], caption: str = "") -> str:
    if not rows:
        return "<p>(no rows)</p>"
    head = "".join(f"<th scope='col'>{html.escape(str(k))}</th>" for k in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(row.get(k, '')))}</td>" for k in rows[0]) + "</tr>" for row in rows
    )
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return (
        f"<table class='dpo tex2jax_ignore mathjax_ignore'>{title}"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def share(rate: dict) -> str:
    """A rate with its interval, in words."""
    return f"{rate['rate']:.2f} ({rate['low']:.2f} to {rate['high']:.2f})"


def average(mean: dict, digits: int = 2) -> str:
    """A mean with its interval, in words."""
    return f"{mean['mean']:.{digits}f} ({mean['low']:.{digits}f} to {mean['high']:.{digits}f})"


def change(difference: dict, digits: int = 2) -> str:
    """A difference with its sign and its interval, in words."""
    low, high = difference["low"], difference["high"]
    return f"{difference['difference']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def held_out_table(before: dict, after: dict) -> HTML:
    """What base and policy make of the held-out pairs (`statistics.summarise` of each), with 95% intervals."""
    rows = [  # before training all is 0 by construction, not by sampling: no interval there
        ("accuracy", f"{before['accuracy']['rate']:.2f} by construction", share(after["accuracy"])),
        ("ties", before["ties"], after["ties"]),
        ("margin", "0", average(after["margin"])),
        ("reward of chosen", "0", average(after["reward_chosen"])),
        ("reward of rejected", "0", average(after["reward_rejected"])),
        ("rule: pick the longer answer", share(before["pick_the_longer"]), "the same"),
        ("rule: pick the shorter answer", share(before["pick_the_shorter"]), "the same"),
    ]
    return table([{"held-out pairs": what, "before": b, "after": a} for what, b, a in rows])


def change_table(found: dict[str, dict], what: str) -> HTML:
    """`statistics.rules` or `statistics.form` as a table: before, after, and the paired change."""

    def written(value):
        return share(value) if "rate" in value else average(value)

    return table([
        {
            what: name, "before": written(found["before"][name]), "after": written(found["after"][name]),
            "change, same prompts": change(found["change"][name]),
        }
        for name in found["before"]
    ])  # fmt: skip


def source(*functions: Callable) -> str:
    """The code of functions without their docstrings, to be read beside an equation."""
    shown = []
    for function in functions:
        lines = inspect.getsource(function).splitlines()
        parsed: Any = ast.parse(inspect.getsource(function)).body[0]
        first = parsed.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            del lines[first.lineno - 1 : first.end_lineno]
        shown.append("\n".join(lines))
    return "\n\n".join(shown)


def config_table(config) -> HTML:
    """Every hyper-parameter and data limit of a run, with unit and meaning."""
    return table(config.rows(), f"Profile {config.profile}")


def conversation(messages: Sequence[dict]) -> HTML:
    """One conversation, a row per turn."""
    return table([{"role": m["role"], "content": m["content"]} for m in messages])


def tokens(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> HTML:
    """The tokens of prompt (grey) and answer (blue, underlined): what the completion mask tells apart."""

    def spans(ids, kind):
        parts = (html.escape(tokenizer.decode([i])).replace("\n", "⏎\n") for i in ids)
        return "".join(
            f"<span class='dpo-{kind}' title='{kind} token {i}'>{p}</span>" for i, p in zip(ids, parts, strict=True)
        )

    legend = (
        "<p><span class='dpo-prompt'>prompt: mask 0</span> <span class='dpo-answer'>answer: mask 1</span> "
        f"({len(prompt_ids)} + {len(answer_ids)} tokens)</p>"
    )
    text = spans(prompt_ids, "prompt") + spans(answer_ids, "answer")
    return HTML(f"{_STYLE}<div class='dpo-tokens tex2jax_ignore mathjax_ignore'>{legend}<p>{text}</p></div>")


def answers(prompts, before, after, rejected_label="base", chosen_label="after DPO") -> HTML:
    """Side by side: the last user message, the base's answer, the policy's answer. All of it escaped.

    Where more came before that message, the row says so.
    """

    def asked(prompt):
        turns = sum(m["role"] == "user" for m in prompt)
        return (f"[question {turns} of a conversation] " if turns > 1 else "") + prompt[-1]["content"]

    rows = [
        {"prompt": asked(p), rejected_label: _answer(b), chosen_label: _answer(a)}
        for p, b, a in zip(prompts, before, after, strict=True)
    ]
    return table(rows, "Same prompts, same greedy decoding")


def _answer(answer: dict) -> str:
    return answer["text"] + ("" if answer["finished"] else " […cut at the token limit]")


def heat_map(shown: dict) -> HTML:
    """Where in a sentence the preference lives: beta times the log-ratio of each token, policy against reference.

    Blue tokens (solid scale) became likelier, orange ones (underlined with dots) less likely; both answers share one
    scale. The values of an answer add up to its reward.

    Args:
        shown: as `evaluate.token_rewards` makes it.
    """
    largest = _largest(shown)
    parts = [f"<p class='dpo-tokens'>{_shaded('less likely', -largest, largest)} · 0 · "
             f"{_shaded('more likely', largest, largest)} (full colour: ±{largest:.2f})</p>"]  # fmt: skip
    for side in ("chosen", "rejected"):
        tokens = shown[side]
        title = _heat_title(shown, side)
        rows = _table([{"token": text, "reward": f"{reward:+.3f}"} for text, reward in tokens])
        parts.append(
            f"<div role='group' aria-label='{html.escape(title)}'><p>{html.escape(title)}</p>"
            f"<p class='dpo-hidden'>{html.escape(_strongest(tokens))}</p>"
            f"<p class='dpo-tokens'>{''.join(_shaded(text, reward, largest) for text, reward in tokens)}</p>"
            f"<details><summary>{side}: token by token</summary>{rows}</details></div>"
        )
    return HTML(f"{_STYLE}<div class='tex2jax_ignore mathjax_ignore'>{''.join(parts)}</div>")


def _largest(shown: dict) -> float:
    return max((abs(reward) for side in ("chosen", "rejected") for _, reward in shown[side]), default=0.0) or 1.0


def _heat_title(shown: dict, side: str) -> str:
    return f"{side}: reward {shown[f'reward_{side}']:+.2f} over {len(shown[side])} tokens"


def _strongest(tokens: Sequence[tuple[str, float]], n: int = 3) -> str:
    ordered = sorted(tokens, key=lambda token: token[1])
    down = [f"“{text.strip()}” {reward:+.2f}" for text, reward in ordered[:n] if reward < 0]
    up = [f"“{text.strip()}” {reward:+.2f}" for text, reward in ordered[: -n - 1 : -1] if reward > 0]
    return f"Up most: {', '.join(up) or 'none'}. Down most: {', '.join(down) or 'none'}."


def _shaded(text: str, reward: float, largest: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for color in (BLUE if reward > 0 else ORANGE,) for i in (1, 3, 5))
    strength = 0.6 * abs(reward) / largest  # translucent: the page's own text colour stays readable, light or dark
    kind = " class='dpo-down'" if reward < -0.15 * largest else ""
    written = html.escape(text).replace("\n", "⏎\n")
    return (
        f"<span{kind} title='{reward:+.3f}' style='background: rgba({red}, {green}, {blue}, {strength:.2f})'>"
        f"{written}</span>"
    )


# --- figures ------------------------------------------------------------------------------------------------------


def _figure(
    width: float = 7.0, height: float = 3.2, columns: int = 1, rows: int = 1, alt: str = "", **axes_options
) -> tuple[Figure, np.ndarray]:
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False, dpi=192, **axes_options
    )
    figure.set_label(alt)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    plt.close(figure)  # shown once, as the value of the cell
    return figure, axes.flatten()


def alt_text(figure: Figure) -> str:
    """What the figure shows, in words."""
    return str(figure.get_label())


#: The six notebooks, and what each hands on.
PIPELINE = (
    ("01 setup", "config, seeds"),
    ("02 load 4-bit", "base in NF4"),
    ("03 attach LoRA", "adapter on / off"),
    ("04 prepare pairs", "prompt, chosen, rejected"),
    ("05 train DPO", "trained adapter"),
    ("06 compare", "verdict"),
)


def pipeline() -> Figure:
    """Map of the six notebooks: a box each, and under it what it hands on."""
    said = "; ".join(f"{name} gives {gives}" for name, gives in PIPELINE)
    figure, (axis,) = _figure(height=1.7, alt=f"Six notebooks in a row. {said}.")
    for place, (name, gives) in enumerate(PIPELINE):
        number, title = name.split(" ", 1)
        box = dict(boxstyle="round,pad=0.5", facecolor="white", edgecolor=BLUE, linewidth=1.5)
        axis.text(place, 0.62, f"{number}\n{title}", ha="center", va="center", fontsize=8, color="black", bbox=box)
        axis.text(place, 0.08, gives.replace(", ", ",\n", 1), ha="center", va="center", fontsize=7, color=GREY)
        if place:
            axis.annotate(
                "", (place - 0.40, 0.62), (place - 0.60, 0.62), arrowprops={"arrowstyle": "->", "color": ORANGE}
            )
    axis.set(xlim=(-0.5, len(PIPELINE) - 0.5), ylim=(-0.1, 1.1), xticks=[], yticks=[])
    axis.set(xlabel="what each hands on to the next", title="Six notebooks, one pipeline")
    axis.spines[:].set_visible(False)
    return figure


def bars(values: dict[str, float], unit: str, title: str) -> Figure:
    """Horizontal bars with their values written out."""
    written = {k: f"{v:,.0f} {unit}" if abs(v) >= 100 else f"{v:.3g} {unit}" for k, v in values.items()}
    said = "; ".join(f"{k} {v}" for k, v in written.items())
    figure, (axis,) = _figure(height=0.8 + 0.42 * len(values), alt=f"{title}: {said}")
    shown = axis.barh(list(values), list(values.values()), color=BLUE)
    axis.bar_label(shown, labels=list(written.values()), padding=4)
    axis.invert_yaxis()
    axis.set(xlabel=unit, title=title, xlim=(0, 1.3 * max(values.values())))
    return figure


def lengths(values: Sequence[int], limit: int) -> Figure:
    """Histogram of pair lengths in tokens with the limit drawn."""
    over = sum(v > limit for v in values)
    alt = (
        f"Histogram of {len(values)} pair lengths, median {np.median(values):.0f} tokens; limit {limit}, {over} over it"
    )
    figure, (axis,) = _figure(alt=alt)
    axis.hist(values, bins=30, color=BLUE)
    axis.axvline(limit, color=ORANGE, linewidth=2, label=f"max_tokens = {limit}")
    axis.set(xlabel="tokens of prompt + longer answer", ylabel="pairs", title="Pair lengths")
    axis.legend()
    return figure


def nf4_levels(weights: np.ndarray, levels: np.ndarray) -> Figure:
    """The 16 NF4 levels over a histogram of weights scaled by the largest absolute value of their block."""
    figure, (axis,) = _figure(
        alt=f"Histogram of {weights.size} scaled weights with the {len(levels)} NF4 levels as lines"
    )
    axis.hist(weights, bins=80, color=BLUE, density=True)
    for level in levels:
        axis.axvline(level, color=ORANGE, linewidth=1)
    axis.set(
        xlabel="weight / largest |weight| of its block",
        ylabel="density",
        title="NF4: 16 levels, dense where weights are",
    )
    return figure


def lora_shapes(name: str, d_out: int, d_in: int, rank: int, alpha: int) -> Figure:
    """One layer's frozen W beside its trainable B and A, to scale, with their sizes."""
    frozen, trainable = d_out * d_in, rank * (d_out + d_in)
    alt = (
        f"{name}, to scale: W is {d_out:,} × {d_in:,}, {frozen:,} frozen weights. Beside it, times {alpha / rank:g}, "
        f"B is {d_out:,} × {rank:,} and A is {rank:,} × {d_in:,}, together {trainable:,} trainable weights, "
        f"{trainable / frozen:.1%} of W."
    )
    gap = 0.5 * max(d_out, d_in)  # wide enough for the labels, also beside a tall W
    across, down = 2 * d_in + rank + 2 * gap, d_out + 0.4 * gap
    figure, (axis,) = _figure(width=8, height=1 + min(3.5, 7.8 * down / across), alt=alt)
    left = 0.0
    for part, rows, columns, color in (("W", d_out, d_in, GREY), ("B", d_out, rank, BLUE), ("A", rank, d_in, BLUE)):
        axis.add_patch(plt.Rectangle((left, 0), columns, rows, facecolor=color, edgecolor=color, label=part))
        axis.text(left + columns / 2, -0.1 * gap, f"{part}: {rows:,} × {columns:,}", ha="center", va="bottom")
        left += columns + gap
    axis.text(d_in + gap / 2, d_out / 2, f"+ {alpha / rank:g} ·", ha="center", va="center", fontsize=14)
    axis.set(xlim=(-0.02 * across, 1.02 * across), ylim=(d_out, -0.4 * gap), xticks=[], yticks=[], aspect="equal")
    axis.set_title(f"{name}: {frozen:,} frozen weights (grey), {trainable:,} trainable (blue)")
    axis.set_xlabel("to scale: rows downwards, columns across")
    axis.spines[:].set_visible(False)
    return figure


def training_curves(history: dict[str, list[dict]]) -> Figure:
    """Loss, accuracy, and rewards of chosen and rejected, by optimizer step; validation as dots."""
    train, evaluated = history["train"], history["eval"]
    last = train[-1]
    alt = (
        f"Training curves over {len(train)} steps: loss from {train[0]['loss']:.3f} to {last['loss']:.3f}, "
        f"margin to {last['rewards/margins']:.2f}"
    )
    figure, axes = _figure(width=11, columns=3, alt=alt)
    steps = [r["step"] for r in train]
    dots = [r["step"] for r in evaluated]

    def draw(axis, key, color, label):
        axis.plot(steps, [r[key] for r in train], color=color, alpha=0.85, label=f"{label} (train)")
        if evaluated:
            axis.plot(
                dots, [r[f"eval_{key}"] for r in evaluated], "o--", color=color, mec="white", label=f"{label} (val)"
            )

    draw(axes[0], "loss", BLUE, "loss")
    axes[0].axhline(math.log(2), color=GREY, linestyle=":", label="ln 2: no preference")
    draw(axes[1], "rewards/accuracies", BLUE, "accuracy")
    axes[1].axhline(0.5, color=GREY, linestyle=":")
    draw(axes[2], "rewards/chosen", GREEN, "chosen")
    draw(axes[2], "rewards/rejected", ORANGE, "rejected")
    for axis, title in zip(axes, ("Loss (nats)", "Accuracy (ties count as wrong)", "Implicit reward"), strict=True):
        axis.set(xlabel="optimizer step", title=title)
        axis.legend(fontsize=8)
    return figure


def margins(records: Sequence[dict]) -> Figure:
    """Histogram of held-out margins; before training every margin is 0."""
    values = [r["margin"] for r in records]
    right = sum(v > 0 for v in values)
    figure, (axis,) = _figure(
        alt=f"Margins of {len(values)} held-out pairs after training; {right} above 0, mean {np.mean(values):.2f}"
    )
    width = (max(values) - min(values)) / 24 or 1.0
    first = np.floor(min(values) / width)
    edges = width * np.arange(first, max(np.ceil(max(values) / width), first + 1) + 1)  # 0 is one of them
    axis.hist(values, bins=edges, color=BLUE)
    axis.axvline(0, color=ORANGE, linewidth=2, label="before training: all 0")
    axis.set(xlabel="margin = reward(chosen) − reward(rejected)", ylabel="pairs", title="Held-out margins")
    axis.legend()
    return figure


def rates(
    before: dict[str, dict], after: dict[str, dict], title: str = "Share of answers that keep each rule"
) -> Figure:
    """Rates with 95% intervals, before (grey) and after (blue)."""
    names = list(before)
    said = "; ".join(f"{n} {before[n]['rate']:.2f} to {after[n]['rate']:.2f}" for n in names)
    figure, (axis,) = _figure(height=1.0 + 0.45 * len(names), alt=f"{title}: {said}")
    for shift, color, label, values in ((-0.13, GREY, "base", before), (0.13, BLUE, "after DPO", after)):
        middle = np.array([values[n]["rate"] for n in names])
        error = np.array([[values[n]["rate"] - values[n]["low"], values[n]["high"] - values[n]["rate"]] for n in names])
        axis.errorbar(
            middle,
            np.arange(len(names)) + shift,
            xerr=np.maximum(error.T, 0),
            fmt="o",
            color=color,
            label=label,
            capsize=3,
        )
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlim=(-0.02, 1.02), xlabel="share, 95% interval", title=title)
    axis.legend()
    return figure


def loss_curve(beta: float, margins: Sequence[float] = ()) -> Figure:
    """The DPO loss and its gradient weight σ(−margin) over the margin; dots for the margins of real pairs."""
    x = torch.linspace(min([-6, *margins]), max([6, *margins]), 200, dtype=torch.float64)
    dots = f" Dots: {len(margins)} pairs, margins {min(margins):.2f} to {max(margins):.2f}." if len(margins) else ""
    figure, (axis,) = _figure(
        alt="The loss falls from 6 to 0 as the margin grows; it is ln 2 at 0. The gradient weight falls from 1 to 0."
        + dots
    )
    axis.plot(x, -torch.nn.functional.logsigmoid(x), color=BLUE, label="loss = −log σ(margin)")
    axis.plot(x, dpo.gradient_weight(x), color=ORANGE, label="gradient weight = σ(−margin)")
    axis.plot([0], [math.log(2)], "o", color=BLUE)
    axis.annotate("step 0: ln 2", (0, math.log(2)), xytext=(0.6, 1.6), arrowprops={"arrowstyle": "->", "color": GREY})
    if len(margins):
        weights = dpo.gradient_weight(torch.as_tensor(margins, dtype=torch.float64))
        axis.plot(margins, weights, "o", color=ORANGE, mec="black", label="pairs of this batch")
    axis.set(xlabel=f"margin (rewards, β = {beta:g})", title="What one pair contributes")
    axis.legend()
    return figure


def distance_by_beta(
    line: Sequence[float], exact: Sequence[float], betas: Sequence[float], trained: Sequence[float]
) -> Figure:
    """KL from the reference over beta: of the objective's known optimum (line) and of what the loss reached (dots)."""
    pairs = "; ".join(f"beta {b:g}: {t:.3f} nats" for b, t in zip(betas, trained, strict=True))
    figure, (axis,) = _figure(alt=f"KL from the reference over beta, trained with the DPO loss: {pairs}")
    axis.plot(line, exact, color=BLUE, label="optimum of the objective (eq. 4)")
    axis.plot(betas, trained, "o", color=ORANGE, label="trained with the DPO loss")
    axis.set(xscale="log", xlabel="β", ylabel="KL (nats)", title="A higher β stays closer to the reference")
    axis.legend()
    return figure


def by_length_gap(parts: Sequence[dict], overall: dict) -> Figure:
    """Accuracy with 95% intervals in parts of the pairs, from "chosen shorter" to "chosen longer"."""
    names = [f"{p['shortest']:+d} to {p['longest']:+d}" for p in parts]
    said = "; ".join(f"{name} tokens: {p['accuracy']['rate']:.2f}" for name, p in zip(names, parts, strict=True))
    figure, (axis,) = _figure(alt=f"Accuracy by length gap. {said}")
    _points(axis, range(len(parts)), [p["accuracy"] for p in parts], BLUE, "accuracy, 95% interval")
    axis.axhline(overall["rate"], color=GREY, linestyle=":", label="all pairs")
    axis.axhline(0.5, color=ORANGE, linewidth=1, label="chance")
    axis.set_xticks(range(len(parts)), names)
    axis.set(
        ylim=(-0.02, 1.05), xlabel="tokens of chosen minus tokens of rejected", ylabel="share right",
        title="Accuracy by length gap",
    )  # fmt: skip
    axis.legend()
    return figure


def calibration(found: dict) -> Figure:
    """Accuracy over confidence σ(|margin|), in equal parts of the pairs, with 95% intervals."""
    confidence = [b["confidence"] for b in found["bins"]]
    said = "; ".join(f"{c:.2f} said, {b['accuracy']['rate']:.2f} right" for c, b in zip(confidence, found["bins"]))  # noqa: B905
    figure, (axis,) = _figure(alt=f"Calibration of the margin. {said}")
    _points(axis, confidence, [b["accuracy"] for b in found["bins"]], BLUE, "held-out pairs, 95% interval")
    axis.plot([0.5, 1], [0.5, 1], color=GREY, linestyle=":", label="right as often as it says")
    axis.set(xlim=(0.48, 1.02), ylim=(-0.02, 1.05), xlabel="confidence σ(|margin|)", ylabel="share right")
    axis.set_title("Is it right as often as it says?")
    axis.legend(loc="lower left")
    return figure


def _points(axis, x, rates: Sequence[dict], color: str, label: str) -> None:
    middle = np.array([r["rate"] for r in rates])
    error = np.array([[r["rate"] - r["low"], r["high"] - r["rate"]] for r in rates]).T
    axis.errorbar(list(x), middle, yerr=np.maximum(error, 0), fmt="o", color=color, capsize=3, label=label)


def by_position(found: dict[str, list[dict]]) -> Figure:
    """Reward earned in each tenth of an answer, chosen (green) and rejected (orange), with 95% intervals."""
    totals = {side: sum(part["mean"] for part in found[side]) for side in found}
    first = {side: found[side][0]["mean"] for side in found}
    figure, (axis,) = _figure(
        alt="Reward by position in the answer. "
        + "; ".join(f"{side}: {first[side]:+.2f} in the first tenth, {totals[side]:+.2f} in all" for side in found)
    )
    for side, color, shift in (("chosen", GREEN, -0.12), ("rejected", ORANGE, 0.12)):
        middle = np.array([part["mean"] for part in found[side]])
        error = [[part["mean"] - part["low"], part["high"] - part["mean"]] for part in found[side]]
        places = np.arange(1, len(middle) + 1) + shift
        axis.errorbar(places, middle, yerr=np.nan_to_num(error).T, fmt="o", color=color, capsize=3, label=side)
    axis.axhline(0, color=GREY, linewidth=1)
    axis.set(xlabel="tenth of the answer", ylabel="reward", title="Where in an answer the reward lies")
    axis.set_xticks(range(1, len(found["chosen"]) + 1))
    axis.legend()
    return figure


def heat_map_figure(shown: dict, columns: int = 92) -> Figure:
    """The heat map as a figure, for slides and papers: both answers, one scale, the reward in each title."""
    largest = _largest(shown)
    laid = {side: _lay_out(shown[side], columns) for side in ("chosen", "rejected")}
    heights = {side: 1 + max((line for *_, line in cells), default=0) for side, cells in laid.items()}
    figure, axes = _figure(
        width=0.079 * columns, height=1.3 + 0.24 * sum(heights.values()), rows=2, height_ratios=list(heights.values()),
        alt="Token heat map. "
        + " ".join(f"{_heat_title(shown, side)}. {_strongest(shown[side])}" for side in laid),
    )  # fmt: skip
    for axis, (side, cells) in zip(axes, laid.items(), strict=True):
        for text, reward, column, line in cells:
            color, strength = (BLUE if reward > 0 else ORANGE), 0.6 * abs(reward) / largest
            axis.add_patch(plt.Rectangle((column, line - 0.45), len(text), 0.9, color=color, alpha=strength, lw=0))
            axis.text(column, line, text, family="monospace", fontsize=9, va="center", parse_math=False)
        axis.set(xlim=(0, columns), ylim=(heights[side] - 0.4, -0.6), xticks=[], yticks=[])
        axis.set_title(_heat_title(shown, side), loc="left", fontsize=10)
        axis.spines[:].set_visible(False)
    axes[0].set_xlabel(" ")
    axes[1].set_xlabel(f"blue: likelier under the policy, orange: less likely; full colour at ±{largest:.2f}")
    return figure


def _lay_out(tokens: Sequence[tuple[str, float]], columns: int) -> list[tuple[str, float, int, int]]:
    """(text, reward, column, line) of each token, wrapped; a line break is shown and broken at."""
    cells, column, line = [], 0, 0
    for text, reward in tokens:
        written = text.replace("\n", "⏎")
        if column + len(written) > columns and column:
            column, line, written = 0, line + 1, written.lstrip(" ") or written
        cells.append((written, reward, column, line))
        column += len(written)
        if "\n" in text:
            column, line = 0, line + 1
    return cells


def dropped_rows(report: dict[str, dict]) -> Figure:
    """What became of every row, by split: kept beside dropped (left), and the dropped ones by reason (right).

    Args:
        report: `data.Prepared.report`.
    """
    reasons = list(dict.fromkeys(reason for found in report.values() for reason in found["dropped"]))
    rows, kept = ([found[what] for found in report.values()] for what in ("rows", "kept"))
    said = [
        f"{split}: {found['kept']:,} of {found['rows']:,} rows kept"
        + "".join(f", {n:,} {reason}" for reason, n in found["dropped"].items())
        for split, found in report.items()
    ]
    alt = f"Every row accounted for. {'; '.join(said)}."
    figure, (whole, parts) = _figure(width=10, height=1.5 + 0.36 * max(3, len(reasons)), columns=2, alt=alt)
    whole.barh(list(report), kept, color=BLUE, label="kept")
    dropped = whole.barh(list(report), np.subtract(rows, kept), left=kept, color=ORANGE, label="dropped")
    whole.bar_label(dropped, labels=[f"{k:,} of {n:,} kept" for k, n in zip(kept, rows, strict=True)], padding=3)
    whole.set(xlabel="rows", title="Kept and dropped", xlim=(0, 1.4 * max(rows)))
    whole.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
    total = np.zeros(len(reasons))
    for (split, found), color in zip(report.items(), (BLUE, GREEN, ORANGE), strict=False):  # train, val, test
        counts = [found["dropped"].get(reason, 0) for reason in reasons]
        last = parts.barh(reasons, counts, left=total, color=color, label=split)
        total = total + counts
    parts.set(xlabel="rows", title="Dropped, by reason" if reasons else "No row was dropped")
    if reasons:
        parts.bar_label(last, labels=[f"{n:,.0f}" for n in total], padding=3)
        parts.set_xlim(0, 1.15 * total.max())
        parts.xaxis.set_major_locator(MaxNLocator(integer=True))
        parts.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)
    else:
        parts.set(xticks=[], yticks=[])
    for axis in (whole, parts):
        axis.invert_yaxis()
    return figure


def memory_plan(planned, measured: float | None = None) -> Figure:
    """The predicted peak, stacked by term, beside the measured one.

    Args:
        planned: a `planner.Plan`.
        measured: bytes.
    """
    mib = {term: n / 2**20 for term, n in planned.terms.items()}
    alt = f"Predicted peak {sum(mib.values()):,.0f} MiB: " + ", ".join(f"{term} {n:,.0f}" for term, n in mib.items())
    if measured:
        alt += f". Measured: {measured / 2**20:,.0f} MiB"
    figure, (axis,) = _figure(width=9, height=2.6, alt=alt)
    left = 0.0
    for (term, n), color in zip(mib.items(), plt.cm.cividis(np.linspace(0, 1, len(mib))), strict=True):
        axis.barh("predicted", n, left=left, color=color, edgecolor="white", label=f"{term} {n:,.0f}")
        left += n
    if measured:
        axis.barh("measured", measured / 2**20, color=GREY)
    axis.invert_yaxis()
    axis.set(xlabel="MiB", title=f"Peak memory of training ({planned.peak})")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def picture(figure: Figure) -> Image:
    """The figure as a PNG with its alt text, shown at its size in inches times 96 pixels.

    It has two pixels for each of these, so that it is sharp on dense screens, and at most 256 colours, so that it takes
    less room in a notebook than one pixel in all colours would.
    """
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", facecolor="white", dpi=192)
    PIL.Image.open(drawn).convert("RGB").quantize().save(packed, format="PNG", optimize=True)
    shown = round(96 * figure.get_figwidth())
    return Image(packed.getvalue(), width=shown, metadata={"alt": alt_text(figure)})  # IPython 7.34 has no `alt=`
