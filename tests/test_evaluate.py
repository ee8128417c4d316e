"""Statistics against known values; scoring and generation on a tiny model."""

import dataclasses

import pytest
import torch
from conftest import TEXTS, pair
from datasets import Dataset
from peft import get_peft_model

from dpo_tutorial import data, evaluate, house_style, models


@pytest.fixture
def policy(cfg):
    torch.manual_seed(1)
    model = get_peft_model(models.load_base(cfg), models.lora_config(cfg))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_wilson_interval_is_the_textbook_one():
    # 8 of 10: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n) with z = 1.96
    found = evaluate.rate(8, 10)
    assert (found["rate"], found["n"]) == (0.8, 10)
    assert found["low"] == pytest.approx(0.4902, abs=1e-3) and found["high"] == pytest.approx(0.9433, abs=1e-3)


def test_a_tie_counts_half():
    def record(margin):
        return {
            "margin": margin,
            "reward_chosen": margin,
            "reward_rejected": 0.0,
            "chosen_tokens": 3,
            "rejected_tokens": 3,
        }

    summary = evaluate.summarise([record(1.0), record(0.0), record(-1.0), record(0.0)])
    assert summary["accuracy"]["rate"] == 0.5 and summary["ties"] == 2
    assert summary["pick_the_longer"]["rate"] == 0.5


def test_a_policy_equal_to_its_reference_ties_on_every_pair(cfg, tokenizer, pairs):
    model = get_peft_model(models.load_base(cfg), models.lora_config(cfg))
    records = evaluate.score_pairs(cfg, model, tokenizer, pairs)
    assert all(r["margin"] == 0 and r["reward_chosen"] == 0 for r in records)
    assert evaluate.summarise(records)["accuracy"]["rate"] == 0.5


def test_scores_do_not_depend_on_the_batch(cfg, policy, tokenizer, pairs):
    together = evaluate.score_pairs(cfg, policy, tokenizer, pairs)
    alone = [evaluate.score_pairs(cfg, policy, tokenizer, pairs.select([i]))[0] for i in range(len(pairs))]
    for a, b in zip(together, alone, strict=True):
        assert a["prompt_id"] == b["prompt_id"]
        assert a["margin"] == pytest.approx(b["margin"], abs=1e-4)
        assert a["margin"] == pytest.approx(a["reward_chosen"] - a["reward_rejected"])


def test_collate_pads_right_and_masks_prompt_and_padding():
    batch = evaluate.collate([([5, 6], [7]), ([5], [8, 9, 9])], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [5, 8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]


def test_answers_come_back_in_order_whatever_the_batching(cfg, policy, tokenizer, pairs):
    prompts = pairs["prompt"]
    together = evaluate.generate(cfg, policy, tokenizer, prompts)
    alone = [evaluate.generate(cfg, policy, tokenizer, [p])[0] for p in prompts]
    assert together == alone
    assert all(a["tokens"] <= cfg.max_new_tokens for a in together)
    assert tokenizer.padding_side == "right", "generate puts the padding side back"


def test_an_answer_that_hits_the_limit_is_not_finished(cfg, policy, tokenizer, pairs):
    answers = evaluate.generate(cfg, policy, tokenizer, pairs["prompt"], max_new_tokens=1)
    assert all(a["tokens"] == (0 if a["finished"] else 1) for a in answers)


def test_an_untrained_adapter_is_no_distance_from_the_base(cfg, tokenizer, pairs):
    model = get_peft_model(models.load_base(cfg), models.lora_config(cfg))
    kl = evaluate.kl_from_reference(cfg, model, tokenizer, pairs["prompt"])
    assert kl["per_answer"]["mean"] == kl["per_token"]["mean"] == kl["per_token"]["standard_error"] == 0.0
    assert kl["tokens"] > 0


def test_the_estimate_meets_the_exact_kl_of_one_token_answers(cfg, policy, tokenizer, pairs):
    """For one token, KL = sum of p log(p/q) over the vocabulary, which two forward passes give exactly."""
    policy.get_output_embeddings().weight.data *= 20  # sharp distributions, so that the KL stands out of the noise
    prompt = pairs["prompt"][0]
    ids = tokenizer.apply_chat_template(prompt, return_tensors="pt", return_dict=False, add_generation_prompt=True)
    with torch.no_grad():
        p = policy(input_ids=ids).logits[0, -1].log_softmax(-1)
        with policy.disable_adapter():
            q = policy(input_ids=ids).logits[0, -1].log_softmax(-1)
    exact = (p.exp() * (p - q)).sum().item()
    found = evaluate.kl_from_reference(cfg, policy, tokenizer, [prompt] * 600, max_new_tokens=1)["per_answer"]
    assert exact > 0.05 and found["n"] == 600
    assert abs(found["mean"] - exact) < 4 * found["standard_error"] < exact


def test_kl_per_answer_and_per_token_are_the_means_worked_by_hand(cfg, policy, tokenizer, pairs, monkeypatch):
    monkeypatch.setattr(evaluate, "_answer_ids", lambda *a, **k: [[5] * 10, [5] * 30])
    monkeypatch.setattr(evaluate, "_log_probs", lambda *a: (torch.tensor([-8.0, -20.0]), torch.tensor([-10.0, -28.0])))
    kl = evaluate.kl_from_reference(cfg, policy, tokenizer, pairs["prompt"][:2])
    # log-ratios 2 and 8: mean 5, standard error 3; 10 nats over 40 tokens; residuals (2 - 2.5)/20 and (8 - 7.5)/20
    assert kl["per_answer"] == {"mean": 5.0, "standard_error": pytest.approx(3.0), "n": 2}
    assert kl["per_token"] == {"mean": 0.25, "standard_error": pytest.approx(0.025), "n": 2}
    assert kl["tokens"] == 40


def test_the_draw_for_the_kl_follows_the_seed_and_leaves_the_generator_alone(cfg, policy, tokenizer, pairs):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (evaluate.kl_from_reference(cfg, policy, tokenizer, pairs["prompt"]) for _ in range(2))
    other = evaluate.kl_from_reference(dataclasses.replace(cfg, seed=1), policy, tokenizer, pairs["prompt"])
    assert first == second != other
    assert torch.equal(state, torch.get_rng_state())


def test_bag_of_words_finds_a_surface_preference_and_nothing_where_there_is_none():
    good = [data.extract(pair(f"Question {i}?", f"Plain answer {i}.", f"Great question! Item {i}.")) for i in range(30)]
    noise = [
        data.extract(pair(*(t[:2] if i % 2 else (t[0], t[2])), t[2] if i % 2 else t[1]))
        for i in range(6)
        for t in TEXTS
    ]
    assert evaluate.bag_of_words_accuracy(Dataset.from_list(good[:20]), Dataset.from_list(good[20:]))["rate"] == 1.0
    assert evaluate.bag_of_words_accuracy(Dataset.from_list(noise), Dataset.from_list(noise))["rate"] == pytest.approx(
        0.5, abs=0.1
    )


def test_distinct_falls_with_repetition():
    assert evaluate.distinct("one two three four") == 1.0
    assert evaluate.distinct("ha ha ha ha ha") == 0.25


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("Seven minutes. Start when the water boils.", set()),
        ("Sure! Here is how:", {"no opener", "no exclamation", "ends complete"}),
        ("Two steps:\n- boil\n- wait", {"plain prose", "one paragraph", "ends complete"}),
        ("Seven minutes. I hope this helps.", {"no closer"}),
        ("It is crucial to wait.", {"plain words"}),
    ],
)
def test_house_style_rules_find_what_they_name(text, broken):
    answer = {"text": text, "tokens": 9, "finished": True}
    assert {name for name, check in house_style.RULES.items() if not check(answer)} == broken


def test_an_unfinished_answer_does_not_end_complete():
    assert not house_style.RULES["ends complete"]({"text": "Seven minutes.", "tokens": 9, "finished": False})


@pytest.mark.parametrize(
    ("hits", "words"), [(58, "tells chosen from rejected"), (30, "No effect"), (5, "swapped labels")]
)
def test_the_verdict_follows_the_numbers(hits, words):
    held_out = {
        "accuracy": evaluate.rate(hits, 60), "reward_chosen": {"mean": -0.5}, "reward_rejected": {"mean": -1.0},
    }  # fmt: skip
    before = {"no opener": evaluate.rate(2, 24), "plain words": evaluate.rate(12, 24)}
    after = {"no opener": evaluate.rate(23, 24), "plain words": evaluate.rate(13, 24)}
    said = evaluate.verdict(held_out, before, after)
    assert words in said[0] and "Both sides became less likely" in said[1]
    assert "no opener 8% → 96%" in said[2] and "plain words" in said[3]
