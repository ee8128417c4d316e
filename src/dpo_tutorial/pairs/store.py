"""The prepared pairs on disk: one folder for each config, made once and read back."""

import dataclasses
import hashlib
import json
from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from .. import run_folder
from ..errors import ArtifactError
from ..knobs import Config
from ..loading.embedded import sha256
from ..machine import hardware
from . import prepare, sources, splits


def data_dir(run: run_folder.Run) -> Path:
    """Folder of the prepared data; its name is a digest of config, local data files and `store.VERSION`.

    Not noticed: a hub id without @revision that has moved, or a tokenizer changed inside a local MODEL folder.
    """
    identity = json.dumps(source_identity(run.config), sort_keys=True)
    return run.dir / f"data-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"


def save_data(run: run_folder.Run, prepared: prepare.Prepared, target: Path | None = None) -> Path:
    """Save the splits as JSONL beside `report.json`; the audit as `data_report.json` in the run's folder."""
    target = target or data_dir(run)
    with run.replacing(target) as folder:
        for name, split in prepared.splits.items():
            with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
                for row in split:
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        report = {"report": prepared.report, "choices": prepared.choices}
        (folder / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    _write_data_report(run, prepared, target)
    return target


def _write_data_report(run: run_folder.Run, prepared: prepare.Prepared, folder: Path) -> None:
    if hardware.processes().is_main_process:  # a run's folder may hold the prepared data of several configs
        run.write_json("data_report.json", {"prepared": folder.name} | prepare.data_report(run.config, prepared))


def ensure_data(run: run_folder.Run, tokenizer: PreTrainedTokenizerBase) -> prepare.Prepared:
    """The prepared data: read back, or made now by the same function, with a line saying so."""
    folder = data_dir(run)
    if not (folder / "report.json").exists():
        print("No prepared data of this config yet: making it now, as 04_prepare_ultrafeedback does.")
        prepared = prepare.prepare(run.config, tokenizer)
        save_data(run, prepared, folder)
        return prepared
    report, splits = run.read_json(f"{folder.name}/report.json"), {}
    for name in report["report"]:
        try:
            with (folder / f"{name}.jsonl").open(encoding="utf-8") as stream:
                splits[name] = Dataset.from_list([json.loads(line) for line in stream])
            whole = len(splits[name]) == report["report"][name]["used"]
        except (OSError, ValueError):
            whole = False
        if not whole:
            raise ArtifactError(f"{folder / name}.jsonl is missing or damaged.", f"Delete {folder} and run again.")
    prepared = prepare.Prepared(DatasetDict(splits), report["report"], report["choices"])
    _write_data_report(run, prepared, folder)
    if run.config.strict:
        prepare.refuse_dropped(prepared.report)
    return prepared


VERSION = 5  # raise it when the same source would give other rows: prepared data of another version is not reused


def source_identity(config: Config) -> dict:
    """What the prepared data depends on; artifacts made from other values are not reused."""
    limits = ("max_tokens", "max_train", "max_val", "max_test")
    names = ("model", "model_revision", "data_revision", "data_columns", "seed", *limits)
    values = dataclasses.asdict(config)
    return {n: values[n] for n in names} | {"data": _content(config), "code": VERSION}


def _content(config: Config) -> str | dict[str, list[str]]:
    """A hub id names its content by revision; of local files the bytes of each split count, not the names."""
    found, _ = sources.files(config)
    names = splits.usual(found).items()
    return {ours: [sha256(path) for path in found[name]] for ours, name in names} or config.data
