"""A stopped training goes on where it was: whole checkpoints, refusals, locks, full disks, and SIGKILL."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import pair
from datasets import Dataset
from transformers import LlamaForCausalLM, TrainerCallback

from dpo_tutorial import config, run_folder
from dpo_tutorial.cli import run
from dpo_tutorial.errors import ArtifactError
from dpo_tutorial.loading import models
from dpo_tutorial.machine import hardware
from dpo_tutorial.pairs import encoding, row_checks
from dpo_tutorial.training import checkpoints, resume, save, train

pytestmark = pytest.mark.end_to_end


@pytest.fixture
def many(tokenizer) -> Dataset:
    """11 prepared pairs of different lengths: an odd last batch."""
    rows = []
    for i in range(11):
        row = row_checks.extract(pair(f"Question {i}?", f"It is {i}." * (1 + i % 5), f"Great question! It is {i}!"))
        ids = {side: encoding.encode(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")}
        counts = {f"{side}_tokens": len(answer) for side, (_, answer) in ids.items()}
        rows.append(row | counts | {"prompt_tokens": len(ids["chosen"][0])})
    return Dataset.from_list(rows)


@pytest.fixture
def cfg(cfg, tiny_folder, tmp_path):
    """Six steps in three epochs, a checkpoint after each, and a model folder of this test's own."""
    own = shutil.copytree(tiny_folder, tmp_path / "tiny-llama")
    return dataclasses.replace(cfg, model=str(own), max_steps=6, grad_accum=3, save_steps=1)


class At(TrainerCallback):
    """Do something at the end of a step."""

    def __init__(self, step, action) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.action()


def interrupt():
    raise KeyboardInterrupt


def build(cfg, run, tokenizer, pairs):
    few = pairs.select(range(2))
    folder = checkpoints.folder(run)
    return train.build_trainer(cfg, models.load_base(cfg), tokenizer, pairs, few, folder, save_strategy="steps")


def stopped(cfg, tokenizer, pairs, action=interrupt, error=KeyboardInterrupt) -> run_folder.Run:
    """A run that is stopped inside its fourth step, before its checkpoint."""
    run = run_folder.Run(cfg)
    trainer = build(cfg, run, tokenizer, pairs)
    trainer.add_callback(train.Progress(run.dir / "progress.jsonl"))
    trainer.add_callback(At(4, action))
    with pytest.raises(error):
        resume.resume_or_start(trainer, cfg, run)
    return run


_interrupted = []


@pytest.fixture
def interrupted(cfg, tokenizer, many, tmp_path_factory) -> run_folder.Run:
    """A run that was interrupted; the same files for every test, so trained once and copied."""
    if not _interrupted:
        kept = dataclasses.replace(cfg, artifacts=str(tmp_path_factory.mktemp("interrupted")))
        _interrupted.append(stopped(kept, tokenizer, many).dir)
    run = run_folder.Run(cfg)
    shutil.copytree(_interrupted[0], run.dir, dirs_exist_ok=True)
    return run


def again(cfg, tokenizer, pairs):
    return train.train(cfg, run_folder.Run(cfg), models.load_base(cfg), tokenizer, pairs, pairs.select(range(2)))


def weights(run):
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def names(run):
    return [path.name for path in checkpoints.saved(run)]


_undisturbed = []


@pytest.fixture
def undisturbed(cfg, tokenizer, many, tmp_path):
    """The adapter's bytes after an undisturbed training; the same for every test, so trained once."""
    if not _undisturbed:
        run = run_folder.Run(dataclasses.replace(cfg, artifacts=str(tmp_path / "undisturbed")))
        again(run.config, tokenizer, many)
        _undisturbed.append(weights(run))
    return _undisturbed[0]


# --- resuming -----------------------------------------------------------------------------------------------------


def test_checkpoints_change_nothing_about_the_training(cfg, tokenizer, many, undisturbed, tmp_path):
    run = run_folder.Run(cfg)
    trainer = build(cfg, run, tokenizer, many)
    trainer.args.save_strategy = "no"
    hardware.seed_everything(cfg.seed)
    trainer.train()
    assert names(run) == []
    save.save_adapter(cfg, run, trainer, tokenizer, 1.0)
    assert weights(run) == undisturbed


def test_a_stopped_training_resumes_by_itself_and_says_so_in_one_line(
    cfg, tokenizer, many, interrupted, undisturbed, capsys
):
    assert names(interrupted) == ["checkpoint-3", "checkpoint-2"], "the last two"
    capsys.readouterr()
    trainer = again(cfg, tokenizer, many)
    said = [line for line in capsys.readouterr().out.splitlines() if "checkpoint-" in line]
    assert said == ["Resuming after step 3 of 6, from checkpoint-3."]
    assert weights(interrupted) == undisturbed
    assert [row["step"] for row in save.history(trainer)["train"]] == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line) for line in (interrupted.dir / "progress.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_a_trainer_that_was_interrupted_goes_on_when_its_cell_is_run_again(cfg, tokenizer, many, undisturbed):
    run = run_folder.Run(cfg)
    trainer = build(cfg, run, tokenizer, many)
    stop = At(4, interrupt)
    trainer.add_callback(stop)
    with pytest.raises(KeyboardInterrupt):
        resume.resume_or_start(trainer, cfg, run)
    trainer.remove_callback(stop)
    save.save_adapter(cfg, run, trainer, tokenizer, resume.resume_or_start(trainer, cfg, run))
    assert weights(run) == undisturbed


def test_a_trainer_that_has_trained_without_a_checkpoint_does_not_pass_for_a_fresh_one(cfg, tokenizer, many):
    rarely = dataclasses.replace(cfg, save_steps=100)
    run = run_folder.Run(rarely)
    trainer = build(rarely, run, tokenizer, many)
    trainer.add_callback(At(2, interrupt))
    with pytest.raises(KeyboardInterrupt):
        resume.resume_or_start(trainer, rarely, run)
    with pytest.raises(ArtifactError, match="already trained 2 steps") as caught:
        resume.resume_or_start(trainer, rarely, run)
    assert "Restart" in caught.value.fix


def test_a_stop_between_the_last_step_and_saving_costs_no_step(cfg, tokenizer, many, undisturbed):
    run = run_folder.Run(cfg)
    seconds = resume.resume_or_start(build(cfg, run, tokenizer, many), cfg, run)
    run.unlock()  # as when the process ends
    trainer = build(cfg, run, tokenizer, many)
    assert resume.resume_or_start(trainer, cfg, run) == pytest.approx(seconds, abs=0.5)
    assert trainer.state.global_step == 6 and save.history(trainer)["eval"]
    save.save_adapter(cfg, run, trainer, tokenizer, seconds)
    assert weights(run) == undisturbed


def test_after_a_finished_training_the_next_one_starts_anew(cfg, tokenizer, many, capsys):
    run = run_folder.Run(cfg)
    for _ in range(2):
        trainer = again(cfg, tokenizer, many)
        assert names(run) == []
        assert len(save.history(trainer)["train"]) == 6
    assert "Resuming" not in capsys.readouterr().out


def test_seconds_count_those_before_the_stop(cfg, tokenizer, many, interrupted):
    first = checkpoints.saved(interrupted)[0]
    seal = checkpoints.read_seal(first)
    interrupted.write_json(first.relative_to(interrupted.dir) / checkpoints.SEAL, seal | {"seconds": 1000.0})
    again(cfg, tokenizer, many)
    assert 1000 < save.read_training_record(interrupted.adapter)["seconds"] < 1100


def unsealed(checkpoint):
    (checkpoint / checkpoints.SEAL).unlink()


def cut_short(checkpoint):
    path = checkpoint / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-10])


def flipped(checkpoint):
    path = checkpoint / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def file_gone(checkpoint):
    (checkpoint / "scheduler.pt").unlink()


def seal_damaged(checkpoint):
    (checkpoint / checkpoints.SEAL).write_text("[]")


@pytest.mark.parametrize("harm", [unsealed, cut_short, flipped, file_gone, seal_damaged])
def test_a_torn_checkpoint_is_passed_over_and_removed(cfg, tokenizer, many, interrupted, undisturbed, capsys, harm):
    harm(checkpoints.saved(interrupted)[0])
    capsys.readouterr()
    again(cfg, tokenizer, many)
    said = capsys.readouterr().out
    assert "torn by a stop: checkpoint-3." in said and "Resuming after step 2 of 6" in said
    assert weights(interrupted) == undisturbed


def test_with_nothing_but_torn_checkpoints_training_starts_over(cfg, tokenizer, many, interrupted, undisturbed, capsys):
    for checkpoint in checkpoints.saved(interrupted):
        unsealed(checkpoint)
    again(cfg, tokenizer, many)
    assert "Resuming" not in capsys.readouterr().out
    assert weights(interrupted) == undisturbed


def test_the_adapter_of_a_checkpoint_is_safetensors(cfg, tokenizer, many, interrupted):
    saved = {path.name for path in checkpoints.saved(interrupted)[0].iterdir()}
    assert "adapter_model.safetensors" in saved and "adapter_model.bin" not in saved


# --- refusing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(learning_rate=0.5), r"LEARNING_RATE \(0.01, now 0.5\)"),
        (dict(max_steps=8), "MAX_STEPS"),
        (dict(seed=1), "SEED"),
        (dict(loss_type="ipo", beta=0.2), "BETA .*LOSS_TYPE"),
    ],
)
def test_a_changed_config_refuses_to_resume_and_names_what_changed(cfg, tokenizer, many, interrupted, change, named):
    before = names(interrupted)
    with pytest.raises(ArtifactError, match=named) as caught:
        again(dataclasses.replace(cfg, **change), tokenizer, many)
    assert "FRESH=True" in caught.value.fix and "set these back" in caught.value.fix and "ARTIFACTS" in caught.value.fix
    assert names(interrupted) == before, "the refused run leaves the checkpoints"
    assert not interrupted.adapter.exists()
    again(cfg, tokenizer, many)


def test_changed_pairs_refuse_to_resume(cfg, tokenizer, many, interrupted):
    with pytest.raises(ArtifactError, match="Changed: the training pairs[.]"):
        again(cfg, tokenizer, many.select(reversed(range(len(many)))))


def test_another_base_in_the_same_folder_refuses_to_resume(cfg, tokenizer, many, interrupted):
    model = LlamaForCausalLM.from_pretrained(cfg.model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
    model.save_pretrained(cfg.model)
    with pytest.raises(ArtifactError, match="Changed: the weights or the config of the base model[.]"):
        again(cfg, tokenizer, many)


def test_the_same_weights_with_another_config_refuse_to_resume(cfg, tokenizer, many, interrupted):
    path = Path(cfg.model) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))
    with pytest.raises(ArtifactError, match="the weights or the config of the base model[.]"):
        again(cfg, tokenizer, many)


def test_a_model_and_data_that_have_moved_are_the_same(
    cfg, tokenizer, many, interrupted, undisturbed, tmp_path, capsys
):
    moved = shutil.move(cfg.model, tmp_path / "moved")
    again(dataclasses.replace(cfg, model=str(moved), data="moved.jsonl"), tokenizer, many)
    assert "Resuming" in capsys.readouterr().out and weights(interrupted) == undisturbed


@pytest.mark.parametrize("change", [dict(save_steps=2), dict(max_new_tokens=9, compare_prompts=3)])
def test_what_the_adapter_does_not_depend_on_may_change(cfg, tokenizer, many, interrupted, undisturbed, capsys, change):
    again(dataclasses.replace(cfg, **change), tokenizer, many)
    assert "Resuming" in capsys.readouterr().out
    assert weights(interrupted) == undisturbed


def test_a_resumed_training_keeps_to_the_new_save_steps(cfg, tokenizer, many, interrupted):
    changed = dataclasses.replace(cfg, save_steps=2)
    trainer = build(changed, interrupted, tokenizer, many)
    trainer.add_callback(At(6, interrupt))
    with pytest.raises(KeyboardInterrupt):
        resume.resume_or_start(trainer, changed, interrupted)
    assert names(interrupted) == ["checkpoint-4", "checkpoint-3"]


def test_fresh_starts_over_whatever_changed(cfg, tokenizer, many, interrupted, capsys):
    trainer = again(dataclasses.replace(cfg, learning_rate=0.5, fresh=True), tokenizer, many)
    assert "Resuming" not in capsys.readouterr().out
    assert len(save.history(trainer)["train"]) == 6 and names(interrupted) == []


# --- one training at a time ---------------------------------------------------------------------------------------

HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1], timeout=0):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(run, work="training"):
    """Another process holds the lock, and is killed at the end."""
    command = [sys.executable, "-c", HOLD, str(run.dir / f".{work}.lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield other.stdout.readline() == "held\n"
    finally:
        other.kill()
        other.wait()


def free(run):
    with held(run) as taken:
        return taken


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"}


def test_a_second_training_in_the_folder_is_refused_and_changes_nothing(cfg, tokenizer, many):
    again(cfg, tokenizer, many)
    run = stopped(cfg, tokenizer, many)
    before = files_of(run.dir)
    with held(run) as taken:
        assert taken
        with pytest.raises(ArtifactError, match="Another process is using .* for training") as caught:
            again(cfg, tokenizer, many)
        assert "ARTIFACTS" in caught.value.fix
        with pytest.raises(ArtifactError, match="Another process"):
            save.save_adapter(cfg, run, None, tokenizer, 1.0)
    assert files_of(run.dir) == before
    again(cfg, tokenizer, many)  # the lock went with its process


def test_a_second_run_of_the_notebooks_in_the_folder_is_refused_and_changes_nothing(cfg, monkeypatch, tmp_path):
    monkeypatch.setattr(run.models, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(run.sources, "load_preferences", lambda _: None)
    first = run_folder.Run(config.resolve(profile="smoke", artifacts=str(tmp_path / "both")))
    first.write_json("executed/01_setup.ipynb", {})
    before = files_of(first.dir)
    with held(first, "notebooks") as taken:
        assert taken
        with pytest.raises(ArtifactError, match="Another process is using .* for notebooks"):
            run.run_all({"PROFILE": "smoke", "ARTIFACTS": str(tmp_path / "both")})
    assert files_of(first.dir) == before


def test_the_lock_holds_from_training_to_saving(cfg, tokenizer, many):
    run = run_folder.Run(cfg)
    trainer = build(cfg, run, tokenizer, many)
    during = []
    trainer.add_callback(At(2, lambda: during.append(free(run))))
    seconds = resume.resume_or_start(trainer, cfg, run)
    assert during == [False] and not free(run)
    run_folder.Run(cfg).lock()  # this process has it already
    save.save_adapter(cfg, run, trainer, tokenizer, seconds)
    assert free(run)


def test_a_stopped_training_gives_the_folder_free(cfg, tokenizer, many):
    assert free(stopped(cfg, tokenizer, many))


def test_where_there_are_no_locks_training_goes_on_and_says_so(cfg, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(run_folder.FileLock, "acquire", unsupported)
    run = run_folder.Run(cfg)
    run.lock()
    run.unlock()
    assert "cannot be locked ([Errno 95] Operation not supported)" in capsys.readouterr().out


def test_an_adapter_moved_away_by_a_kill_comes_back(cfg):
    run = run_folder.Run(cfg)
    for name in (".adapter-abc", ".adapter-abc-old"):
        (run.dir / name).mkdir()
        (run.dir / name / "which.txt").write_text(name)
    run.fix_adapter()
    assert (run.adapter / "which.txt").read_text() == ".adapter-abc-old"
    assert list(run.dir.glob(".adapter-*")) == []


# --- disks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_a_disk_that_refuses_a_checkpoint_is_an_error_with_a_fix(
    cfg, tokenizer, many, monkeypatch, number, undisturbed
):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    again(cfg, tokenizer, many)
    earlier = weights(run_folder.Run(cfg))
    with monkeypatch.context() as patch:
        run = stopped(cfg, tokenizer, many, action=lambda: patch.setattr(torch, "save", refuse), error=ArtifactError)
    assert names(run) == ["checkpoint-3", "checkpoint-2"], "both whole; what was torn is gone"
    assert all(checkpoints.read_seal(path) for path in checkpoints.saved(run))
    assert weights(run) == earlier
    again(cfg, tokenizer, many)
    assert weights(run) == undisturbed


@pytest.mark.parametrize("size", [1_000, 20_000, 60_000])
def test_a_file_that_the_system_cuts_off_is_an_error_with_a_fix(cfg, tokenizer, many, size):
    """A real refusal by the kernel, in the middle of whichever file comes to that size first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = run_folder.Run(cfg)
    trainer = build(cfg, run, tokenizer, many)
    trainer.add_callback(At(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))))
    try:
        with pytest.raises(ArtifactError, match="could not be written") as caught:
            resume.resume_or_start(trainer, cfg, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Free space" in caught.value.fix
    assert names(run) == ["checkpoint-3", "checkpoint-2"]
    assert all(checkpoints.read_seal(path) for path in checkpoints.saved(run))


def test_an_error_that_is_not_the_disks_stays_as_it_is(cfg, tokenizer, many):
    def bug():
        raise RuntimeError("CUDA out of memory")

    stopped(cfg, tokenizer, many, action=bug, error=RuntimeError)


# --- SIGKILL ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_a_training_killed_again_and_again_ends_with_the_adapter_of_an_undisturbed_one(
    tiny_folder, many, tmp_path, kills
):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many), encoding="utf-8")
    script = [sys.executable, str(Path(__file__).with_name("kill_training.py"))]
    arguments = [str(tiny_folder), str(tmp_path / "pairs.jsonl"), str(tmp_path), str(kills), "1"]
    done = subprocess.run(script + arguments, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found))
    assert len(found["kills"]) == kills and {k["hit"] for k in found["kills"]} == {"write", "step"}
    assert found["steps"] >= 30
    assert found["same adapter"] and found["same history"]
    assert found["left over"] == []
