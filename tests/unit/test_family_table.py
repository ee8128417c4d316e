"""The table of docs/models.md, made again: a tiny random model of each family through the whole pipeline."""

import dataclasses
import importlib.metadata
import json
import re
from pathlib import Path

import pytest
from conftest import TEXTS, pair, tiny_config
from test_families import tiny

from dpo_tutorial import run_folder
from dpo_tutorial.adapter import lora
from dpo_tutorial.comparing import stats
from dpo_tutorial.errors import ModelUnsuitableError
from dpo_tutorial.loading import models
from dpo_tutorial.pairs import store
from dpo_tutorial.training import memory_plan, scoring, train

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
HEAD = ("family", "adapter on", "prompt once", "memory plan")
FAMILIES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma", "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)", "phi": "Phi", "phi3": "Phi-3", "gpt2": "GPT-2", "gpt_neox": "GPT-NeoX",
    "falcon": "Falcon", "olmo2": "OLMo 2", "olmoe": "OLMoE", "mixtral": "Mixtral", "qwen3_moe": "Qwen3-MoE",
    "stablelm": "StableLM", "granite": "Granite", "cohere": "Cohere", "smollm3": "SmolLM3",
}  # fmt: skip
PINNED = f"transformers=={importlib.metadata.version('transformers')}\n" in (ROOT / "requirements.txt").read_text()


def row_of(cells) -> str:
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_prepared_trained_saved_loaded_and_compared(kind, tokenizer, tmp_path):
    tiny(kind, tokenizer).save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    rows = [pair(f"{ask} {n}", good, bad) for n in range(4) for ask, good, bad in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = dataclasses.replace(tiny_config(tmp_path / kind, tmp_path), data=str(tmp_path / "rows.jsonl"))
    run, loaded = run_folder.Run(cfg), models.load_tokenizer(cfg)
    splits, base = store.ensure_data(run, loaded).splits, models.load_base(cfg)
    names = lora.target_modules(cfg, base)
    trainer = train.train(cfg, run, base, loaded, splits["train"], splits["val"])
    before = scoring.score_pairs(cfg, trainer.model, loaded, splits["test"])
    after = scoring.score_pairs(cfg, lora.load_policy(cfg, run.adapter), loaded, splits["test"])
    assert [r["margin"] for r in after] == pytest.approx([r["margin"] for r in before], abs=1e-3)
    assert any(r["margin"] for r in after) and stats.summarise(after)["accuracy"]["n"] == len(splits["test"])
    try:
        planned = memory_plan.plan(cfg).total > 0
    except ModelUnsuitableError:
        planned = False
    yes = {True: "yes", False: "no"}
    made = row_of([FAMILIES[kind], ", ".join(names), yes[trainer.shares_prefixes], yes[planned]])
    assert made in PAGE.splitlines() or not PINNED, f"docs/models.md lacks this row:\n{made}"


def test_the_page_has_these_families_and_no_other():
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if re.match(r"\| [A-Z]", line)
    ]
    assert [row[0] for row in rows] == list(FAMILIES.values()) and row_of(HEAD) in PAGE.splitlines()
