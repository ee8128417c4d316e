"""Read preference pairs from a hub id, a folder, a file or the package, and choose the splits."""

from __future__ import annotations

import csv
import glob
import json
from importlib import resources
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

from .. import knobs
from ..errors import DataError, first_line
from ..knobs import Config
from ..loading import embedded
from ..machine import hardware
from .row_checks import COLUMNS

#: Where each split is looked for, first hit wins. What is missing is cut from the training split, by seed.
SPLIT_NAMES = {
    "train": ("train_prefs", "train"),
    "val": ("val_prefs", "validation", "val"),
    "test": ("test_prefs", "test"),
}

EMBEDDED_SPLITS = ("train_prefs", "val_prefs", "test_prefs")


# --- load ---------------------------------------------------------------------------------------------------------


def load_preferences(config: Config) -> tuple[DatasetDict, list[str]]:
    """Read `config.data` and choose its train, val and test splits.

    Accepts `embedded`, a hub id, a folder laid out as the hub serves it, a `.parquet` or a `.jsonl` file. Not CSV: a
    cell of it holds no list of messages.

    Returns:
        (`DatasetDict` with exactly `train`, `val`, `test`; the choices made, one sentence each).

    Raises:
        DataError: no such file or dataset, unreadable, or not the UltraFeedback-binarized schema.
    """
    raw = _read(config)
    for name, split in raw.items():
        if name in {n for names in SPLIT_NAMES.values() for n in names}:
            _check_columns(split, f"{config.data} ({name})")
    return choose_splits(raw, config.seed)


def embedded_file(split: str) -> Path:
    """Path of one split of the repository's own preference set (`train_prefs`, `val_prefs`, `test_prefs`)."""
    return Path(str(resources.files("dpo_tutorial.pairs") / "resources" / f"{split}.jsonl"))


def rejected_kinds() -> dict[str, str]:
    """prompt_id → what is wrong with the rejected answer, of the repository's own set.

    "base sample" was drawn from the base; "form" was written to break the style; the others keep the form and fail in
    substance (`resources/README.md` says how).
    """
    rows = map(json.loads, embedded_file("provenance").read_text(encoding="utf-8").splitlines())
    return {row["prompt_id"]: row["rejected_kind"] for row in rows}


def dirty_rows() -> list[dict]:
    """Rows made bad on purpose, for the audit lesson of notebook 04; no split reads them.

    Each has `expected`: the reason of `REASONS` that `row_problem` must find, None for the one sound row.
    """
    return [json.loads(line) for line in embedded_file("dirty_rows").read_text(encoding="utf-8").splitlines()]


def source(config: Config) -> tuple[str, dict | None, str | None]:
    """What `load_dataset` is called with for `config.data`: hub id, folder or kind of file; files; revision.

    Raises:
        DataError: no such file, or a table of plain cells.
    """
    spec = config.data
    path = Path(spec).expanduser()
    if spec == knobs.EMBEDDED:
        return "json", {s: str(embedded_file(s)) for s in EMBEDDED_SPLITS}, None
    if path.is_dir():
        return str(path), None, None
    if path.suffix in (".parquet", ".jsonl", ".json"):
        if not path.is_file():
            raise DataError(
                f"DATA={spec} does not exist (looked in {Path.cwd()}).", "Give the path of an existing file."
            )
        kind = "parquet" if path.suffix == ".parquet" else "json"
        return kind, {"train": glob.escape(str(path))}, None  # `[1]` in a name is no pattern
    if path.suffix in (".csv", ".tsv") and path.is_file():
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            found = next(csv.reader(stream, delimiter="," if path.suffix == ".csv" else "\t"), [])
        raise DataError(
            f"DATA={spec} is a table of plain cells, which hold no conversation; it has {listed(found)}.",
            f"Write it as .jsonl or .parquet. {SCHEMA}",
        )
    return spec, None, config.data_revision


def _read(config: Config) -> DatasetDict:
    try:
        where, files, revision = source(config)
        return load_dataset(where, data_files=files, revision=revision)
    except DataError:
        raise
    except Exception as error:  # datasets raises a dozen unrelated types for "cannot read this"
        raise DataError(
            f"DATA={config.data} could not be read: {_cause(error)}",
            "Give a hub id (with @revision), a folder as the hub serves it, a .parquet or a .jsonl file. "
            "Without a hub, DATA=embedded uses the repository's own pairs.",
        ) from error


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line: `datasets` wraps it in exceptions that say only that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, StopIteration):
        return "the file holds no row"
    return first_line(error)


SCHEMA = (
    "Preference data needs prompt (text), chosen and rejected (lists of {role, content}), "
    "score_chosen and score_rejected (numbers), as HuggingFaceH4/ultrafeedback_binarized has them."
)


def listed(columns: list[str]) -> str:
    return ", ".join(columns) or "no column"


def _check_columns(split: Dataset, where: str) -> None:
    missing = [c for c in COLUMNS if c not in split.column_names]
    if missing:
        raise DataError(f"{where} has no column {', '.join(missing)}; it has {listed(split.column_names)}.", SCHEMA)


def choose_splits(raw: DatasetDict, seed: int) -> tuple[DatasetDict, list[str]]:
    """Find train, val and test by their usual names; cut a missing one from train, by seed, and say so.

    What is cut follows the order of the source: another order of its rows is another cut.
    """
    found, said = {}, []
    for ours, names in SPLIT_NAMES.items():
        name = next((n for n in names if n in raw), None)
        if name:
            found[ours] = raw[name]
            said.append(f"{ours}: split '{name}', {len(raw[name]):,} rows")
    others = sorted(set(raw) - {n for names in SPLIT_NAMES.values() for n in names})
    if others:
        said.append(f"left alone: {', '.join(others)}")
    if "train" not in found:
        raise DataError(f"No training split among {', '.join(raw)}.", f"Name it {' or '.join(SPLIT_NAMES['train'])}.")
    for ours in ("val", "test"):
        if ours not in found:
            if len(found["train"]) < 10:
                raise DataError(
                    f"{len(found['train'])} rows are too few to cut a {ours} split from.", "Give at least 12 rows."
                )
            cut = found["train"].train_test_split(test_size=0.1, seed=seed)
            found["train"], found[ours] = cut["train"], cut["test"]
            said.append(f"{ours}: no such split, so {len(cut['test']):,} rows cut from train with seed {seed}")
    return DatasetDict({k: found[k] for k in ("train", "val", "test")}), said


def or_hub(model: str = "", data: str = "") -> tuple[tuple[str, str | None], tuple[str, str | None]]:
    """Where the quickstart reads model and pairs from: as (hub id or folder, commit), the commit of a pinned id.

    Args:
        model: a hub id, a folder, or "embedded"; empty takes Qwen2.5-0.5B-Instruct where there is a GPU, else the
            embedded model.
        data: likewise; empty takes UltraFeedback where there is a GPU, else the repository's own pairs.

    Raises:
        As `ensure_embedded_model`.
    """
    gpu = hardware.device() == "cuda"
    model = model or (knobs.QWEN_SMALL[0] if gpu else knobs.EMBEDDED)
    data = data or (knobs.ULTRAFEEDBACK[0] if gpu else knobs.EMBEDDED)
    commits = dict([knobs.QWEN_SMALL, knobs.ULTRAFEEDBACK])
    if model == knobs.EMBEDDED:
        model = str(embedded.ensure_embedded_model())
    if data == knobs.EMBEDDED:
        data = str(embedded_file("train_prefs").parent)
    return (model, commits.get(model)), (data, commits.get(data))
