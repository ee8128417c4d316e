"""What does a GPU do? `python benchmarks/gpu.py A B C D page`; eight minutes a stage are the aim.

A  no trained model needed: the tests marked gpu, the doctor, five steps in fp16 and bf16, predicted and measured memory
B  speed: ours beside stock TRL on random weights of the GPU profiles' shapes, one part changed, one step's profile
C  the notebooks, executed: the embedded model, and UltraFeedback rows in fp16
D  UltraFeedback: the embedded model trained on all rows at hand, each row held out once, several rates and seeds

B and D, and C where it can, read the rows of the folder that ULTRAFEEDBACK_SAMPLE names, laid out as the hub serves it.
A stage that is stopped has written what it measured. `--tiny` takes tiny shapes, for a test without a GPU.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_first
import gpu_speed
import gpu_ultrafeedback
import harness
import torch
from harness import ROOT, Record, command

from dpo_tutorial import knobs
from dpo_tutorial.machine import paths

MODULES = (gpu_first, gpu_speed, gpu_ultrafeedback)
EXECUTED = "executed"  # folder beside the record, for the notebooks of stage C


def stage_c(record: Record, options) -> None:
    """The notebooks as `make run` executes them, side by side; copies go into `executed/` beside the record."""
    keep = record.path.parent / EXECUTED
    keep.mkdir(parents=True, exist_ok=True)
    if options.tiny:
        side_by_side(record, keep, {"smoke": ("smoke", command("run", PROFILE="smoke", ARTIFACTS=keep / "smoke"))})
        return
    sample = os.environ.get("ULTRAFEEDBACK_SAMPLE") or knobs.EMBEDDED
    embedded, fp16, quickstart = (keep / name for name in ("embedded", "ultrafeedback-fp16", "quickstart"))
    t4 = {"MAX_TOKENS": 512, "MAX_TRAIN": 600, "DTYPE": "fp16"}
    page = [sys.executable, "-m", "papermill", "-k", "python3", str(ROOT / "notebooks" / "00_quickstart.ipynb")]
    page += [str(quickstart / "00_quickstart.ipynb"), "-r", "MODEL", knobs.EMBEDDED, "-r", "DATA", knobs.EMBEDDED]
    runs = {
        embedded.name: ("embedded model and pairs", command("run", PROFILE="cpu", ARTIFACTS=embedded)),
        fp16.name: (
            "UltraFeedback rows, fp16 as on a T4 (not a T4)",
            command("run", PROFILE="cpu", DATA=sample, ARTIFACTS=fp16, **t4),
        ),
        quickstart.name: ("quickstart", [*page, "-r", "ARTIFACTS", str(quickstart)]),
    }
    side_by_side(record, keep, runs)


def side_by_side(record: Record, keep: Path, runs: dict[str, tuple[str, list[str]]]) -> None:
    """Run commands at once, and record each as it ends: exit code, minutes, last lines, and what it saved of itself.

    Args:
        keep: where the output of each goes; results are looked for in the folder that has the run's name.
        runs: (name of the measurement, command) by folder.
    """
    started, going = time.perf_counter(), {}
    for folder, (_, words) in runs.items():
        (keep / folder).mkdir(exist_ok=True)
        with (keep / f"{folder}.log").open("w") as log:
            going[folder] = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    while going:
        for folder in [f for f, process in going.items() if process.poll() is not None]:
            found = {"code": going.pop(folder).returncode, "minutes": (time.perf_counter() - started) / 60}
            for name, wanted in (("summary", None), ("training", ("seconds", "peak_memory_gib"))):
                if file := next((keep / folder).rglob(f"{name}.json"), None):
                    values = json.loads(file.read_text())
                    found[name] = {k: values[k] for k in wanted or values if k not in ("adapter", "executed")}
            said = (keep / f"{folder}.log").read_text().splitlines()[-15:]
            record.write("C", runs[folder][0], **found, said=[paths.without_paths(x)[-300:] for x in said])
        time.sleep(0.5)


def tables(lines: list[dict]) -> dict[str, str]:
    return {name: made for module in MODULES for name, made in module.tables(lines).items()}


def options(parser) -> None:
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a test without a GPU")
    parser.add_argument("--shapes", nargs="*", choices=list(gpu_speed.trainings.SHAPES), help="of stage B")
    parser.add_argument("--trainers", nargs="*", choices=list(gpu_speed.TRAINERS), help="of stage B")
    parser.add_argument("--pairs", type=int, default=48, help="pairs of each training of stage B")
    parser.add_argument("--rounds", type=int, default=2, help="stage B measures stock and ours so often, in turn")
    parser.add_argument("--lengths", nargs="*", type=int, default=[512, 1024], help="stage B: pairs so long, in tokens")
    parser.add_argument("--workers", type=int, default=1, help="processes of stage D")
    parser.add_argument("--seeds", nargs="*", type=int, help="of stage D; default: 42, 1, 2")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stages B and D begin no training after so many"
    )


STAGES = {"A": gpu_first.stage_a, "B": gpu_speed.stage_b, "C": stage_c, "D": gpu_ultrafeedback.stage_d}


def main(argv: list[str]) -> None:
    if not torch.cuda.is_available() and "--tiny" not in argv and argv != ["page"]:
        raise SystemExit("No CUDA device here. --tiny runs every stage on tiny shapes.")
    harness.main(__file__, STAGES, tables, options=options, argv=argv)


if __name__ == "__main__":
    main(sys.argv[1:])
