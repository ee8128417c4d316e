"""What a training can be watched by: a strip of samples that changes nothing, and trackers that stay on the machine."""

import dataclasses
import importlib.util
import os
import socket
import sys

import huggingface_hub
import pytest
from transformers import TrainerCallback

from dpo_tutorial import config, run_folder, show
from dpo_tutorial.comparing import generation
from dpo_tutorial.errors import ConfigError
from dpo_tutorial.loading import models
from dpo_tutorial.training import save, tracking, train


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.fixture
def trained(cfg, tokenizer, pairs, tmp_path, monkeypatch):
    """Train four steps of 4-bit weights with a checkpoint every two; gives (run, trainer)."""

    def go(name, stop=False, **changes):
        changed = dict(max_steps=4, save_steps=2, artifacts=str(tmp_path / name)) | changes
        changed = dataclasses.replace(cfg, **changed)
        run = run_folder.Run(changed)
        with monkeypatch.context() as patch:
            if stop:
                patch.setattr(train.Progress, "on_step_begin", Stop().on_step_begin)
            return run, train.train(changed, run, models.load_base(changed), tokenizer, pairs, pairs)

    return go


def losses(trainer):
    return [(row["loss"], row["grad_norm"]) for row in save.history(trainer)["train"]]


def test_samples_come_at_the_start_and_at_each_checkpoint_and_leave_the_training_as_it_was(trained, pairs):
    _, plain = trained("plain", max_steps=5)
    run, watched = trained("watched", max_steps=5, watch_prompts=2)
    assert losses(watched) == losses(plain) and len(losses(plain)) == 5
    lines = tracking.read_samples(run)
    assert [line["step"] for line in lines] == [0, 0, 2, 2, 4, 4, 5, 5]
    at_the_end = generation.generate(run.config, watched.model, watched.processing_class, pairs["prompt"][:2], 48)
    assert [(a["text"], a["finished"]) for a in at_the_end] == [(x["answer"], x["finished"]) for x in lines[-2:]]
    assert lines[0]["answer"] != lines[-2]["answer"], "the rate is high, so the policy writes something else"
    assert (
        tracking.read_samples(run_folder.Run(plain_config := dataclasses.replace(run.config, profile="cpu"))) == lines
    )
    assert plain_config.watch_prompts == 2


def test_a_resumed_training_has_the_strip_of_one_that_was_never_stopped(trained):
    whole, _ = trained("whole", watch_prompts=1)
    with pytest.raises(KeyboardInterrupt):
        trained("stopped", watch_prompts=1, stop=True)
    resumed, _ = trained("stopped", watch_prompts=1)
    assert tracking.read_samples(resumed) == tracking.read_samples(whole)
    anew, _ = trained("stopped", watch_prompts=1, fresh=True, max_steps=2)
    assert [line["step"] for line in tracking.read_samples(anew)] == [0, 2]
    with pytest.raises(KeyboardInterrupt):
        trained("stopped", watch_prompts=1, fresh=True, stop=True)
    kept, _ = trained("stopped", watch_prompts=0)
    assert tracking.read_samples(kept), "a training that goes on keeps its lines"
    without, _ = trained("stopped", watch_prompts=0, fresh=True, max_steps=2)
    assert tracking.read_samples(without) == [], "those of an earlier training are gone"


def test_the_strip_is_a_row_per_step_and_its_text_is_escaped():
    lines = [
        {"step": step, "prompt": prompt, "answer": f"<b>{step}{prompt}", "finished": step == 0}
        for step in (0, 10)
        for prompt in ("p", "q")
    ]
    page = show.samples(lines).data
    assert page.count("<tr>") == 3 and page.count("&lt;b&gt;") == 4 and "<b>" not in page
    assert page.count("cut at the token limit") == 2


# --- trackers ----


@pytest.mark.parametrize("name", ["REPORT_TO", "WATCH_PROMPTS"])
def test_how_a_training_is_watched_is_no_part_of_what_it_is(name, cfg, monkeypatch):
    value = {"REPORT_TO": "tensorboard", "WATCH_PROMPTS": "2"}[name]
    monkeypatch.setenv(f"DPO_TUTORIAL_{name}", value)
    set_there = config.resolve(PROFILE="cpu")
    assert str(getattr(set_there, name.lower())) == value
    assert (
        set_there.identity() == dataclasses.replace(set_there, **{name.lower(): getattr(cfg, name.lower())}).identity()
    )


def test_an_unknown_tracker_is_out_of_range(cfg):
    with pytest.raises(ConfigError, match="REPORT_TO='mlflow'.*\n.*trackio"):
        dataclasses.replace(cfg, report_to="mlflow")


@pytest.mark.parametrize(
    ("name", "line"), [("trackio", "'dpo-tutorial[trackio]'"), ("tensorboard", "[tensorboard]'"), ("wandb", " wandb")]
)
def test_a_missing_tracker_says_what_to_install_before_anything_is_trained(name, line, cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError) as caught:
        train.dpo_config(dataclasses.replace(cfg, report_to=name), tmp_path)
    assert name in caught.value.cause and line in caught.value.fix and "pip install" in caught.value.fix


@pytest.fixture
def unset(monkeypatch):
    """No variable of a tracker is set, and what the training sets is undone."""
    for variable in ("TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR", "WANDB_DIR", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)


@pytest.mark.parametrize(("own", "mode"), [(None, "offline"), ("online", "online")])
def test_wandb_sends_nothing_unless_the_users_own_variable_says_so(own, mode, unset, cfg, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    if own:
        monkeypatch.setenv("WANDB_MODE", own)
    assert tracking.arguments(dataclasses.replace(cfg, report_to="wandb"))["report_to"] == "wandb"
    assert os.environ["WANDB_MODE"] == mode and os.environ["WANDB_DIR"] == str(cfg.run_dir / "tracker")


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_tracker_gets_curves_and_samples_and_asks_no_other_machine(name, unset, trained, monkeypatch):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the extra {name} is not installed")
    for module in [m for m in sys.modules if m.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)  # it reads its folder when it is imported
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)  # TRL's own, tracker or none
    asked = []

    def refuse(*address, **_):
        asked.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    run, _ = trained(name, report_to=name, watch_prompts=1)
    assert asked == []
    kept = b"".join(path.read_bytes() for path in sorted((run.dir / "tracker").rglob("*")) if path.is_file())
    assert b"rewards/margins" in kept and b"sample 1" in kept
    (first, *_) = [line["answer"] for line in tracking.read_samples(run)]
    assert first.split()[0][:8].encode() in kept
