"""Save the adapter with its training record and model card, and read them again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from .. import run_folder
from ..errors import ArtifactError
from ..knobs import Config
from ..loading import models
from ..machine import hardware, memory, session
from . import checkpoints

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def read_training_record(adapter: Path) -> dict:
    """What training noted beside an adapter: `config`, `base`, `history`, `seconds`, versions and hardware.

    Raises:
        ArtifactError: no such folder, no adapter in it, or a damaged record.
    """
    missing = [name for name in (*ADAPTER_FILES, "training.json") if not (adapter / name).is_file()]
    if missing:
        raise ArtifactError(
            f"There is no trained adapter in {adapter}: {', '.join(missing)} missing.",
            "Run 05_train_dpo.ipynb first; or set TRAIN_IF_MISSING=True to train here and now; "
            "or set ADAPTER to a folder that 05 saved, for example on Drive.",
        )
    record = run_folder.read_json(adapter / "training.json")
    if not isinstance(record, dict) or not {"config", "base", "history"} <= set(record):
        raise ArtifactError(
            f"{adapter / 'training.json'} is not the record of a training.",
            "Run 05_train_dpo.ipynb again, or set ADAPTER to a folder that 05 saved.",
        )
    return record


def check_held_out(run: run_folder.Run, record: dict, choices: list[str]) -> None:
    """Refuse an adapter whose training rows may be this run's test rows.

    Raises:
        ArtifactError: trained on other data, or with another seed where the test split was cut by seed.
    """
    names = ["data", "data_revision"] + ["seed"] * any(c.startswith("test: no such split") for c in choices)
    now = run.config.identity()
    other = [n.upper() for n in names if record["config"].get(n) != now[n]]
    if other:
        raise ArtifactError(
            f"The adapter was trained with another {', '.join(other)}: held-out pairs may be pairs it has seen.",
            "Set the values it was trained with (they are in its training.json), or train again.",
        )


def history(trainer: DPOTrainer) -> dict[str, list[dict]]:
    """The trainer's log in two tables: one row per optimizer step, one per evaluation."""
    log = trainer.state.log_history
    return {
        "train": [row for row in log if "loss" in row],
        "eval": [row for row in log if "eval_loss" in row],
    }


@contextlib.contextmanager
def saving(config: Config, run: run_folder.Run, trainer: DPOTrainer, seconds: float) -> Iterator[Path]:
    """Save into the folder it gives; training record and model card are added, and all appears whole or not at all.

    The checkpoints go once it is saved, so that the next training starts anew, and the run's folder is free for it.

    Args:
        seconds: of training, for the record.
    """
    run.lock()
    where = models.source(config)
    for peft_config in trainer.model.peft_config.values():
        peft_config.base_model_name_or_path, peft_config.revision = where.name, where.revision
    record = {
        "config": config.identity(),
        "base": {"name": where.name, "revision": where.revision, "pin": where.pin},
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(memory.peak_memory_gib(), 2),
        "versions": session.versions(),
        "hardware": hardware.hardware(),
        "history": history(trainer),
    }
    with run.replacing(run.adapter) as folder:
        yield folder
        (folder / "training.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        (folder / "README.md").write_text(model_card(config, record), encoding="utf-8")
    checkpoints.clear(run)
    run.unlock()


def save_adapter(
    config: Config, run: run_folder.Run, trainer: DPOTrainer, tokenizer: PreTrainedTokenizerBase, seconds: float
) -> Path:
    """Save adapter (safetensors) and tokenizer beside record and model card: what notebook 05 does in the open."""
    with saving(config, run, trainer, seconds) as folder:
        trainer.model.save_pretrained(folder, save_embedding_layers=False)  # False: adapter only, no hub look-up
        tokenizer.save_pretrained(folder)
    return run.adapter


def model_card(config: Config, record: dict) -> str:
    """The adapter's README: base and its revision, data, settings, versions. Results are in `comparison.json`."""
    base, steps = record["base"], len(record["history"]["train"])
    hub_base = "/" in base["name"]
    front = ["library_name: peft", "tags: [dpo, qlora, trl]"] + ([f"base_model: {base['name']}"] if hub_base else [])
    rows = [
        ("Base", base["name"]),
        ("Base revision", base["pin"]),
        ("Data", f"{config.data} {config.data_revision or ''}".strip()),
        ("Method", f"DPO (loss {config.loss_type}, beta {config.beta:g}), LoRA r={config.lora_r} on NF4 weights"),
        *([("Went on from", Path(config.start_from).name)] if config.start_from else []),
        ("Steps", f"{steps} at batch {config.batch_size} x {config.grad_accum}, peak rate {config.learning_rate:g}"),
        ("Seed", config.seed),
        ("Compute type", config.dtype),
        ("Hardware", record["hardware"].get("gpu") or f"CPU, {record['hardware']['cores']} cores"),
        ("Versions", ", ".join(f"{k} {v}" for k, v in record["versions"].items())),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return "\n".join(
        ["---", *front, "---", "# Adapter trained by dpo-tutorial", "", "| | |", "|:-|:-|", table, ""]
        + ["Attach it to the 4-bit base it was trained on. Merged into 4-bit weights, the sum is rounded again.", ""]
    )
