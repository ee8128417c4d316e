"""The time split: phases exclude one another and add up to the whole."""

from types import SimpleNamespace

import pytest

from dpo_tutorial.loading import models
from dpo_tutorial.training import timing, train


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only where the test says so: no load of a machine reaches the figures."""
    now = SimpleNamespace(seconds=0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def slow(owner, name, seconds, clock):
    plain = getattr(owner, name)

    def run(*args, **kwargs):
        clock.seconds += seconds
        return plain(*args, **kwargs)

    setattr(owner, name, run)


def test_each_second_counts_once_and_for_its_own_phase(cfg, tokenizer, pairs, tmp_path, clock):
    trainer = train.build_trainer(
        cfg, models.load_base(cfg), tokenizer, pairs, pairs.select(range(2)), tmp_path / "out"
    )
    slow(trainer.model.get_base_model(), "forward", 1, clock)
    slow(trainer.accelerator, "backward", 10, clock)
    slow(trainer, "get_batch_samples", 1000, clock)
    trainer.create_optimizer().register_step_pre_hook(lambda *_: setattr(clock, "seconds", clock.seconds + 100))
    trainer.train()
    assert trainer.times.seconds == {  # two steps, each with an evaluation of one batch under both models
        timing.POLICY: 2,
        timing.REFERENCE: 2,
        timing.BACKWARD: 20,
        timing.OPTIMIZER: 200,
        timing.EVALUATION: 4,
        timing.REST: 2000,
    }
    rows = trainer.times.rows()
    assert [row["phase"] for row in rows] == list(timing.PHASES)
    assert sum(row["seconds"] for row in rows) == clock.seconds


def test_outside_training_nothing_counts_and_generation_still_works(cfg, tokenizer, pairs, tmp_path):
    trainer = train.build_trainer(
        cfg, models.load_base(cfg), tokenizer, pairs, pairs.select(range(2)), tmp_path / "out"
    )
    trainer.evaluate()
    ids = tokenizer("How do I", return_tensors="pt").input_ids
    assert trainer.model.generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]
    assert not trainer.times.seconds


def test_a_training_that_fails_leaves_no_phase_open(cfg, tokenizer, pairs, tmp_path):
    trainer = train.build_trainer(cfg, models.load_base(cfg), tokenizer, pairs, None, tmp_path / "out")
    trainer.accelerator.backward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not trainer.times._open and timing.REST in trainer.times.seconds


def test_a_clock_that_is_switched_off_counts_nothing_and_never_waits(cfg, tokenizer, pairs, tmp_path, monkeypatch):
    trainer = train.build_trainer(
        cfg, models.load_base(cfg), tokenizer, pairs, pairs.select(range(2)), tmp_path / "out"
    )
    trainer.times.counting = False
    monkeypatch.setattr(timing.memory, "synchronize", lambda: 1 / 0)
    trainer.train()
    assert not trainer.times.seconds
