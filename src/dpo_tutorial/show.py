"""Figures and HTML views. Everything a model or a dataset wrote is escaped before it becomes HTML."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import HTML, Image
from matplotlib.figure import Figure

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
</style>"""


def table(rows: Sequence[dict], caption: str = "") -> HTML:
    """An HTML table with one column per key of the first row; every cell is escaped text."""
    if not rows:
        return HTML("<p>(no rows)</p>")
    head = "".join(f"<th scope='col'>{html.escape(str(k))}</th>" for k in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(row.get(k, '')))}</td>" for k in rows[0]) + "</tr>" for row in rows
    )
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return HTML(
        f"{_STYLE}<table class='dpo tex2jax_ignore mathjax_ignore'>{title}"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def config_table(config) -> HTML:
    """Every hyper-parameter and data limit of a run, with unit and meaning."""
    return table(config.rows(), f"Profile {config.profile}")


def conversation(messages: Sequence[dict]) -> HTML:
    """One conversation, a row per turn."""
    return table([{"role": m["role"], "content": m["content"]} for m in messages])


def tokens(tokenizer, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> HTML:
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
    """Side by side: the last user message, the base's answer, the policy's answer. All of it escaped."""
    rows = [
        {"prompt": p[-1]["content"], rejected_label: _answer(b), chosen_label: _answer(a)}
        for p, b, a in zip(prompts, before, after, strict=True)
    ]
    return table(rows, "Same prompts, same greedy decoding")


def _answer(answer: dict) -> str:
    return answer["text"] + ("" if answer["finished"] else " […cut at the token limit]")


# --- figures ------------------------------------------------------------------------------------------------------


def _figure(width: float = 7.0, height: float = 3.2, columns: int = 1, alt: str = "") -> tuple[Figure, np.ndarray]:
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False, dpi=96)
    figure.set_label(alt)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    plt.close(figure)  # shown once, as the value of the cell
    return figure, axes[0]


def alt_text(figure: Figure) -> str:
    """What the figure shows, in words."""
    return figure.get_label()


def bars(values: dict[str, float], unit: str, title: str) -> Figure:
    """Horizontal bars with their values written out."""
    written = {k: f"{v:,.0f} {unit}" if abs(v) >= 100 else f"{v:.3g} {unit}" for k, v in values.items()}
    said = "; ".join(f"{k} {v}" for k, v in written.items())
    figure, (axis,) = _figure(height=0.8 + 0.42 * len(values), alt=f"{title}: {said}")
    shown = axis.barh(list(values), list(values.values()), color=BLUE)
    axis.bar_label(shown, labels=list(written.values()), padding=4)
    axis.invert_yaxis()
    axis.set(xlabel=unit, title=title, xlim=(0, 1.2 * max(values.values())))
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
    axis.hist(values, bins=24, color=BLUE)
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


def loss_curve(beta: float) -> Figure:
    """The DPO loss and its gradient weight σ(−margin) over the margin."""
    x = torch.linspace(-6, 6, 200, dtype=torch.float64)
    figure, (axis,) = _figure(
        alt="The loss falls from 6 to 0 as the margin grows; it is ln 2 at 0. The gradient weight falls from 1 to 0."
    )
    axis.plot(x, -torch.nn.functional.logsigmoid(x), color=BLUE, label="loss = −log σ(margin)")
    axis.plot(x, dpo.gradient_weight(x), color=ORANGE, label="gradient weight = σ(−margin)")
    axis.plot([0], [math.log(2)], "o", color=BLUE)
    axis.annotate("step 0: ln 2", (0, math.log(2)), xytext=(0.6, 1.6), arrowprops={"arrowstyle": "->", "color": GREY})
    axis.set(xlabel=f"margin (rewards, β = {beta:g})", title="What one pair contributes")
    axis.legend()
    return figure


def picture(figure: Figure) -> Image:
    """The figure as an image that carries its alt text into the notebook and every page made from it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return Image(buffer.getvalue(), alt=alt_text(figure))
