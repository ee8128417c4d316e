"""The reference computed once: the same loss, read again by a second run, and not by a changed one."""

import dataclasses
import json

import pytest

from dpo_tutorial import artifacts, config, models, reference, train


@pytest.fixture
def run(cfg):
    return artifacts.Run(cfg)


def losses(trainer) -> list[float]:
    return [
        row.get("loss", row.get("eval_loss")) for row in trainer.state.log_history if {"loss", "eval_loss"} & set(row)
    ]


def trained(cfg, run, tokenizer, pairs):
    return train.train(cfg, run, models.load_base(cfg), tokenizer, pairs, pairs.select(range(3)))


def test_loss_and_evaluation_are_those_of_a_reference_in_the_loop(cfg, tokenizer, pairs, tmp_path):
    cfg = dataclasses.replace(cfg, max_steps=4)
    found = {}
    for once in (False, True):
        changed = dataclasses.replace(cfg, precompute_reference=once, artifacts=str(tmp_path / str(once)))
        found[once] = losses(trained(changed, artifacts.Run(changed), tokenizer, pairs))
    assert len(found[True]) == 6 and max(found[True]) > 1.01 * min(found[True]), "it learns"
    assert found[True] == pytest.approx(found[False], abs=1e-4)


def forward_passes(monkeypatch) -> list:
    seen, plain = [], reference._compute
    monkeypatch.setattr(reference, "_compute", lambda *args: seen.append(len(args[1])) or plain(*args))
    return seen


def test_a_second_run_reads_it_and_says_so(cfg, run, tokenizer, pairs, monkeypatch, capsys):
    cfg = dataclasses.replace(cfg, precompute_reference=True)
    seen = forward_passes(monkeypatch)
    trained(cfg, run, tokenizer, pairs)
    assert seen == [4, 3], "training pairs, then validation pairs"
    trained(dataclasses.replace(cfg, beta=0.5, learning_rate=1e-3, seed=7), run, tokenizer, pairs)
    assert seen == [4, 3] and "Reference log-probabilities of 4 pairs read from" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["pairs", "dtype", "ld_alpha", "prefix_sharing", "base"])
def test_a_changed_run_computes_it_anew(cfg, run, tokenizer, pairs, tmp_path, monkeypatch, change):
    cfg = dataclasses.replace(cfg, precompute_reference=True, max_steps=1)
    trained(cfg, run, tokenizer, pairs)
    seen = forward_passes(monkeypatch)
    if change == "pairs":
        pairs = pairs.select([3, 2, 1, 0])
    elif change == "base":
        base = models.load_base(cfg, quantize=False)
        base.model.norm.weight.data *= 1.1
        base.save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        cfg = dataclasses.replace(cfg, model=str(tmp_path / "other"))
    else:
        cfg = dataclasses.replace(cfg, **{change: {"dtype": "bf16", "ld_alpha": 0.5, "prefix_sharing": False}[change]})
    trained(cfg, run, tokenizer, pairs)
    assert seen == [4, 3]


@pytest.mark.parametrize("damage", ["", "{", '{"ref_chosen_logps": [1.0]}', "short", "nan"])
def test_a_damaged_file_is_computed_anew(cfg, run, tokenizer, pairs, monkeypatch, damage):
    cfg = dataclasses.replace(cfg, precompute_reference=True, max_steps=1)
    trained(cfg, run, tokenizer, pairs)
    seen = forward_passes(monkeypatch)
    files = list(run.dir.glob("reference-*.json"))
    assert len(files) == 2
    for path in files:
        if damage in ("short", "nan"):
            values = json.loads(path.read_text())
            column = values["ref_rejected_logps"]
            values["ref_rejected_logps"] = column[1:] if damage == "short" else [float("nan"), *column[1:]]
            path.write_text(json.dumps(values))
        else:
            path.write_text(damage)
    trained(cfg, run, tokenizer, pairs)
    assert seen == [4, 3]


def test_it_is_off_by_default(cfg, run, tokenizer, pairs):
    assert not config.Config().precompute_reference
    trained(dataclasses.replace(cfg, max_steps=1), run, tokenizer, pairs)
    assert not list(run.dir.glob("reference-*.json"))
