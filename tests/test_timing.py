"""The time split: phases exclude one another and add up to the whole."""

import time

import pytest

from dpo_tutorial import models, timing, train


def slow(owner, name, seconds):
    plain = getattr(owner, name)

    def run(*args, **kwargs):
        time.sleep(seconds)
        return plain(*args, **kwargs)

    setattr(owner, name, run)


def test_each_second_counts_once_and_for_its_own_phase(cfg, tokenizer, pairs, tmp_path):
    trainer = train.build_trainer(
        cfg, models.load_base(cfg), tokenizer, pairs, pairs.select(range(2)), tmp_path / "out"
    )
    slow(trainer.accelerator, "backward", 0.3)
    slow(trainer.model.get_base_model(), "forward", 0.1)
    split = timing.TimeSplit(trainer)
    started = time.perf_counter()
    trainer.train()
    whole = time.perf_counter() - started
    assert sum(split.seconds.values()) == pytest.approx(whole, abs=0.05)
    assert set(split.seconds) == set(timing.PHASES)
    for phase, waited in (
        (timing.POLICY, 0.2),
        (timing.REFERENCE, 0.2),
        (timing.BACKWARD, 0.6),
        (timing.EVALUATION, 0.4),
    ):
        assert waited <= split.seconds[phase] < waited + 1.0, phase
    assert split.seconds[timing.OPTIMIZER] > 0
    rows = split.rows()
    assert [row["phase"] for row in rows] == list(timing.PHASES)
    assert sum(row["seconds"] for row in rows) == pytest.approx(sum(split.seconds.values()))


def test_outside_training_nothing_counts_and_generation_still_works(cfg, tokenizer, pairs, tmp_path):
    trainer = train.build_trainer(
        cfg, models.load_base(cfg), tokenizer, pairs, pairs.select(range(2)), tmp_path / "out"
    )
    split = timing.TimeSplit(trainer)
    trainer.evaluate()
    ids = tokenizer("How do I", return_tensors="pt").input_ids
    assert trainer.model.generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]
    assert not split.seconds


def test_a_training_that_fails_leaves_no_phase_open(cfg, tokenizer, pairs, tmp_path):
    trainer = train.build_trainer(cfg, models.load_base(cfg), tokenizer, pairs, None, tmp_path / "out")
    trainer.accelerator.backward = lambda *args, **kwargs: 1 / 0
    split = timing.TimeSplit(trainer)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not split._open and split.seconds[timing.REST] > 0
