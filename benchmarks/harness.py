"""What every benchmark shares: child processes, turns, a record that is written as it goes, and tables made from it.

A record, `NAME.jsonl`, has a line per measurement: `stage` and `name` say of what, `at` when, the rest is what was
measured. Each run of a stage begins with a line named `machine`. Its tables stand in `NAME.md` between two marks,
`<!-- table -->` and `<!-- end of table -->`; the sentences around them are written by hand.

Nothing heavy is imported here: a child's peak memory counts from its parent's size on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
QUIET = {"TOKENIZERS_PARALLELISM": "false", "DPO_TUTORIAL_HEADLESS": "1"}


def command(word: str, **parameters) -> list[str]:
    """The package's command as a list of words; parameters as `docs/parameters.md` names them."""
    named = [part for name, value in parameters.items() for part in ("-p", name, str(value))]
    return [sys.executable, "-m", "dpo_tutorial", word, *named]


# --- measuring ------------------------------------------------------------------------------------------------------


def child(script: str | Path, task: dict, env: dict[str, str] | None = None) -> dict:
    """Have `script` do a task in a process of its own; `answer` is the other end.

    Raises:
        SystemExit: it failed; with the task and the end of what it said.
    """
    words = [sys.executable, str(HERE / script), "--task", json.dumps(task)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | QUIET | (env or {}))
    if done.returncode:
        raise SystemExit(f"{task}\n{done.stderr[-4000:]}")
    (result,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(result.removeprefix("RESULT "))


def answer(kinds: dict[str, Callable[[dict, Path], dict]]) -> None:
    """In a child: do the task of the command line, in a temporary folder, by the function that its `kind` names."""
    task = json.loads(sys.argv[sys.argv.index("--task") + 1])
    with tempfile.TemporaryDirectory() as folder:
        print("RESULT " + json.dumps(kinds[task["kind"]](task, Path(folder))))


def turns(variants: Iterable[str], n: int) -> Iterator[tuple[int, str]]:
    """(turn, variant): A B A B. What is compared takes turns, because timings of shared machines drift."""
    names = list(variants)
    return ((turn, name) for turn in range(n) for name in names)


def in_turn(script: str | Path, record: Record, stage: str, tasks: dict[str, dict], at_once: int = 2) -> None:
    """Have tasks done, each in a process on one core, and record each as it ends; what was measured before is left out.

    Args:
        tasks: by the name of the measurement.

    Raises:
        SystemExit: one failed, as of `child`; those that had not begun are left for the next run.
    """
    done = newest(record.lines(), stage)

    def one(name: str) -> None:
        record.write(stage, name, **child(script, tasks[name], {"OMP_NUM_THREADS": "1"}))

    pool = ThreadPoolExecutor(at_once)
    try:
        list(pool.map(one, [name for name in tasks if name not in done]))
    finally:
        pool.shutdown(cancel_futures=True)


# --- records --------------------------------------------------------------------------------------------------------


class Record:
    """A file of JSON lines. Each measurement is written at once, so a run that is stopped keeps what it measured."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, stage: str, **about) -> None:
        """Write on which machine, and with which versions, the stage is run."""
        self.write(stage, "machine", **child(__file__, {"kind": "machine"}), **about)

    def write(self, stage: str, name: str, **values) -> None:
        line = {"stage": stage, "name": name, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **values}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}
        print(stage, name, str(shown)[:400], file=sys.stderr, flush=True)

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def latest(lines: list[dict], stage: str) -> tuple[dict, dict[str, list[dict]]]:
    """The newest run of a stage that measured anything: its `machine` line, and its measurements by name."""
    runs: list[tuple[dict, dict[str, list[dict]]]] = []
    for line in lines:
        if line["stage"] == stage and line["name"] == "machine":
            runs.append((line, {}))
        elif line["stage"] == stage:
            runs[-1][1].setdefault(line["name"], []).append(line)
    return next(run for run in reversed(runs) if run[1])


def newest(lines: list[dict], stage: str) -> dict[str, dict]:
    """The newest measurement by name over all runs of a stage: of one that goes on where it was stopped."""
    return {line["name"]: line for line in lines if line["stage"] == stage and line["name"] != "machine"}


def machines(lines: list[dict], stage: str) -> str:
    """The machines of all runs of a stage in words, each once."""
    found = (machine(line) for line in lines if line["stage"] == stage and line["name"] == "machine")
    return "\n\n".join(dict.fromkeys(found))


def commit() -> str:
    """Of the code that is run, with a "+" where files but records differ from it; empty outside a clone."""

    def said(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        changed = said("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/*.jsonl")
        return said("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except FileNotFoundError:  # no git
        return ""


def numbers(chosen: argparse.Namespace, parser: argparse.ArgumentParser) -> dict:
    """Options that were given and say how much is measured: numbers and switches, never a folder's name."""
    given = {name: value for name, value in vars(chosen).items() if value not in (parser.get_default(name), [])}
    some = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    return {name: given[name] for name, value in some.items() if all(isinstance(v, int | float) for v in value)}


def machine_task(task: dict, folder: Path) -> dict:
    from dpo_tutorial.machine import hardware, session

    libc = " ".join(platform.libc_ver())
    return {"hardware": hardware.hardware(), "libc": libc, "versions": session.versions()}


# --- tables ---------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table; cells are written as they are."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def machine(line: dict, packages: Iterable[str] = ("torch", "transformers", "trl", "peft", "bitsandbytes")) -> str:
    """A `machine` line in words."""
    hardware, versions = line["hardware"], ", ".join(f"{name} {line['versions'][name]}" for name in packages)
    bf16 = hardware.get("cpu_bf16") or "without bfloat16"
    if "cpu_bf16_speedup" in hardware:  # of records made while the compute type went by a measured speed
        bf16 = f"matrices multiplied {hardware['cpu_bf16_speedup']} times as fast in bfloat16 as in float32"
    cpu = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']:g} GiB, {bf16}"
    cpu += f", {line['libc']}" if "libc" in line else ""
    return f"{hardware.get('gpu') or cpu}; {versions}."


def median(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def spread(values: list[float], digits: int = 1) -> str:
    """Median (least to most); of a single value, that."""
    middle, *ends = (f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({' to '.join(ends)})"


def interval(rate: dict, digits: int = 2) -> str:
    """A rate with its 95% interval; without one where the rate is a constant, as that of a base beside itself."""
    if rate["low"] == rate["high"]:
        return f"{rate['rate']:.{digits}f}"
    return f"{rate['rate']:.{digits}f} ({rate['low']:.{digits}f} to {rate['high']:.{digits}f})"


def signed(change: dict, digits: int = 2) -> str:
    """A difference with its 95% interval, as `stats.paired_difference` gives it."""
    difference, low, high = (f"{change[name]:+.{digits}f}" for name in ("difference", "low", "high"))
    return f"{difference} ({low} to {high})"


def with_tables(text: str, tables: dict[str, str]) -> str:
    """A page with each table between its marks.

    Raises:
        ValueError: a mark is missing.
    """
    for name, made in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        _, after = rest.split(end)
        text = f"{before}{start}\n{made}\n{end}{after}"
    return text


UNMEASURED = "Not measured yet."  # what stands between two marks until there is a record


def image(figure, path: str) -> str:
    """A figure of `show.figures` in Markdown, its alt text included; `path` is from the page."""
    return f"![{figure.get_label()}]({path})"


# --- the command line of a benchmark --------------------------------------------------------------------------------


def main(
    script: str,
    stages: dict[str, Callable],
    tables: Callable[[list[dict]], dict[str, str]],
    kinds: dict[str, Callable] | None = None,
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    argv: list[str] | None = None,
    figures: Callable[[list[dict]], dict] = lambda lines: {},
    page: str = "",
) -> list[dict]:
    """`python benchmarks/SCRIPT.py [STAGE …] [page]`: run the stages, then write the page's tables.

    Args:
        stages: by name; each is called with the record and the parsed options.
        tables: from all lines of the record, the page's tables by their marks.
        kinds: what a child of this script can be asked for; see `answer`.
        options: adds what the stages want to know to the parser.
        figures: from all lines of the record, the page's figures by their path from the page; they are written as PNG.
        page: path of the page from the folder of the record, where it is not NAME.md in it.

    Returns:
        All lines of the record.
    """
    if "--task" in (argv or sys.argv):
        answer(kinds or {})
        raise SystemExit
    said = sys.modules["__main__"].__doc__
    parser = argparse.ArgumentParser(description=said, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=[*stages, "page", []], help="default: all of them")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of record and page")
    options(parser)
    chosen = parser.parse_args(argv)
    name = Path(script).stem
    record, where = Record(chosen.out / f"{name}.jsonl"), chosen.out / (page or f"{name}.md")
    measured = [stage for stage in chosen.stages or stages if stage != "page"]
    about = {"commit": commit(), "options": numbers(chosen, parser)} if measured else {}
    for stage in measured:
        record.begin(stage, **about)
        stages[stage](record, chosen)
    if where.exists():
        where.write_text(with_tables(where.read_text(encoding="utf-8"), tables(record.lines())), encoding="utf-8")
        for path, figure in figures(record.lines()).items():
            from dpo_tutorial.show.figures import picture

            (where.parent / path).parent.mkdir(exist_ok=True)
            (where.parent / path).write_bytes(picture(figure).data)
    return record.lines()


if __name__ == "__main__":
    answer({"machine": machine_task})
