"""Draw the embedded set's on-policy rejected answers anew from the base that is trained: `provenance.jsonl` says which.

python scripts/sample_rejected.py samples.jsonl --seed 11      # {"prompt_id", "text", "cut", "sample_seed"} a line

Temperature 0.8, top-p 0.95, at most 96 tokens, in batches of 24 in the order of `provenance.jsonl`; the first batch has
the seed given, each further one the next. Rounding differs between processors, and a sample with it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dpo_tutorial import config
from dpo_tutorial.comparing import generation
from dpo_tutorial.loading import models
from dpo_tutorial.pairs import sources

LIMIT, BATCH = 96, 24


def asked() -> dict[str, list[dict]]:
    """prompt_id → conversation, of all rows whose rejected answer is the base's."""
    rows = [row for split in sources.EMBEDDED_SPLITS for row in sources.embedded_rows(split)]
    conversations = {row["prompt_id"]: row["rejected"][:-1] for row in rows}
    noted = sources.embedded_rows("provenance")
    of_base = [row["prompt_id"] for row in noted if row["rejected_source"] == "base sample"]
    return {prompt_id: conversations[prompt_id] for prompt_id in of_base}


def main(target: Path, seed: int) -> None:
    cfg = config.resolve(profile="cpu")
    tokenizer, model = models.load_tokenizer(cfg), models.load_base(cfg)
    rows, found = list(asked().items()), []
    for start in range(0, len(rows), BATCH):
        batch, drawn_with = rows[start : start + BATCH], seed + start // BATCH
        prompts = [conversation for _, conversation in batch]
        drawn = generation.generate(cfg, model, tokenizer, prompts, LIMIT, drawn_with, temperature=0.8, top_p=0.95)
        for (prompt_id, _), answer in zip(batch, drawn, strict=True):
            cut = not answer["finished"]
            found.append({"prompt_id": prompt_id, "text": answer["text"], "cut": cut, "sample_seed": drawn_with})
    target.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    given = parser.parse_args()
    main(given.target, given.seed)
