"""Run the six notebooks in order with papermill: `python -m dpo_tutorial.run -p PROFILE cpu`."""

from __future__ import annotations

import argparse
import hashlib
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

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from . import artifacts, config, data, environment, models
from .errors import ArtifactError, NotebookError, exit_code

#: What a kernel must not do in a headless run: fetch chatter, wait for a vote, start tokenizer threads after a fork,
#: or keep small freed pieces apart, which leaves holes between large ones (`benchmarks/memory_plan.md`).
_KERNEL_ENV = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DPO_TUTORIAL_HEADLESS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
}


def notebooks(folder: Path | None = None) -> list[Path]:
    """The notebooks of a run, 01 to 06, in order; the quickstart, 00, is a page of its own.

    Raises:
        ArtifactError: none there.
    """
    folder = folder or environment.project_root() / "notebooks"
    found = sorted(p for p in folder.glob("*.ipynb") if re.match(r"(?!00)\d\d_", p.name))
    if not found:
        raise ArtifactError(f"No numbered notebook in {folder}.", "Run from a checkout of the repository.")
    return found


def run_all(parameters: dict[str, str], paths: list[Path] | None = None) -> dict:
    """Execute the notebooks in order into `<artifacts>/<profile>/executed/`.

    Args:
        parameters: knobs by their names in capitals, as text; each notebook gets all of them and makes its config.

    Returns:
        The summary that is printed at the end and saved as `summary.json`.

    Raises:
        ConfigError: unknown profile or parameter; nothing has run yet.
        ArtifactError: another process runs the notebooks in the same folder; nothing has run here.
        NotebookError: a notebook failed; names the cell and the partial notebook. Later ones do not run.
    """
    paths = paths or notebooks()
    resolved = config.resolve(**config.named(parameters.items()))
    run = artifacts.Run(resolved)
    models.load_tokenizer(resolved)  # a missing model or data file is found now, not after minutes
    data.load_preferences(resolved)
    run.lock("notebooks")
    try:
        return _run_all(run, parameters, paths)
    finally:
        run.unlock("notebooks")


def _run_all(run: artifacts.Run, given: dict, paths: list[Path]) -> dict:
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


def _summary(run: artifacts.Run, minutes: dict[str, float]) -> dict:
    summary = {"profile": run.config.profile, "why": list(run.config.reasons), "minutes": minutes}
    peak = environment.children_peak_memory_gib()
    summary["peak_memory_gib"] = peak and round(peak, 2)
    comparison = run.dir / "comparison.json"
    if comparison.exists():
        found = run.read_json("comparison.json")
        after = found["held_out"]["after"]
        summary["held_out"] = after["accuracy"]
        summary["rewards"] = {side: after[f"reward_{side}"]["mean"] for side in ("chosen", "rejected")}
        summary["kl_per_answer"] = found["kl"]["inside"]["per_answer"]["mean"]
    summary |= {
        "adapter": str(run.adapter), "comparison": str(comparison), "figures": str(run.figures),
        "executed": str(run.dir / "executed"), "versions": environment.versions(), "hardware": environment.hardware(),
    }  # fmt: skip
    run.write_json("summary.json", summary)
    print(f"\nprofile    {summary['profile']} ({'; '.join(summary['why'])})")
    print(
        "minutes    " + ", ".join(f"{k} {v:.1f}" for k, v in minutes.items()) + f"; {sum(minutes.values()):.1f} in all"
    )
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


def source_digest(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 over the sources of the code cells: tells whether the outputs beside them are of this source."""
    slug = re.compile(r"(?<=github\.com/)[\w.-]+/[\w.-]+")  # `make badges` may change it without a new run
    sources = [slug.sub("", cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def clean_notebook(source: Path, target: Path) -> None:
    """Copy an executed notebook for the repository: outputs kept; papermill's traces, widgets and paths removed."""
    notebook = nbformat.read(source, as_version=4)
    notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    for cell in notebook.cells:
        tags = [t for t in cell.metadata.get("tags", []) if t != "papermill-error-cell-tag"]
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            cell.outputs = [_clean_output(o) for o in cell.outputs if not _is_chatter(o)]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "dpo_tutorial": {"source_sha256": source_digest(notebook)},
    }
    nbformat.validate(notebook)
    target.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def _is_chatter(output: dict) -> bool:
    """Progress bars: live they help, on paper they are noise (and widget state breaks GitHub's rendering)."""
    if output.output_type == "stream":
        return output.name == "stderr"
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def _clean_output(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    if "text" in output:
        output.text = environment.without_paths(output.text)
    for kind, value in output.get("data", {}).items():
        if isinstance(value, str) and kind.startswith("text/"):
            value = re.sub(r"<div>\s*<progress.*?</div>", "", value, flags=re.DOTALL)  # the bar above Trainer's table
            output.data[kind] = environment.without_paths(value)
    return output


def main(argv: list[str] | None = None) -> int:
    """Run all six notebooks; `--refresh` copies the executed ones, cleaned, over `notebooks/`."""
    parser = argparse.ArgumentParser(prog="python -m dpo_tutorial.run", description=main.__doc__)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    parser.add_argument("--refresh", action="store_true", help="write the outputs into notebooks/")
    return exit_code(_main, parser.parse_args(argv))


def _main(options: argparse.Namespace) -> None:
    summary = run_all(config.named(options.p))
    if options.refresh:
        for path in notebooks():
            clean_notebook(Path(summary["executed"]) / path.name, path)
        print("notebooks/ now holds the outputs of this run")


if __name__ == "__main__":
    raise SystemExit(main())
