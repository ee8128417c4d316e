"""Figures of the model, the data and the plan, and how a figure is shown with its text."""

import io
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from IPython.display import Image
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours: told apart with any colour vision, and visible on light and dark pages.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#808080"


def new_figure(
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
    figure, (axis,) = new_figure(height=1.7, alt=f"Six notebooks in a row. {said}.")
    for place, (name, gives) in enumerate(PIPELINE):
        number, title = name.split(" ", 1)
        box = dict(boxstyle="round,pad=0.5", facecolor="white", edgecolor=BLUE, linewidth=1.5)
        axis.text(place, 0.62, f"{number}\n{title}", ha="center", va="center", fontsize=8, color="black", bbox=box)
        axis.text(place, 0.08, gives.replace(", ", ",\n", 1), ha="center", va="center", fontsize=7, color=GREY)
        if place:
            arrow = {"arrowstyle": "->", "color": ORANGE}
            axis.annotate("", (place - 0.40, 0.62), (place - 0.60, 0.62), arrowprops=arrow)
    axis.set(xlim=(-0.5, len(PIPELINE) - 0.5), ylim=(-0.1, 1.1), xticks=[], yticks=[])
    axis.set(xlabel="what each hands on to the next", title="Six notebooks, one pipeline")
    axis.spines[:].set_visible(False)
    return figure


def method() -> Figure:
    """DPO in one drawing: a pair, two models, two implicit rewards, one loss; only the policy gets its gradient."""
    figure, (axis,) = new_figure(
        width=5.2,
        height=4.6,
        alt="A pair of a chosen and a rejected answer goes to two models: the policy, which learns (adapter on), and "
        "the reference, which is frozen (adapter off). Both answers get an implicit reward, beta times the "
        "log-probability under the policy less that under the reference. Their difference is the margin; the loss is "
        "minus the log of its sigmoid. Its gradient goes back to the policy alone.",
    )
    boxes = (
        (0.5, 0.92, GREY, "one prompt, two answers\nchosen $y_w$, rejected $y_l$"),
        (0.22, 0.66, BLUE, "policy $\\pi$: learns\n(base, adapter on)"),
        (0.78, 0.66, GREY, "reference $\\pi_{ref}$: frozen\n(base, adapter off)"),
        (0.22, 0.36, BLUE, "reward of the chosen\n$\\beta\\,[\\log\\pi(y_w)-\\log\\pi_{ref}(y_w)]$"),
        (0.78, 0.36, ORANGE, "reward of the rejected\n$\\beta\\,[\\log\\pi(y_l)-\\log\\pi_{ref}(y_l)]$"),
        (0.5, 0.08, GREEN, "margin $m$: chosen less rejected\nloss: $-\\log\\,\\sigma(m)$"),
    )
    for start, end in ((0, 1), (0, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 5), (4, 5)):
        (x, y, *_), (to_x, to_y, *_) = boxes[start], boxes[end]
        axis.annotate("", (to_x, to_y + 0.06), (x, y - 0.05), arrowprops={"arrowstyle": "->", "color": GREY})
    for x, y, color, text in boxes:
        box = dict(boxstyle="round,pad=0.5", facecolor="white", edgecolor=color, linewidth=1.5)
        axis.text(x, y, text, ha="center", va="center", fontsize=9, color="black", bbox=box)
    back = {"arrowstyle": "->", "color": GREEN, "linestyle": "--", "connectionstyle": "arc3,rad=-0.9"}
    axis.annotate("", (0.04, 0.66), (0.23, 0.08), arrowprops=back)
    axis.text(-0.15, 0.62, "gradient", fontsize=8, color=GREEN, ha="center")
    axis.set(xlim=(-0.25, 1.05), ylim=(-0.02, 1.02), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    return figure


def bars(values: dict[str, float], unit: str, title: str) -> Figure:
    """Horizontal bars with their values written out."""
    written = {k: f"{v:,.0f} {unit}" if abs(v) >= 100 else f"{v:.3g} {unit}" for k, v in values.items()}
    said = "; ".join(f"{k} {v}" for k, v in written.items())
    figure, (axis,) = new_figure(height=0.8 + 0.42 * len(values), alt=f"{title}: {said}")
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
    figure, (axis,) = new_figure(alt=alt)
    axis.hist(values, bins=30, color=BLUE)
    axis.axvline(limit, color=ORANGE, linewidth=2, label=f"max_tokens = {limit}")
    axis.set(xlabel="tokens of prompt + longer answer", ylabel="pairs", title="Pair lengths")
    axis.legend()
    return figure


def ultrafeedback(counts: dict) -> Figure:
    """What UltraFeedback's pairs are like: how far apart scores lie, how long answers are (`ultrafeedback_counts`)."""
    rows, words, tied = counts["rows"], counts["words"], counts["tied"]
    medians = ", ".join(f"{side} {n:.0f}" for side, n in counts["median_words"].items())
    figure, (left, right) = new_figure(
        columns=2,
        alt=f"{rows} pairs of UltraFeedback. {tied} have equal scores, {counts['gaps'][0]} a gap below 1. "
        f"Median words: {medians}",
    )
    left.bar(-0.75, tied, width=0.45, color=ORANGE, label="no gap: a tie")
    left.bar(np.array(counts["gap_edges"][:-1]) + 0.5, counts["gaps"], width=0.9, color=BLUE)
    left.set(xlabel="score of chosen minus rejected, of 10", ylabel="pairs", title="How sure is the label?")
    left.legend()
    place = np.arange(len(words["chosen"]))
    for offset, (side, color) in zip((-0.2, 0.2), (("chosen", BLUE), ("rejected", ORANGE)), strict=True):
        right.bar(place + offset, words[side], width=0.4, color=color, label=side)
    right.set_xticks(place[::2], [f"{edge}+" for edge in counts["word_edges"][::2]])
    right.set(xlabel="words of the answer", title="How long are the answers?")
    right.legend()
    return figure


def nf4_levels(weights: np.ndarray, levels: np.ndarray) -> Figure:
    """The 16 NF4 levels over a histogram of weights scaled by the largest absolute value of their block."""
    figure, (axis,) = new_figure(
        alt=f"Histogram of {weights.size} scaled weights with the {len(levels)} NF4 levels as lines"
    )
    axis.hist(weights, bins=80, color=BLUE, density=True)
    for level in levels:
        axis.axvline(level, color=ORANGE, linewidth=1)
    axis.set(xlabel="weight / largest |weight| of its block", ylabel="density")
    axis.set_title("NF4: 16 levels, dense where weights are")
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
    figure, (axis,) = new_figure(width=8, height=1 + min(3.5, 7.8 * down / across), alt=alt)
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


def dropped_rows(report: dict[str, dict]) -> Figure:
    """What became of every row of `Prepared.report`, by split: kept beside dropped, and the dropped ones by reason."""
    reasons = list(dict.fromkeys(reason for found in report.values() for reason in found["dropped"]))
    rows, kept = ([found[what] for found in report.values()] for what in ("rows", "kept"))
    said = [
        f"{split}: {found['kept']:,} of {found['rows']:,} rows kept"
        + "".join(f", {n:,} {reason}" for reason, n in found["dropped"].items())
        for split, found in report.items()
    ]
    alt = f"Every row accounted for. {'; '.join(said)}."
    each = [0.6 + len(report), 0.6 + max(1, len(reasons))]
    figure, (whole, parts) = new_figure(width=6.4, height=2.4 + 0.36 * sum(each), rows=2, alt=alt, height_ratios=each)
    whole.barh(list(report), kept, color=BLUE, label="kept")
    dropped = whole.barh(list(report), np.subtract(rows, kept), left=kept, color=ORANGE, label="dropped")
    whole.bar_label(dropped, labels=[f"{k:,} of {n:,} kept" for k, n in zip(kept, rows, strict=True)], padding=3)
    whole.set_title("Rows", loc="left")
    whole.set_xlim(0, 1.4 * max(rows))
    above = dict(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    whole.legend(**above, ncols=2)
    total = np.zeros(len(reasons))
    for (split, found), color in zip(report.items(), (BLUE, GREEN, ORANGE), strict=False):  # train, val, test
        counts = [found["dropped"].get(reason, 0) for reason in reasons]
        last = parts.barh(reasons, counts, left=total, color=color, label=split)
        total = total + counts
    parts.set_title("Dropped, by reason" if reasons else "No row was dropped", loc="left")
    if reasons:
        parts.bar_label(last, labels=[f"{n:,.0f}" for n in total], padding=3)
        parts.set_xlim(0, 1.15 * total.max())
        parts.xaxis.set_major_locator(MaxNLocator(integer=True))
        parts.legend(**above, ncols=3)
    else:
        parts.set(xticks=[], yticks=[])
    for axis in (whole, parts):
        axis.invert_yaxis()
    return figure


def picture(figure: Figure) -> Image:
    """The figure as a PNG with its alt text, shown at its size in inches times 96 pixels.

    It has two pixels for each of these, so that it is sharp on dense screens, and at most 256 colours, so that it takes
    less room in a notebook than one pixel in all colours would.
    """
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", facecolor="white", dpi=192, pil_kwargs={"compress_level": 0})  # packed below
    PIL.Image.open(drawn).convert("RGB").quantize().save(packed, format="PNG", optimize=True)
    shown = round(96 * figure.get_figwidth())
    return Image(packed.getvalue(), width=shown, metadata={"alt": alt_text(figure)})  # IPython 7.34 has no `alt=`
