"""Tokens in colour: the completion mask, and each token's share of the implicit reward."""

import html
import re
from collections.abc import Sequence

import matplotlib.pyplot as plt
from IPython.display import HTML
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from . import figures, tables


def tokens(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> HTML:
    """The tokens of prompt (grey) and answer (blue, underlined): what the completion mask tells apart."""

    def spans(ids, kind):
        parts = (html.escape(_upright(tokenizer.decode([i]))).replace("\n", "⏎\n") for i in ids)
        return "".join(
            f"<span class='dpo-{kind}' title='{kind} token {i}'>{p}</span>" for i, p in zip(ids, parts, strict=True)
        )

    legend = (
        "<p><span class='dpo-prompt'>prompt: mask 0</span> <span class='dpo-answer'>answer: mask 1</span> "
        f"({len(prompt_ids)} + {len(answer_ids)} tokens)</p>"
    )
    text = spans(prompt_ids, "prompt") + spans(answer_ids, "answer")
    return HTML(f"{tables._STYLE}<div class='dpo-tokens tex2jax_ignore mathjax_ignore'>{legend}<p>{text}</p></div>")


def _upright(text: str) -> str:
    """Text whose changes of direction are written as signs: as they are, they would turn round what follows."""
    return re.sub("[\u202a-\u202e\u2066-\u2069]", lambda found: f"[U+{ord(found[0]):X}]", text)


def heat_map(shown: dict) -> HTML:
    """Where in a sentence the preference lives: beta times the log-ratio of each token, policy against reference.

    Blue tokens (solid scale) became likelier, orange ones (underlined with dots) less likely; both answers share one
    scale. The values of an answer add up to its reward. `shown` is as `scoring.token_rewards` makes it; its answers may
    have other names than "chosen" and "rejected".
    """
    largest = _largest(shown)
    parts = [f"<p class='dpo-tokens'>{_shaded('less likely', -largest, largest)} · 0 · "
             f"{_shaded('more likely', largest, largest)} (full colour: ±{largest:.2f})</p>"]  # fmt: skip
    for side in _sides(shown):
        tokens = [(_upright(text), reward) for text, reward in shown[side]]
        title = _heat_title(shown, side)
        rows = tables.html_table([{"token": text, "reward": f"{reward:+.3f}"} for text, reward in tokens])
        parts.append(
            f"<div role='group' aria-label='{html.escape(title)}'><p>{html.escape(title)}</p>"
            f"<p class='dpo-hidden'>{html.escape(_strongest(tokens))}</p>"
            f"<p class='dpo-tokens'>{''.join(_shaded(text, reward, largest) for text, reward in tokens)}</p>"
            f"<details><summary>{side}: token by token</summary>{rows}</details></div>"
        )
    return HTML(f"{tables._STYLE}<div class='tex2jax_ignore mathjax_ignore'>{''.join(parts)}</div>")


def _sides(shown: dict) -> list[str]:
    return [name.removeprefix("reward_") for name in shown if name.startswith("reward_")]


def _largest(shown: dict) -> float:
    return max((abs(reward) for side in _sides(shown) for _, reward in shown[side]), default=0.0) or 1.0


def _heat_title(shown: dict, side: str) -> str:
    return f"{side}: reward {shown[f'reward_{side}']:+.2f} over {len(shown[side])} tokens"


def _strongest(tokens: Sequence[tuple[str, float]], n: int = 3) -> str:
    ordered = sorted(tokens, key=lambda token: token[1])
    down = [f"“{text.strip()}” {reward:+.2f}" for text, reward in ordered[:n] if reward < 0]
    up = [f"“{text.strip()}” {reward:+.2f}" for text, reward in ordered[: -n - 1 : -1] if reward > 0]
    return f"Up most: {', '.join(up) or 'none'}. Down most: {', '.join(down) or 'none'}."


def _shaded(text: str, reward: float, largest: float) -> str:
    red, green, blue = (
        int(color[i : i + 2], 16) for color in (figures.BLUE if reward > 0 else figures.ORANGE,) for i in (1, 3, 5)
    )
    strength = 0.6 * abs(reward) / largest  # translucent: the page's own text colour stays readable, light or dark
    kind = " class='dpo-down'" if reward < -0.15 * largest else ""
    written = html.escape(text).replace("\n", "⏎\n")
    return (
        f"<span{kind} title='{reward:+.3f}' style='background: rgba({red}, {green}, {blue}, {strength:.2f})'>"
        f"{written}</span>"
    )


def heat_map_figure(shown: dict, columns: int = 92) -> Figure:
    """The heat map as a figure, for slides and papers: both answers, one scale, the reward in each title."""
    largest = _largest(shown)
    sides = {side: [(_upright(text), reward) for text, reward in shown[side]] for side in ("chosen", "rejected")}
    laid = {side: _lay_out(tokens, columns) for side, tokens in sides.items()}
    heights = {side: 1 + max((line for *_, line in cells), default=0) for side, cells in laid.items()}
    figure, axes = figures.new_figure(
        width=0.079 * columns, height=1.3 + 0.24 * sum(heights.values()), rows=2, height_ratios=list(heights.values()),
        alt="Token heat map. "
        + " ".join(f"{_heat_title(shown, side)}. {_strongest(tokens)}" for side, tokens in sides.items()),
    )  # fmt: skip
    for axis, (side, cells) in zip(axes, laid.items(), strict=True):
        for text, reward, column, line in cells:
            color, strength = (figures.BLUE if reward > 0 else figures.ORANGE), 0.6 * abs(reward) / largest
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
