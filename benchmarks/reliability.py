"""What happens when things break? `python benchmarks/reliability.py [kills|checkpoint|faults|page]`, ten minutes.

kills       the slow-marked test that sends 20 SIGKILLs to a training and compares the adapter with an undisturbed one
checkpoint  what one checkpoint costs beside one step of the `cpu` profile
faults      each fault as a new user would meet it, with the sentence that the command ends in
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
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock
from harness import ROOT, Record, child, command, latest, machine, main, table

# --- kills and checkpoints ------------------------------------------------------------------------------------------


def kills(record: Record, options) -> None:
    chosen = ["-q", "-s", "-o", "addopts=", "-m", "slow", "tests/end_to_end/test_resume.py"]
    words = [sys.executable, "-m", "pytest", *chosen]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"kills"')]
    record.write("kills", "kills", **json.loads(line))


def checkpoint(record: Record, options) -> None:
    record.write("checkpoint", "checkpoint", **child(__file__, {"kind": "checkpoint", "profile": "cpu"}))


def measure_checkpoint(task: dict, folder: Path) -> dict:
    """Four steps of a profile with a checkpoint after each: seconds of a step and of a checkpoint, and its size."""
    import trainings
    from transformers import TrainerCallback

    from dpo_tutorial import config, knobs, run_folder
    from dpo_tutorial.loading import models
    from dpo_tutorial.pairs import prepare
    from dpo_tutorial.training import checkpoints, resume

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

    given = {"max_steps": 4, "save_steps": 1, "artifacts": str(folder)} | task.get("knobs", {})
    cfg = config.resolve(profile=task["profile"], **given)
    run, tokenizer = run_folder.Run(cfg), models.load_tokenizer(cfg)
    rows = prepare.prepare(cfg, tokenizer).splits["train"]
    base, trainer_folder = models.load_base(cfg), checkpoints.folder(run)
    trainer = trainings.our_trainer(cfg, base, tokenizer, rows, None, trainer_folder, save_strategy="steps")
    clock, began = Clock(), time.perf_counter()
    checkpoints.fingerprint(cfg, trainer)
    fingerprint = time.perf_counter() - began
    trainer.add_callback(clock)
    resume.resume_or_start(trainer, cfg, run)
    size = sum(p.stat().st_size for p in checkpoints.saved(run)[0].rglob("*") if p.is_file())
    run.unlock()
    return {
        "step seconds": [round(s, 2) for s in clock.steps],
        "seconds between steps, a checkpoint in each": [round(s, 2) for s in clock.between],
        "fingerprint seconds, once": round(fingerprint, 2),
        "checkpoint MB": round(size / 1e6, 1),
        "save_steps of the profile": knobs.PROFILES[task["profile"]].get("save_steps", knobs.Config().save_steps),
    }


# --- faults ---------------------------------------------------------------------------------------------------------


def row(i: int, **changes) -> dict:
    ask = {"role": "user", "content": f"Question {i}?"}
    sides = {side: [ask, {"role": "assistant", "content": f"The {side} answer."}] for side in ("chosen", "rejected")}
    return {"prompt": f"Question {i}?", "score_chosen": 8.0, "score_rejected": 3.0} | sides | changes


def sources(folder: Path) -> None:
    """What the faults read."""
    (folder / "pairs.csv").write_text("prompt,chosen\nHello,Hi\n", encoding="utf-8")
    (folder / "broken.whl").write_bytes(b"not a wheel")
    (folder / "file").write_text("", encoding="utf-8")
    for name, rows in {
        "other": [{"question": "Hello?", "answer": "Hi."}],
        "ties": [row(i, score_rejected=8.0) for i in range(20)],
        "one_tie": [row(i, score_rejected=8.0 if i == 0 else 3.0) for i in range(40)],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def small_files() -> None:
    """No file of this process may pass 3 MB: the kernel refuses as on a full disk, in the middle of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))


def stop_after_first_checkpoint(folder: Path) -> None:
    """SIGKILL a training once its first checkpoint is whole."""
    words = command("train", PROFILE="smoke", SAVE_STEPS=1, ARTIFACTS=folder / "artifacts")
    training = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while training.poll() is None and not list(folder.glob("artifacts/smoke/trainer/checkpoint-1/whole.json")):
        time.sleep(0.01)
    training.send_signal(signal.SIGKILL)
    assert training.wait() == -signal.SIGKILL, "it was done before it could be killed"


def fault(folder: Path, word: str, parameters: dict, code: int = 1, environ: dict | None = None, **popen) -> dict:
    """Run a command that must end with that exit code; returns `command`, `exit code` and what it `says`."""
    words = command(word, **{"PROFILE": "smoke", "ARTIFACTS": folder / "artifacts"} | parameters)
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, env=os.environ | (environ or {}), **popen
    )  # fmt: skip
    assert done.returncode == code, f"{words}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    if code:
        assert "Traceback" not in done.stderr and "Fix:" in done.stderr, done.stderr
        said = done.stderr[done.stderr.rindex("Error: ") + 7 :].partition("\n\n")[0]  # a bar may follow
    else:
        (said,) = [line for line in done.stdout.splitlines() if line.startswith("Resuming")]
    shown = " ".join([word, *(f"-p {n} {v}" for n, v in parameters.items())])
    shown, said = (v.replace(f"{folder}/", "").replace(str(ROOT), ".").strip() for v in (shown, said))
    return {"command": shown, "exit code": done.returncode, "says": said}


def each_fault(folder: Path) -> Iterator[tuple[str, dict]]:
    def run(**parameters) -> dict:
        return fault(folder, "run", parameters)

    def train(**parameters) -> dict:
        return fault(folder, "train", parameters)

    sources(folder)
    nowhere = "http://127.0.0.1:9"  # the discard port: nothing answers
    no_hub = {"HF_ENDPOINT": nowhere, "HF_HOME": str(folder)}
    fresh = {"DPO_TUTORIAL_CACHE": str(folder / "cache")}
    no_index = fresh | {"PIP_INDEX_URL": nowhere, "PIP_RETRIES": "0"}
    yield "a table without rejected answers", run(DATA=folder / "pairs.csv")
    yield "columns of another schema", run(DATA=folder / "other.jsonl")
    yield "no such file", run(DATA=folder / "nothing.jsonl")
    yield "every pair tied", train(DATA=folder / "ties.jsonl")
    yield "one bad row and STRICT", train(DATA=folder / "one_tie.jsonl", STRICT="True")
    yield "a misspelt parameter", run(BTA="0.1")
    yield "an unknown profile", run(PROFILE="t5")
    yield "a value out of range", run(BETA="-1")
    yield "no such model folder", run(MODEL="./my-model")
    yield "the hub is down", fault(folder, "run", {"PROFILE": "t4"}, environ=no_hub)
    yield "the package index is down", fault(folder, "run", {}, environ=no_index)
    wheel = fresh | {"DPO_TUTORIAL_WHEEL": str(folder / "broken.whl")}
    yield "a damaged wheel", fault(folder, "run", {}, environ=wheel)
    yield "results into a place that cannot be written", run(ARTIFACTS=folder / "file" / "here")
    full = fault(folder, "train", {"SAVE_STEPS": "1"}, preexec_fn=small_files)
    yield "the disk fills up while a checkpoint is written", full
    with FileLock(folder / "artifacts" / "smoke" / ".training.lock"):
        yield "a second training in the same folder", train()
    with FileLock(folder / "artifacts" / "smoke" / ".notebooks.lock"):
        yield "a second run in the same folder", run()
    stop_after_first_checkpoint(folder)
    yield "killed, then another beta", train(BETA="0.3")
    yield "killed, then run again", fault(folder, "train", {}, code=0)


def faults(record: Record, options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, found in each_fault(Path(folder)):
            record.write("faults", name, **found)


# --- tables ---------------------------------------------------------------------------------------------------------


def tables(lines: list[dict]) -> dict[str, str]:
    found = latest(lines, "kills")[1]
    (run,) = found["kills"]
    hits = [kill["hit"] for kill in run["kills"]]
    same = ["yes" if run[of] else "NO" for of in ("same adapter", "same history")]
    head = ["steps", "kills", "of them while a checkpoint was written", "same adapter, bit for bit",
            "same loss and rewards of every step", "seconds in all"]  # fmt: skip
    killed = table(head, [[run["steps"], len(hits), hits.count("write"), *same, run["seconds"]]])

    (cost,) = latest(lines, "checkpoint")[1]["checkpoint"]
    step = statistics.mean(cost["step seconds"][1:])
    save = statistics.mean(cost["seconds between steps, a checkpoint in each"])
    every = cost["save_steps of the profile"]
    head = ["seconds of a step", "of a checkpoint", "MB of a checkpoint", "steps between two", "share of the training",
            "seconds of the fingerprint, once"]  # fmt: skip
    row = [f"{step:.1f}", f"{save:.2f}", cost["checkpoint MB"], every, f"{save / (every * step):.1%}",
           cost["fingerprint seconds, once"]]  # fmt: skip

    rows = []
    for name, (met,) in latest(lines, "faults")[1].items():
        said = "<br>".join(part.strip().replace("|", "\\|") for part in met["says"].splitlines() if part.strip())
        rows.append([name, f"`{met['command']}`", met["exit code"], said])
    stages = {"Kills and checkpoint": "kills", "Faults": "faults"}
    on = [f"{what}: {machine(latest(lines, stage)[0])}" for what, stage in stages.items()]
    return {
        "kills": killed, "checkpoint": table(head, [row]),
        "faults": table(["fault", "command", "exit", "what it says"], rows), "machine": "\n\n".join(on),
    }  # fmt: skip


STAGES = {"kills": kills, "checkpoint": checkpoint, "faults": faults}

if __name__ == "__main__":
    main(__file__, STAGES, tables, kinds={"checkpoint": measure_checkpoint})
