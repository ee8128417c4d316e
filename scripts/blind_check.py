"""Blind check of the embedded preference set: does a reader who does not know the label find the chosen answer?

python scripts/blind_check.py sheet --seed 7 > sheet.md         # 60 random pairs, answers in random order
python scripts/blind_check.py score votes.txt --seed 7          # one A or B a line -> ballots, and the agreement
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from pathlib import Path

from dpo_tutorial.comparing import stats
from dpo_tutorial.pairs import sources

PAIRS = 60


def drawn(seed: int) -> list[tuple[dict, bool]]:
    """60 pairs of all splits, and whether the chosen answer is shown first."""
    rows = [row for split in sources.EMBEDDED_SPLITS for row in sources.embedded_rows(split)]
    order = random.Random(seed)
    return [(row, order.random() < 0.5) for row in order.sample(rows, PAIRS)]


def digest(row: dict) -> str:
    """Ties a ballot to the two answers that were judged: an edited answer needs a new vote."""
    return hashlib.sha256(json.dumps([row["chosen"], row["rejected"]]).encode()).hexdigest()[:16]


def sheet(seed: int) -> str:
    card = (sources.embedded_file("README").with_suffix(".md")).read_text("utf-8")
    guide = card[card.index("1. answer first") : card.index("The chosen answer keeps")]
    parts = [
        "The style guide:\n",
        guide,
        "Which answer is better for the person who asked? Write A or B, one line a pair.\n",
    ]
    for number, (row, chosen_first) in enumerate(drawn(seed), 1):
        sides = ("chosen", "rejected") if chosen_first else ("rejected", "chosen")
        a, b = (row[side][-1]["content"] for side in sides)
        asked = "\n".join(f"{m['role']}: {m['content']}" for m in row["chosen"][:-1])
        parts.append(f"## {number}\n\n<<<\n{asked}\n>>>\n\nA:\n<<<\n{a}\n>>>\n\nB:\n<<<\n{b}\n>>>\n")
    return "\n".join(parts)


def score(seed: int, votes: list[str]) -> dict:
    pairs = drawn(seed)
    if len(votes) != len(pairs):
        raise SystemExit(f"{len(votes)} lines; give {len(pairs)}, one a pair.")
    ballots = [
        {"prompt_id": row["prompt_id"], "texts": digest(row), "chosen_shown_as": "A" if first else "B", "vote": vote}
        for (row, first), vote in zip(pairs, votes, strict=True)
        if vote in ("A", "B")  # any other line is no vote
    ]
    print(f"{len(votes) - len(ballots)} lines are no vote")
    agreed = sum(b["vote"] == b["chosen_shown_as"] for b in ballots)
    return {"seed": seed, "agreement": stats.rate(agreed, len(ballots)), "ballots": ballots}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sheet", "score"])
    parser.add_argument("votes", nargs="?")
    parser.add_argument("--seed", type=int, required=True)
    given = parser.parse_args()
    if given.what == "sheet":
        print(sheet(given.seed))
    else:
        votes = [line.strip() for line in Path(given.votes).read_text("utf-8").splitlines()]
        print(json.dumps(score(given.seed, votes), indent=1))
