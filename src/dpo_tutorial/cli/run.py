"""Run the six notebooks in order with papermill: `dpo-tutorial run -p PROFILE cpu`."""

import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from .. import config, run_folder
from ..adapter import lora
from ..errors import ArtifactError, NotebookError, first_line
from ..loading import models
from ..machine import hardware, memory, paths, session
from ..pairs import sources
from ..training import tracking

#: What a kernel must not do in a headless run: wait for a vote, start tokenizer threads after a fork,
#: or keep small freed pieces apart, which leaves holes between large ones (`benchmarks/memory_plan.md`).
_KERNEL_ENV = {
    "TOKENIZERS_PARALLELISM": "false",
    "DPO_TUTORIAL_HEADLESS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
}


def notebooks(folder: Path | None = None) -> list[Path]:
    """The notebooks of a run, 01 to 06, in order; the quickstart, 00, is a page of its own.

    Raises:
        ArtifactError: none there.
    """
    folder = folder or paths.project_root() / "notebooks"
    found = sorted(p for p in folder.glob("*.ipynb") if re.match(r"(?!00)\d\d_", p.name))
    if not found:
        raise ArtifactError(f"No numbered notebook in {folder}.", "Run from a checkout of the repository.")
    return found


def run_all(parameters: dict[str, str], paths: list[Path] | None = None) -> dict:
    """Execute the notebooks in order into `<artifacts>/<profile>/executed/`; each gets all parameters, as text.

    Returns:
        The summary that is printed at the end and saved as `summary.json`.

    Raises:
        ConfigError: unknown profile or parameter; nothing has run yet.
        ArtifactError: another process runs the notebooks in the same folder; nothing has run here.
        NotebookError: a notebook failed; names the cell and the partial notebook. Later ones do not run.
    """
    paths = paths or notebooks()
    resolved = config.resolve(**config.named(parameters.items()))
    tracking.check_installed(resolved)
    run = run_folder.Run(resolved)
    models.load_tokenizer(resolved)  # a missing model or data file is found now, not after minutes
    sources.load_preferences(resolved)
    if resolved.start_from:
        lora.check_start(resolved, resolved.start_from)
    run.lock("notebooks")
    try:
        return _run_all(run, parameters, paths)
    finally:
        run.unlock("notebooks")


def _run_all(run: run_folder.Run, given: dict, paths: list[Path]) -> dict:
    executed = run.dir / "executed"
    shutil.rmtree(executed, ignore_errors=True)  # the record of an earlier run must not pass for this one's
    (run.dir / "summary.json").unlink(missing_ok=True)
    executed.mkdir()
    os.environ.update(_KERNEL_ENV)
    minutes = {}
    for number, path in enumerate(paths, 1):
        print(f"[{number}/{len(paths)}] {path.name}", flush=True)
        started = time.perf_counter()
        with training_lines(run.dir / "progress.jsonl"):
            _execute(path, executed / path.name, given | {"PROFILE": run.config.profile})
        minutes[path.stem] = round((time.perf_counter() - started) / 60, 2)
        print(f"[{number}/{len(paths)}] {path.name} done in {minutes[path.stem]:.1f} min", flush=True)
    return _summary(run, minutes)


def _execute(path: Path, target: Path, parameters: dict) -> None:
    # Papermill warns of a name that the notebook's cell does not list; all of these were checked, and all are taken.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        papermill.execute_notebook(
            str(path), str(target), parameters=parameters, kernel_name="python3", cwd=str(Path.cwd()),
            progress_bar={"desc": path.stem, "unit": "cell", "file": sys.stdout}, log_output=False,
        )  # fmt: skip
    except PapermillExecutionError as error:
        last = error.evalue.strip() or error.ename
        raise NotebookError(
            f"{path.name} stopped in cell {error.cell_index} (In [{error.exec_count}]): {error.ename}: {last}",
            f"Open {target} to see the cells up to there with their outputs.",
        ) from error
    except DeadKernelError as error:
        raise NotebookError(
            f"{path.name}: its process died, most often because memory ran out.",
            f"Lower MAX_TOKENS or take a smaller profile; {target} holds the cells up to there.",
        ) from error
    except (KeyError, OSError, RuntimeError, json.JSONDecodeError) as error:  # KeyError: no such kernel
        if isinstance(error, OSError) and error.filename in (None, str(target)):
            raise run_folder.unwritable(target, error) from error
        raise NotebookError(  # a kernelspec that is damaged, points nowhere, or names a program that is no kernel
            f"The Jupyter kernel python3 does not start: {first_line(error)}.",
            f"Run `{sys.executable} -m ipykernel install --sys-prefix`; if it still does not start, remove the folder "
            "that `jupyter kernelspec list` shows for python3.",
        ) from error


@contextmanager
def training_lines(progress: Path, every: float = 20.0) -> Iterator[None]:
    """Print the newest line of the training log every few seconds: a kernel's long cell says nothing by itself."""
    done = threading.Event()
    # An earlier run's log is known by its own stamp: a file's clock may be some milliseconds behind time.time().
    earlier = progress.stat().st_mtime_ns if progress.exists() else None

    def watch() -> None:
        last, ended = None, False
        while not ended:
            ended = done.wait(every)  # one look more after the end: the last step is always shown
            try:
                if progress.stat().st_mtime_ns == earlier:
                    continue
                lines = progress.read_text(encoding="utf-8").splitlines()
            except FileNotFoundError:
                continue
            rows = [json.loads(line) for line in lines if line.endswith("}")]
            rows = [r for r in rows if "loss" in r]
            if rows and rows[-1]["step"] != last:
                last = rows[-1]["step"]
                print(f"  training step {last} of {rows[-1]['of']}, loss {rows[-1]['loss']:.3f}", flush=True)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _summary(run: run_folder.Run, minutes: dict[str, float]) -> dict:
    summary: dict[str, Any] = {"profile": run.config.profile, "why": list(run.config.reasons), "minutes": minutes}
    peak = memory.children_peak_memory_gib()
    summary["peak_memory_gib"] = peak and round(peak, 2)
    comparison = run.dir / "comparison.json"
    if comparison.exists():
        found = run.read_json("comparison.json")
        after = found["held_out"]["after"]
        summary["held_out"] = after["accuracy"]
        summary["rewards"] = {side: after[f"reward_{side}"]["mean"] for side in ("chosen", "rejected")}
        summary["kl_per_answer"] = found["kl"]["inside"]["per_answer"]["mean"]
    summary |= {
        "adapter": str(run.config.adapter or run.adapter), "comparison": str(comparison), "figures": str(run.figures),
        "executed": str(run.dir / "executed"), "versions": session.versions(), "hardware": hardware.hardware(),
    }  # fmt: skip
    run.write_json("summary.json", summary)
    print(f"\nprofile    {summary['profile']} ({'; '.join(summary['why'])})")
    each = ", ".join(f"{name} {taken:.1f}" for name, taken in minutes.items())
    print(f"minutes    {each}; {sum(minutes.values()):.1f} in all")
    if peak:
        print(f"memory     {peak:.1f} GiB of main memory at the peak of the largest notebook")
    if "held_out" in summary:
        a = summary["held_out"]
        print(f"held out   accuracy {a['rate']:.2f} (95% {a['low']:.2f} to {a['high']:.2f}, n = {a['n']}); base 0.50")
        rewards = ", ".join(f"{side} {value:+.2f}" for side, value in summary["rewards"].items())
        print(f"rewards    {rewards}; KL from the base {summary['kl_per_answer']:.1f} nats per answer")
    for name in ("adapter", "comparison", "figures", "executed"):
        print(f"{name:<10} {summary[name]}")
    return summary
