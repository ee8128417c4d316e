"""Draw the embedded set's on-policy rejected answers anew from the base that is trained: `provenance.jsonl` says which.

python scripts/sample_rejected.py samples.jsonl --seed 11      # {"prompt_id", "text", "cut", "sample_seed"} a line

Temperature 0.8, top-p 0.95, at most 96 tokens, in batches of 24 in the order of `provenance.jsonl`; the first batch has
the seed given, each further one the next. Rounding differs between processors, and a sample with it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from dpo_tutorial import config
from dpo_tutorial.loading import models
from dpo_tutorial.pairs import sources
from dpo_tutorial.training import scoring

LIMIT, BATCH = 96, 24


def asked() -> dict[str, list[dict]]:
    """prompt_id → conversation, of all rows whose rejected answer is the base's."""
    rows = [
        json.loads(line)
        for split in sources.EMBEDDED_SPLITS
        for line in sources.embedded_file(split).read_text("utf-8").splitlines()
    ]
    conversations = {row["prompt_id"]: row["rejected"][:-1] for row in rows}
    noted = sources.embedded_file("provenance").read_text("utf-8").splitlines()
    of_base = [row["prompt_id"] for row in map(json.loads, noted) if row["rejected_source"] == "base sample"]
    return {prompt_id: conversations[prompt_id] for prompt_id in of_base}


@torch.no_grad()
def main(target: Path, seed: int) -> None:
    cfg = config.resolve(profile="cpu")
    tokenizer, model = models.load_tokenizer(cfg), models.load_base(cfg).eval()
    tokenizer.padding_side = "left"
    rows, found = list(asked().items()), []
    for start in range(0, len(rows), BATCH):
        batch, drawn_with = rows[start : start + BATCH], seed + start // BATCH
        texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for _, c in batch]
        ids = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        torch.manual_seed(drawn_with)
        with scoring.autocast(cfg):
            out = model.generate(
                **ids, do_sample=True, temperature=0.8, top_p=0.95, top_k=0, repetition_penalty=1.0, use_cache=True,
                max_new_tokens=LIMIT, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        for (prompt_id, _), answer in zip(batch, out[:, ids["input_ids"].shape[1] :], strict=True):
            text = tokenizer.decode(answer, skip_special_tokens=True).strip()
            cut = tokenizer.eos_token_id not in answer.tolist()
            found.append({"prompt_id": prompt_id, "text": text, "cut": cut, "sample_seed": drawn_with})
    target.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    given = parser.parse_args()
    main(given.target, given.seed)
