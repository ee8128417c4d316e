"""Run the cpu profile and the quickstart, and write their outputs into notebooks/, README's drawing into docs/.

`make notebooks`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

from dpo_tutorial import show
from dpo_tutorial.cli import run
from dpo_tutorial.errors import exit_code
from dpo_tutorial.machine import paths

ROOT = Path(__file__).parents[1]


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
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})  # what a progress bar had cut in two
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
        output.text = paths.without_paths(output.text)
    for kind, value in output.get("data", {}).items():
        if isinstance(value, str) and kind.startswith("text/"):
            value = re.sub(r"<div>\s*<progress.*?</div>", "", value, flags=re.DOTALL)  # the bar above Trainer's table
            output.data[kind] = paths.without_paths(value)
    return output


def write_stored_run(log: Path) -> bool:
    """Keep what `show.reward_curves` draws of a training's log; whether that differs from what was kept."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    keys = {"train": ("step", "rewards/chosen", "rewards/rejected")}
    keys["eval"] = ("step", "eval_rewards/chosen", "eval_rewards/rejected")
    kept = {kind: [{k: round(r[k], 4) for k in names} for r in rows if names[1] in r] for kind, names in keys.items()}
    target, text = ROOT / "src" / "dpo_tutorial" / "show" / "stored_run.json", json.dumps(kept, indent=1) + "\n"
    differs = not target.exists() or target.read_text(encoding="utf-8") != text
    target.write_text(text, encoding="utf-8")
    return differs


def refresh() -> None:
    """No notebook is written before all runs have ended well."""
    quickstart, executed = ROOT / "notebooks" / "00_quickstart.ipynb", ROOT / "artifacts" / "refresh"
    shutil.rmtree(executed, ignore_errors=True)
    executed.mkdir(parents=True)
    given = ["-p", "MODEL", "embedded", "-p", "DATA", "embedded", "-p", "ARTIFACTS", "artifacts/refresh"]
    command = [sys.executable, "-m", "papermill", str(quickstart), str(executed / quickstart.name), *given]
    subprocess.run(command, cwd=ROOT, check=True)
    summary = run.run_all({"PROFILE": "cpu"})
    ran = {path: Path(summary["executed"]) / path.name for path in run.notebooks(ROOT / "notebooks")}
    if write_stored_run(Path(summary["executed"]).parent / "progress.jsonl"):  # 01 opens with its curve
        first = next(iter(ran))
        again = run.run_all({"PROFILE": "cpu", "ARTIFACTS": str(executed)}, [first])
        ran[first] = Path(again["executed"]) / first.name
    ran[quickstart] = executed / quickstart.name
    for path, source in ran.items():
        clean_notebook(source, path)
    (ROOT / "docs" / "method.png").write_bytes(show.picture(show.method()).data)
    print("notebooks/ now holds the outputs of these runs")


if __name__ == "__main__":
    raise SystemExit(exit_code(refresh))
