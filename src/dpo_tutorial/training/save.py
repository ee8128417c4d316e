"""Save the adapter with its training record and model card, and read them again."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from .. import run_folder
from ..errors import ArtifactError
from ..knobs import Config
from ..loading import models, templates
from ..machine import hardware, memory, session
from ..pairs import row_checks
from . import card, checkpoints

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
#: One line for each pair trained on, in earlier rounds too, in 32 hex digits: half of them of its prompt's digest, half
#: of the whole pair's.
PAIRS_FILE = "training_pairs.txt"
#: Where a local MODEL or DATA lies on this machine: in the run's folder, and so not in the adapter's, which may leave.
PLACES_FILE = "places.json"
#: What a comparison reads in a training record.
_RECORD = ("config.beta", "config.dtype", "base.name", "history.train", "seconds", "versions", "hardware")


def read_training_record(adapter: Path) -> dict:
    """What training noted beside an adapter: `config`, `base`, `pairs`, `history`, `seconds`, versions and hardware.

    Raises:
        ArtifactError: no such folder, no adapter in it, or a damaged record.
    """
    missing = [name for name in (*ADAPTER_FILES, "training.json", PAIRS_FILE) if not (adapter / name).is_file()]
    if missing:
        raise ArtifactError(
            f"There is no trained adapter in {adapter}: {', '.join(missing)} missing.",
            "Run 05_train_dpo.ipynb first, or give ADAPTER (of a command: --adapter) a folder that 05 saved; in "
            "notebook 06, with ADAPTER empty, TRAIN_IF_MISSING=True trains one here and now.",
        )
    record: Any = run_folder.read_json(adapter / "training.json")
    if lacks := [path for path in _RECORD if _at(record, path) is None]:
        raise ArtifactError(
            f"{adapter / 'training.json'} is not the record of a training: it lacks {', '.join(lacks)}.",
            "Run 05_train_dpo.ipynb again, or set ADAPTER to a folder that 05 saved.",
        )
    return record


def _at(record, path: str):
    """The value under `path`, as "config.beta"; None where there is none."""
    for name in path.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    return record


def read_places(adapter: Path) -> dict[str, str]:
    """Where MODEL and DATA of an adapter lay, if they were local and it is still in the folder of its run."""
    path = adapter.absolute().parent / PLACES_FILE
    return dict(run_folder.read_json(path)) if path.is_file() else {}


def recorded(adapter: Path) -> dict:
    """The knobs that an adapter was trained with, for `config.resolve`; not its compute type, which the machine has.

    Raises:
        ArtifactError: as `read_training_record`.
    """
    knobs = read_training_record(adapter)["config"]
    return {name: value for name, value in knobs.items() if name != "dtype"} | read_places(adapter)


def pair_digests(pairs: Dataset) -> list[str]:
    """What `PAIRS_FILE` holds of these pairs. Of prompts, case and spaces do not count, as in notebook 04."""
    found = []
    for row in pairs.select_columns(["prompt", "chosen", "rejected"]):
        whole = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
        found.append(row_checks.prompt_digest(row["prompt"]).hex()[:16] + whole[:16])
    return found


def held_out(adapter: Path, pairs: Dataset) -> Dataset:
    """The pairs whose prompt the adapter in this folder was not trained on, by what the pairs hold, in order."""
    trained = {line[:16] for line in (adapter / PAIRS_FILE).read_text(encoding="utf-8").split()}
    return pairs.select([i for i, line in enumerate(pair_digests(pairs)) if line[:16] not in trained])


def check_held_out(adapter: Path, pairs: Dataset) -> None:
    """Refuse to judge an adapter on pairs that it was trained on; under which path or seed they came does not count.

    Raises:
        ArtifactError: the adapter was trained on the prompt of one of the pairs.
    """
    seen = len(pairs) - len(held_out(adapter, pairs))
    if seen:
        raise ArtifactError(
            f"The adapter was trained on {seen} of these {len(pairs)} test pairs, so they are not held out.",
            "Set DATA, SEED and the other values it was trained with (they are in its training.json), or train again; "
            "`dpo-tutorial compare --data` leaves such pairs out.",
        )


def history(trainer: DPOTrainer) -> dict[str, list[dict]]:
    """The trainer's log in two tables: one row per optimizer step, one per evaluation."""
    log = trainer.state.log_history
    return {"train": [row for row in log if "loss" in row], "eval": [row for row in log if "eval_loss" in row]}


@contextlib.contextmanager
def saving(config: Config, run: run_folder.Run, trainer: DPOTrainer, seconds: float) -> Iterator[Path]:
    """Save into the folder it gives; training record and model card are added, and all appears whole or not at all.

    The checkpoints go once it is saved, so that the next training starts anew, and the run's folder is free for it.
    """
    run.lock()
    where = models.source(config)
    for peft_config in trainer.model.peft_config.values():
        peft_config.base_model_name_or_path, peft_config.revision = where.name, where.revision
    lines = "".join(line + "\n" for line in pair_digests(trainer.train_dataset))
    earlier = Path(config.start_from).expanduser() / PAIRS_FILE
    before = earlier.read_text(encoding="utf-8") if config.start_from and earlier.is_file() else ""
    record = {
        "config": config.identity(),
        "base": {name: getattr(where, name) for name in ("name", "revision", "digest", "pin")}
        | {"storage": storage(trainer.model)},
        "pairs": {"number": len(trainer.train_dataset), "sha256": hashlib.sha256(lines.encode()).hexdigest()},
        "template": templates.template_options(trainer.processing_class),
        "seconds": round(seconds, 1),
        "processes": hardware.processes().num_processes,
        "peak_memory_gib": round(memory.peak_memory_gib(), 2),
        "versions": session.versions(),
        "hardware": hardware.hardware(),
        "history": history(trainer),
    }
    with run.replacing(run.adapter) as folder:
        yield folder
        (folder / PAIRS_FILE).write_text(lines + before, encoding="utf-8")
        (folder / "training.json").write_text(run_folder.json_text(record), encoding="utf-8")
        (folder / "README.md").write_text(card.model_card(config, record), encoding="utf-8")
    run.write_json(PLACES_FILE, config.places())
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


def storage(model: PeftModel) -> str:
    """How the linear layers of the base are stored: "NF4", or the type of the weights where they are not quantized."""
    kinds = {m.weight.quant_type.upper() for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)}
    return " and ".join(sorted(kinds)) or str(next(model.parameters()).dtype).removeprefix("torch.")
