"""One folder per run, one manifest, and the handoff between notebooks. Files appear whole or not at all."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import ArtifactError, disk_error, first_line
from .knobs import Config
from .machine import hardware, session

_locks: dict[Path, FileLock] = {}  # what this process has claimed


def unwritable(path: Path, error: Exception | str) -> ArtifactError:
    return ArtifactError(
        f"{path} could not be written ({getattr(error, 'strerror', None) or error}).",
        "Free space there, or name a folder you may write to: ARTIFACTS for a run, --out for a command.",
    )


def read_json(path: Path) -> dict | list:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing.", "Run the notebook that makes it.") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}.", "Delete it and run again.") from error


def json_text(value: object, indent: int | None = 2) -> str:
    """JSON that every reader takes: NaN and infinities, which the format has no words for, are null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda word: None)
    return json.dumps(plain, indent=indent, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> Path:
    """Write a file beside its final place and rename it: a reader sees the old text or the new, never half."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        with suppress(PermissionError):  # some mounts know no modes
            os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
    return path


class Run:
    """The artifacts of one profile: `manifest.json`, data, adapter, figures, results.

    They lie in `<artifacts>/<profile>/`, or in `folder`.

    Raises:
        ArtifactError: the folder cannot be made or written.
    """

    def __init__(self, config: Config, folder: Path | None = None) -> None:
        self.config = config
        self.dir = folder or config.run_dir
        self.figures, self.adapter = self.dir / "figures", self.dir / "adapter"
        try:
            self.figures.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.dir):
                pass
        except OSError as error:
            raise unwritable(self.dir, error) from error

    def write_text(self, name: str | Path, text: str) -> Path:
        return write_text(self.dir / name, text)

    def write_json(self, name: str | Path, value: object) -> Path:
        return self.write_text(name, json_text(value))

    def read_json(self, name: str) -> Any:
        """Read one of the run's JSON files.

        Raises:
            ArtifactError: missing or damaged.
        """
        return read_json(self.dir / name)

    def save_figure(self, figure, name: str) -> Path:
        """Save a matplotlib figure under `figures/` as PNG (the executed notebook keeps its own copy)."""
        path = self.figures / name
        figure.savefig(path)
        return path

    def manifest(self) -> dict:
        path = self.dir / "manifest.json"
        return self.read_json("manifest.json") if path.exists() else {"steps": {}}

    def record(self, step: str, **values) -> None:
        """Note in the manifest what a notebook made, with config, versions and hardware beside it."""
        manifest = self.manifest()
        manifest["steps"][step] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "config": self.config.identity(),
            "versions": session.versions(),
            "hardware": hardware.hardware(),
            **values,
        }
        self.write_json("manifest.json", manifest)

    @staticmethod
    @contextmanager
    def replacing(folder: Path) -> Iterator[Path]:
        """Yield an empty folder to fill; on success it takes the place of `folder`, on failure nothing changes.

        What a kill left half filled goes with the next call, once it is a day old: a younger one may be at work.
        """
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            for left in folder.parent.glob(f".{folder.name}-*") if folder.exists() else ():
                with suppress(FileNotFoundError):  # another process has just finished with it
                    if time.time() - left.stat().st_mtime > 86400:
                        shutil.rmtree(left, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        except OSError as error:
            raise unwritable(folder, error) from error
        old = work.with_name(work.name + "-old")
        try:
            yield work
            with suppress(PermissionError):
                os.chmod(work, 0o755)
            if folder.exists():
                os.replace(folder, old)
            os.replace(work, folder)
        except Exception as error:
            if disk_error(error):
                raise unwritable(folder, error) from error
            raise
        finally:
            if old.exists() and not folder.exists():  # also after a Ctrl-C between the two renames
                os.replace(old, folder)
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

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

    def fix_adapter(self) -> None:
        """Undo what a kill inside `replacing` left: the old adapter moved away, or folders half filled.

        Call it under the lock: another process may be saving.
        """
        for old in self.dir.glob(f".{self.adapter.name}-*-old"):
            if not self.adapter.exists():
                os.replace(old, self.adapter)
        for left in self.dir.glob(f".{self.adapter.name}-*"):
            shutil.rmtree(left, ignore_errors=True)
