"""What a row may look like. A stand-in: UltraFeedback-binarized only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCORES = (("score_chosen", "score_rejected"),)
COLUMNS = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")


class NotAPair(Exception):
    """A row that holds no pair: `reason` is one of `row_checks.REASONS`, `detail` says it in one sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


def columns(text: str) -> dict[str, str]:
    """`DATA_COLUMNS` as a dict: our name to the source's."""
    return dict(part.strip().split("=", 1) for part in text.split(",") if part.strip())


def to_pair(row: Any, columns: Mapping[str, str] = {}) -> tuple[dict, str]:  # noqa: B006
    """A row as every split holds it, and the name of its shape."""
    if not isinstance(row, dict):
        raise NotAPair("wrong type", "The row is no object.")
    row = row | {ours: row.get(theirs) for ours, theirs in columns.items()}
    missing = [c for c in COLUMNS if row.get(c) is None]
    if missing:
        raise NotAPair("missing column", f"It has no {', '.join(missing)}.")
    try:
        pair = {
            "prompt_id": str(row.get("prompt_id") or ""),
            "prompt": row["prompt"],
            **{
                side: [{"role": m["role"], "content": m["content"]} for m in row[side]]
                for side in ("chosen", "rejected")
            },
            **{score: float(row[score]) for score in COLUMNS[3:] if not isinstance(row[score], (bool, str))},
        }
    except (TypeError, KeyError, ValueError, OverflowError):
        raise NotAPair("wrong type", "A side is no list of messages, or a score no number.") from None
    texts = [pair["prompt"], *(text for side in ("chosen", "rejected") for m in pair[side] for text in m.values())]
    if len(pair) < 6 or isinstance(row["chosen"], dict) or not all(isinstance(text, str) for text in texts):
        raise NotAPair("wrong type", "A text is no text, or a score no number.")
    return pair, "UltraFeedback binarized"


def describe(row: object) -> str:
    """What was found in a row, column by column, and the shortest change that would do."""
    found = ", ".join(f"{k} ({type(v).__name__})" for k, v in row.items()) if isinstance(row, dict) else repr(row)[:80]
    return f"The first row has {found}; needed are {', '.join(COLUMNS)}."
