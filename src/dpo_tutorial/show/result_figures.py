"""Figures of training and of held-out pairs."""

import json
import math
from collections.abc import Sequence
from importlib import resources

import numpy as np
import torch
from matplotlib.figure import Figure

from . import figures


def training_curves(history: dict[str, list[dict]]) -> Figure:
    """Loss, accuracy, and rewards of chosen and rejected, by optimizer step; validation as dots."""
    train = history["train"]
    last = train[-1]
    alt = (
        f"Training curves over {last['step']} steps: loss from {train[0]['loss']:.3f} to {last['loss']:.3f}, "
        f"margin to {last['rewards/margins']:.2f}"
    )
    figure, axes = figures.new_figure(width=6, height=8, rows=3, alt=alt, sharex=True)
    _curve(axes[0], history, "loss", figures.BLUE, "loss")
    axes[0].axhline(train[0]["loss"], color=figures.GREY, linestyle=":", label="before the first update")
    _curve(axes[1], history, "rewards/accuracies", figures.BLUE, "accuracy")
    axes[1].axhline(0.5, color=figures.GREY, linestyle=":")
    _curve(axes[2], history, "rewards/chosen", figures.GREEN, "chosen")
    _curve(axes[2], history, "rewards/rejected", figures.ORANGE, "rejected")
    for axis, title in zip(axes, ("Loss (nats)", "Accuracy (ties count as wrong)", "Implicit reward"), strict=True):
        axis.set(title=title)
        axis.legend(fontsize=9)
    axes[2].set(xlabel="optimizer step")
    return figure


def reward_curves() -> Figure:
    """Rewards of chosen and rejected answers by optimizer step, of the run whose outputs the notebooks keep."""
    history = json.loads((resources.files("dpo_tutorial.show") / "stored_run.json").read_text(encoding="utf-8"))
    last, end = history["train"][-1], history["eval"][-1]
    said = " and ".join(f"{side} {end[f'eval_rewards/{side}']:.2f}" for side in ("chosen", "rejected"))
    alt = f"Implicit rewards over {last['step']} steps, from 0; on validation pairs at the end: {said}"
    figure, (axis,) = figures.new_figure(width=6, height=3.4, alt=alt)
    _curve(axis, history, "rewards/chosen", figures.GREEN, "chosen")
    _curve(axis, history, "rewards/rejected", figures.ORANGE, "rejected")
    axis.set(xlabel="optimizer step", title="Implicit reward")
    axis.legend(fontsize=9)
    return figure


def _curve(axis, history: dict[str, list[dict]], key: str, color: str, label: str) -> None:
    """One value of the log: training as a line, validation as dots."""
    train, evaluated = history["train"], history["eval"]
    axis.plot([r["step"] for r in train], [r[key] for r in train], color=color, alpha=0.85, label=f"{label} (train)")
    if evaluated:
        steps, values = [r["step"] for r in evaluated], [r[f"eval_{key}"] for r in evaluated]
        axis.plot(steps, values, "o--", color=color, mec="white", label=f"{label} (val)")


def margins(records: Sequence[dict]) -> Figure:
    """Histogram of held-out margins; before training every margin is 0."""
    values = [r["margin"] for r in records]
    right = sum(v > 0 for v in values)
    figure, (axis,) = figures.new_figure(
        alt=f"Margins of {len(values)} held-out pairs after training; {right} above 0, mean {np.mean(values):.2f}"
    )
    width = (max(values) - min(values)) / 24 or 1.0
    first = np.floor(min(values) / width)
    edges = width * np.arange(first, max(np.ceil(max(values) / width), first + 1) + 1)  # 0 is one of them
    axis.hist(values, bins=edges, color=figures.BLUE)
    axis.axvline(0, color=figures.ORANGE, linewidth=2, label="before training: all 0")
    axis.set(xlabel="margin = reward(chosen) − reward(rejected)", ylabel="pairs", title="Held-out margins")
    axis.legend()
    return figure


def rates(before: dict[str, dict], after: dict[str, dict]) -> Figure:
    """Rates with 95% intervals, before (grey) and after (blue)."""
    names, title = list(before), "Share of answers that keep each rule"
    said = "; ".join(f"{n} {before[n]['rate']:.2f} to {after[n]['rate']:.2f}" for n in names)
    figure, (axis,) = figures.new_figure(height=1.0 + 0.45 * len(names), alt=f"{title}: {said}")
    for shift, color, label, found in ((-0.13, figures.GREY, "base", before), (0.13, figures.BLUE, "after DPO", after)):
        places = np.arange(len(names)) + shift
        points(axis, places, [found[name] for name in names], color, label, across=True)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlim=(-0.02, 1.02), xlabel="share, 95% interval", title=title)
    axis.legend()
    return figure


def loss_curve(beta: float) -> Figure:
    """The DPO loss and its gradient weight σ(−margin) over the margin."""
    x = torch.linspace(-6, 6, 200, dtype=torch.float64)
    figure, (axis,) = figures.new_figure(
        alt="The loss falls from 6 to 0 as the margin grows; it is ln 2 at 0. The gradient weight falls from 1 to 0."
    )
    axis.plot(x, -torch.nn.functional.logsigmoid(x), color=figures.BLUE, label="loss = −log σ(margin)")
    axis.plot(x, torch.sigmoid(-x), color=figures.ORANGE, label="gradient weight = σ(−margin)")
    axis.plot([0], [math.log(2)], "o", color=figures.BLUE)
    arrow = {"arrowstyle": "->", "color": figures.GREY}
    axis.annotate("step 0: ln 2", (0, math.log(2)), xytext=(0.6, 1.6), arrowprops=arrow)
    axis.set(xlabel=f"margin (rewards, β = {beta:g})", title="What one pair contributes")
    axis.legend()
    return figure


def distance_by_beta(
    line: Sequence[float], exact: Sequence[float], betas: Sequence[float], trained: Sequence[float]
) -> Figure:
    """KL from the reference over beta: of the objective's known optimum (line) and of what the loss reached (dots)."""
    pairs = "; ".join(f"beta {b:g}: {t:.3f} nats" for b, t in zip(betas, trained, strict=True))
    figure, (axis,) = figures.new_figure(alt=f"KL from the reference over beta, trained with the DPO loss: {pairs}")
    axis.plot(line, exact, color=figures.BLUE, label="optimum of the objective (eq. 4)")
    axis.plot(betas, trained, "o", color=figures.ORANGE, label="trained with the DPO loss")
    axis.set(xscale="log", xlabel="β", ylabel="KL (nats)", title="A higher β stays closer to the reference")
    axis.legend()
    return figure


#: One for each loss that is compared: Okabe and Ito's, without their yellow.
_EIGHT = (figures.BLUE, figures.ORANGE, figures.GREEN, "#D55E00", "#CC79A7", "#56B4E9", figures.GREY, "black")


def other_losses(found: dict[str, list[dict]] | None = None) -> Figure:
    """What each loss gained over how far it went from the base: means over seeds, and small each seed's end.

    Args:
        found: as `summary` of `benchmarks/methods.py`; default: its record, which comes with the package.
    """
    if found is None:
        found = json.loads((resources.files("dpo_tutorial.show") / "other_losses.json").read_text(encoding="utf-8"))
    gains = [name for name in next(iter(found.values()))[0] if name not in ("KL", "seeds")]
    ends = {name: points[-1] for name, points in found.items()}
    said = "; ".join(f"{n} {', '.join(f'{g} {e[g]:+.2f}' for g in gains)} at {e['KL']:.3f}" for n, e in ends.items())
    alt = f"What each loss gained over its KL from the base in nats per token, at its end: {said}"
    figure, axes = figures.new_figure(width=5, height=7, rows=len(gains), alt=alt, sharex=True)
    for axis, gain in zip(axes, gains, strict=True):
        for (name, points), color, marker in zip(found.items(), _EIGHT, "osD^vP*X", strict=False):
            line, seeds = [{"KL": 0, gain: 0}, *points], points[-1]["seeds"]
            how = dict(marker=marker, markevery=slice(1, None), label=name)
            axis.plot([p["KL"] for p in line], [p[gain] for p in line], color=color, **how)
            axis.plot([s["KL"] for s in seeds], [s[gain] for s in seeds], marker, color=color, markersize=4, alpha=0.4)
        axis.set(ylabel=f"{gain}, above the base")
    axes[0].set_title("Gained, over distance")
    axes[-1].set_xlabel("KL from the base, nats per token")
    axes[-1].legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    return figure


def by_length_gap(parts: Sequence[dict], overall: dict) -> Figure:
    """Accuracy with 95% intervals in parts of the pairs, from "chosen shorter" to "chosen longer"."""
    names = [f"{p['shortest']:+d} to {p['longest']:+d}" for p in parts]
    said = "; ".join(f"{name} tokens: {p['accuracy']['rate']:.2f}" for name, p in zip(names, parts, strict=True))
    figure, (axis,) = figures.new_figure(alt=f"Accuracy by length gap. {said}")
    points(axis, range(len(parts)), [p["accuracy"] for p in parts], figures.BLUE, "accuracy, 95% interval")
    axis.axhline(overall["rate"], color=figures.GREY, linestyle=":", label="all pairs")
    axis.axhline(0.5, color=figures.ORANGE, linewidth=1, label="chance")
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
    figure, (axis,) = figures.new_figure(alt=f"Calibration of the margin. {said}")
    points(axis, confidence, [b["accuracy"] for b in found["bins"]], figures.BLUE, "held-out pairs, 95% interval")
    axis.plot([0.5, 1], [0.5, 1], color=figures.GREY, linestyle=":", label="right as often as it says")
    axis.set(xlim=(0.48, 1.02), ylim=(-0.02, 1.05), xlabel="confidence σ(|margin|)", ylabel="share right")
    axis.set_title("Is it right as often as it says?")
    axis.legend(loc="lower left")
    return figure


def points(axis, places, found: Sequence[dict], color: str, label: str, across: bool = False) -> None:
    """Rates or means with their 95% intervals at these places, `across`: with the values along the x axis."""
    middle = np.array([f["rate"] if "rate" in f else f["mean"] for f in found])
    error = np.array([[m - f["low"], f["high"] - m] for m, f in zip(middle, found, strict=True)]).T
    error = np.nan_to_num(np.maximum(error, 0))
    where = dict(x=middle, y=places, xerr=error) if across else dict(x=places, y=middle, yerr=error)
    axis.errorbar(**where, fmt="o", color=color, capsize=3, label=label)


def by_position(found: dict[str, list[dict]]) -> Figure:
    """Reward earned in each tenth of an answer, chosen (green) and rejected (orange), with 95% intervals."""
    totals = {side: sum(part["mean"] for part in found[side]) for side in found}
    first = {side: found[side][0]["mean"] for side in found}
    figure, (axis,) = figures.new_figure(
        alt="Reward by position in the answer. "
        + "; ".join(f"{side}: {first[side]:+.2f} in the first tenth, {totals[side]:+.2f} in all" for side in found)
    )
    for side, color, shift in (("chosen", figures.GREEN, -0.12), ("rejected", figures.ORANGE, 0.12)):
        places = np.arange(1, len(found[side]) + 1) + shift
        points(axis, places, found[side], color, side)
    axis.axhline(0, color=figures.GREY, linewidth=1)
    axis.set(xlabel="tenth of the answer", ylabel="reward", title="Where in an answer the reward lies")
    axis.set_xticks(range(1, len(found["chosen"]) + 1))
    axis.legend()
    return figure
