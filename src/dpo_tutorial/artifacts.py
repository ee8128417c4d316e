"""One folder per run, one manifest, and the handoff between notebooks. Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from . import data, environment
from .config import Config
from .errors import ArtifactError, disk_error, first_line

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

_locks: dict[Path, FileLock] = {}  # what this process has claimed


def unwritable(path: Path, error: Exception | str) -> ArtifactError:
    return ArtifactError(
        f"{path} could not be written ({getattr(error, 'strerror', None) or error}).",
        "Free space there, or set ARTIFACTS to a folder you may write to.",
    )


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
    record = _read_json(adapter / "training.json")
    if not isinstance(record, dict) or not {"config", "base", "history"} <= set(record):
        raise ArtifactError(
            f"{adapter / 'training.json'} is not the record of a training.",
            "Run 05_train_dpo.ipynb again, or set ADAPTER to a folder that 05 saved.",
        )
    return record


def _read_json(path: Path) -> dict | list:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing.", "Run the notebook that makes it.") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}.", "Delete it and run again.") from error


class Run:
    """The artifacts of one profile: `<artifacts>/<profile>/` with `manifest.json`, data, adapter, figures, results.

    Args:
        folder: another place for them.

    Raises:
        ArtifactError: the folder cannot be made or written.
    """

    def __init__(self, config: Config, folder: Path | None = None) -> None:
        self.config = config
        self.dir = folder or config.run_dir
        try:
            self.figures.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.dir):
                pass
        except OSError as error:
            raise unwritable(self.dir, error) from error

    @property
    def figures(self) -> Path:
        return self.dir / "figures"

    @property
    def adapter(self) -> Path:
        return self.dir / "adapter"

    # --- small files ---

    def write_text(self, name: str | Path, text: str) -> Path:
        """Write a file beside its final place and rename it: a reader sees the old text or the new, never half."""
        path, temporary = self.dir / name, None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except OSError as error:
            raise unwritable(path, error) from error
        finally:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
        return path

    def write_json(self, name: str | Path, value: object) -> Path:
        return self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Read one of the run's JSON files.

        Raises:
            ArtifactError: missing or damaged.
        """
        return _read_json(self.dir / name)

    def save_figure(self, figure, name: str) -> Path:
        """Save a matplotlib figure under `figures/` as PNG (the executed notebook keeps its own copy)."""
        path = self.figures / name
        figure.savefig(path)
        return path

    # --- manifest ---

    def manifest(self) -> dict:
        path = self.dir / "manifest.json"
        return self.read_json("manifest.json") if path.exists() else {"steps": {}}

    def record(self, step: str, **values) -> None:
        """Note in the manifest what a notebook made, with config, versions and hardware beside it."""
        manifest = self.manifest()
        manifest["steps"][step] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "config": self.config.identity(),
            "versions": environment.versions(),
            "hardware": environment.hardware(),
            **values,
        }
        self.write_json("manifest.json", manifest)

    # --- folders ---

    @contextmanager
    def replacing(self, folder: Path) -> Iterator[Path]:
        """Yield an empty folder to fill; on success it takes the place of `folder`, on failure nothing changes."""
        try:
            work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=self.dir))
        except OSError as error:
            raise unwritable(folder, error) from error
        old = work.with_name(work.name + "-old")
        try:
            yield work
            os.chmod(work, 0o755)
            if folder.exists():
                os.replace(folder, old)
            os.replace(work, folder)
        except Exception as error:
            if isinstance(error, OSError) or disk_error(error):
                raise unwritable(folder, error) from error
            raise
        finally:
            if old.exists() and not folder.exists():  # also after a Ctrl-C between the two renames
                os.replace(old, folder)
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

    # --- one at a time ---

    def lock(self, work: str = "training") -> None:
        """Claim the folder for one kind of work until `unlock`, or until this process ends, however it ends.

        Where the file system has no locks, filelock keeps a marker file instead, or we go on without, and say so.

        Raises:
            ArtifactError: another process is at the same work there.
        """
        path = (self.dir / f".{work}.lock").resolve()
        if path in _locks:
            return
        lock = FileLock(path, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise ArtifactError(
                f"Another process is using {self.dir} for {work}.",
                "Wait until it is done, or stop it, or set ARTIFACTS to another folder.",
            ) from None
        except (OSError, NotImplementedError) as error:  # a file system without locks, as some network drives are
            print(f"{self.dir} cannot be locked ({first_line(error)}): do not start a second run in it.")
            return
        _locks[path] = lock

    def unlock(self, work: str = "training") -> None:
        lock = _locks.pop((self.dir / f".{work}.lock").resolve(), None)
        if lock:
            lock.release()

    def mend_adapter(self) -> None:
        """Undo what a kill inside `replacing` left: the old adapter moved away, or folders half filled.

        Call it under the lock: another process may be saving.
        """
        for old in self.dir.glob(f".{self.adapter.name}-*-old"):
            if not self.adapter.exists():
                os.replace(old, self.adapter)
        for left in self.dir.glob(f".{self.adapter.name}-*"):
            shutil.rmtree(left, ignore_errors=True)

    # --- handoff between notebooks ---

    def data_dir(self) -> Path:
        """Folder of the prepared data; its name is a digest of config, local data files and `data.VERSION`.

        Not noticed: a hub id without @revision that has moved, or a tokenizer changed inside a local MODEL folder.
        """
        identity = json.dumps(data.source_identity(self.config), sort_keys=True)
        return self.dir / f"data-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"

    def save_data(self, prepared: data.Prepared) -> Path:
        """Save the splits as JSONL beside `report.json`; the audit as `data_report.json` in the run's folder."""
        with self.replacing(self.data_dir()) as folder:
            for name, split in prepared.splits.items():
                with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
                    for row in split:
                        stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            report = {"report": prepared.report, "choices": prepared.choices}
            (folder / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        self._write_data_report(prepared)
        return self.data_dir()

    def _write_data_report(self, prepared: data.Prepared) -> None:
        folder = {"prepared": self.data_dir().name}  # a run's folder may hold the prepared data of several configs
        self.write_json("data_report.json", folder | data.data_report(self.config, prepared))

    def ensure_data(self, tokenizer: PreTrainedTokenizerBase) -> data.Prepared:
        """The prepared data: read back, or made now by the same function, with a line saying so."""
        folder = self.data_dir()
        if not (folder / "report.json").exists():
            print("No prepared data of this config yet: making it now, as 04_prepare_ultrafeedback does.")
            prepared = data.prepare(self.config, tokenizer)
            self.save_data(prepared)
            return prepared
        report, splits = self.read_json(f"{folder.name}/report.json"), {}
        for name in report["report"]:
            try:
                with (folder / f"{name}.jsonl").open(encoding="utf-8") as stream:
                    splits[name] = Dataset.from_list([json.loads(line) for line in stream])
                whole = len(splits[name]) == report["report"][name]["used"]
            except (OSError, ValueError):
                whole = False
            if not whole:
                raise ArtifactError(f"{folder / name}.jsonl is missing or damaged.", f"Delete {folder} and run again.")
        prepared = data.Prepared(DatasetDict(splits), report["report"], report["choices"])
        self._write_data_report(prepared)
        if self.config.strict:
            data.refuse_dropped(prepared.report)
        return prepared

    def require_adapter(self) -> dict:
        """The training record of the adapter that 05 saved.

        Raises:
            ArtifactError: no adapter yet (names the notebook that makes one, and the choices).
        """
        return read_training_record(self.adapter)

    def check_adapter(self, record: dict, choices: list[str]) -> None:
        """Refuse an adapter whose training rows may be this run's test rows.

        Raises:
            ArtifactError: trained on other data, or with another seed where the test split was cut by seed.
        """
        names = ["data", "data_revision"] + ["seed"] * any(c.startswith("test: no such split") for c in choices)
        now = self.config.identity()
        other = [n.upper() for n in names if record["config"].get(n) != now[n]]
        if other:
            raise ArtifactError(
                f"The adapter was trained with another {', '.join(other)}: held-out pairs may be pairs it has seen.",
                "Set the values it was trained with (they are in its training.json), or train again.",
            )
