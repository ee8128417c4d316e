"""Does it work with Colab's versions? `python benchmarks/colab.py [stand-in|page]`; `make colab` tests with it.

An environment with the versions that Colab has; a notebook's first cell as it stands, except that the package comes
from this checkout; then every notebook in the `smoke` profile, each in a session of its own and in an empty folder, run
by the kernel of that environment. It has no GPU, no Drive and no page of Colab's: it shows that the versions fit.
"""

from __future__ import annotations

import json
import os
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
from harness import ROOT, Record, latest, main, table
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from packaging.version import Version

LISTED = ROOT / "tests" / "colab-2026-08-19.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ADDRESS = f"git+{PROJECT['urls']['Repository']}"
ONLY = os.environ.get("COLAB_NOTEBOOKS", "").split()  # numbers, as "00 05 06"; empty: all
NOTEBOOKS = [path for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if not ONLY or path.name[:2] in ONLY]
SMOKE = 'PROFILE = "smoke"\n'
NEEDS_ADAPTER = "06_compare"  # the one notebook that cannot run first
TRAINS = f"{NEEDS_ADAPTER} with TRAIN_IF_MISSING"
HELD = "a session that held pandas"
#: What must stop, and a part of what it says.
STOPS = {NEEDS_ADAPTER: "There is no trained adapter", HELD: "SessionError"}


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


def rehearse(colab: Colab, record: Record) -> None:
    """Run everything and record it: what the tests judge and the page shows.

    Lines are `packages`, before and after; one per notebook, as `Session.run_notebook` returns it; `HELD`, the same for
    a session that had imported pandas before the package was installed; `where pip fails`, what the first cell ends in
    there; and `the embedded model`, the error of taking it out of its wheel, or None.
    """

    def write(name: str, **values) -> None:
        record.write("stand-in", name, **values)

    def ran(session: Session, path: Path, name: str, parameters: str = "") -> None:
        write(name, **session.run_notebook(path, SMOKE + parameters))

    def alone(path: Path, name: str, parameters: str = "") -> None:
        with colab.session(name) as session:
            ran(session, path, name, parameters)

    first, *others = NOTEBOOKS
    with colab.session(first.stem) as session:
        with colab.session("held") as early:
            assert early.run("import pandas") is None
            refused = early.run(first_cell(first, (colab.folder / "nowhere").as_uri())) or ""
            write("where pip fails", said=refused.splitlines()[-1:])
            error = session.run(first_cell(first, colab.checkout.as_uri()))  # installs; its notebook goes on below
            assert error is None, error
            said = subprocess.run([colab.python, "-V"], stdout=subprocess.PIPE, text=True, check=True).stdout
            write("packages", python=said.split()[1], before=colab.before, changes=colab.changes())
            write(HELD, **early.run_notebook(others[0]))
        convert = "from dpo_tutorial.loading import embedded; embedded.ensure_embedded_model()"
        write("the embedded model", error=session.run(convert))
        with ThreadPoolExecutor(2) as pool:  # each uses one thread
            needs = ROOT / "notebooks" / f"{NEEDS_ADAPTER}.ipynb"
            jobs = [pool.submit(alone, path, path.stem) for path in reversed(others)]  # the longest are the last two
            jobs += [pool.submit(alone, needs, TRAINS, "TRAIN_IF_MISSING = True\n")]
            jobs += [pool.submit(ran, session, first, first.stem)]
            for job in jobs:
                job.result()


def newest(lines: list[dict]) -> dict[str, dict]:
    """The newest rehearsal's lines by name."""
    return {name: line for name, (line,) in latest(lines, "stand-in")[1].items()}


def passed(name: str, found: dict) -> bool:
    """Whether a notebook did what it should: some must stop and say why, any other runs to its end."""
    return STOPS[name] in (found["error"] or "") if name in STOPS else not found["error"]


def tables(lines: list[dict]) -> dict[str, str]:
    found = newest(lines)
    packages, rows = found["packages"], []
    before, changes = packages["before"], packages["changes"]
    for name, line in sorted(found.items()):
        if "seconds" in line:
            ended = "passed" if passed(name, line) else "FAILED"
            said = f"{ended}, stops at code cell {line['cell']}: {' '.join((line['error'] or '').split())[-600:]}"
            rows.append([name, f"{line['seconds']:.0f}", said if line["error"] else ended])
    gone = ", ".join(sorted(changes["downgraded"] | changes["removed"])) or "none"
    now = [packages["python"], before["torch"], before["numpy"], len(changes["added"]), gone]
    upgraded = [[name, *versions] for name, versions in sorted(changes["upgraded"].items())]
    return {
        "versions": table(["Python", "torch", "numpy", "packages added", "downgraded or removed"], [now]),
        "upgraded": table(["upgraded", "from", "to"], upgraded),
        "notebooks": table(["notebook", "seconds", "result"], rows),
    }


def stand_in(record: Record, options) -> None:
    """Build the stand-in in a temporary folder and run everything in it."""
    with tempfile.TemporaryDirectory(prefix="colab-") as folder:
        rehearse(Colab(Path(folder), options.python, options.torch), record)


def options(parser) -> None:
    parser.add_argument("--python", default=sys.executable, help="interpreter to build it with")
    parser.add_argument("--torch", default=tested_torch(), help="version of torch to build it with")


if __name__ == "__main__":
    ran = newest(main(__file__, {"stand-in": stand_in}, tables, options=options))
    changed = ran["packages"]["changes"]
    fine = all(passed(name, line) for name, line in ran.items() if "seconds" in line)
    raise SystemExit(0 if fine and not changed["downgraded"] and not changed["removed"] else 1)
