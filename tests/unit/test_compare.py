"""Scoring, generation, KL, rounding noise and the report, on a tiny model."""

import dataclasses
import itertools
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import TEXTS, pair, tiny_config, trained_run
from datasets import Dataset
from peft import get_peft_model

from dpo_tutorial import config
from dpo_tutorial.adapter import lora
from dpo_tutorial.cli import main as cli
from dpo_tutorial.comparing import compare, generation, instructions, report, stats
from dpo_tutorial.loading import models
from dpo_tutorial.machine import hardware
from dpo_tutorial.pairs import encoding, house_style, sources, store
from dpo_tutorial.training import dpo, save, scoring, train


@pytest.fixture(scope="module")
def policy(tiny_folder, tmp_path_factory):
    cfg = tiny_config(tiny_folder, tmp_path_factory.mktemp("policy"))
    torch.manual_seed(1)
    model = get_peft_model(models.load_base(cfg), lora.lora_config(cfg))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_scores_do_not_depend_on_the_batch(cfg, policy, tokenizer, pairs):
    together = scoring.score_pairs(cfg, policy, tokenizer, pairs)
    alone = [scoring.score_pairs(cfg, policy, tokenizer, pairs.select([i]))[0] for i in range(len(pairs))]
    for a, b in zip(together, alone, strict=True):
        assert a["prompt_id"] == b["prompt_id"]
        assert a["margin"] == pytest.approx(b["margin"], abs=1e-4)
        assert a["margin"] == pytest.approx(a["reward_chosen"] - a["reward_rejected"])


def test_scoring_computes_the_prompt_of_a_pair_once(cfg, policy, tokenizer, pairs):
    tokens, found = [], {}
    hook = policy.get_input_embeddings().register_forward_hook(lambda _, given, __: tokens.append(given[0].numel()))
    for shared in (True, False):
        changed = dataclasses.replace(cfg, prefix_sharing=shared, batch_size=1)
        found[shared] = scoring.score_pairs(changed, policy, tokenizer, pairs)
        tokens.append(None)
    hook.remove()
    fewer, more = (sum(part) for split, part in itertools.groupby(tokens, lambda n: n is None) if not split)
    assert fewer < 0.9 * more, "though some short passes ask first whether the model allows it"
    for a, b in zip(found[True], found[False], strict=True):
        for name in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"):
            assert a[name] == pytest.approx(b[name], abs=1e-4)


def test_the_lm_head_sees_answers_alone_and_the_log_probabilities_are_those_of_all_logits(
    cfg, policy, tokenizer, pairs
):
    batch = scoring.collate(encoded(tokenizer, pairs), tokenizer.pad_token_id)
    rows = []
    head = policy.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, given, out: rows.append(out.shape[:2].numel()))
    with torch.no_grad():
        found = scoring.log_probs_of(cfg, policy, batch)
        with scoring.autocast(cfg):
            logits = policy(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    hook.remove()
    answers = int(batch["completion_mask"].sum())
    assert rows == [answers + len(found), batch["input_ids"].numel()] and rows[0] < 0.8 * rows[1]
    assert [len(f) for f in found] == batch["completion_mask"].sum(1).tolist()
    whole = dpo.sequence_log_prob(logits, batch["input_ids"], batch["completion_mask"])
    assert torch.stack([f.sum() for f in found]) == pytest.approx(whole.double(), abs=1e-4)


def test_collate_pads_right_and_masks_prompt_and_padding():
    batch = scoring.collate([([5, 6], [7]), ([5], [8, 9, 9])], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [5, 8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]


def test_answers_come_back_in_order_whatever_the_batching(cfg, policy, tokenizer, pairs):
    prompts = pairs["prompt"]
    together = generation.generate(cfg, policy, tokenizer, prompts)
    alone = [generation.generate(cfg, policy, tokenizer, [p])[0] for p in prompts]
    assert together == alone
    assert all(a["tokens"] <= cfg.max_new_tokens for a in together)
    assert tokenizer.padding_side == "right", "generate puts the padding side back"


def test_a_penalty_that_a_checkpoint_brings_along_does_not_change_the_answers(
    cfg, policy, tokenizer, pairs, monkeypatch
):
    plain = generation.generate(cfg, policy, tokenizer, pairs["prompt"])
    monkeypatch.setattr(policy.generation_config, "repetition_penalty", 9.0)
    assert generation.generate(cfg, policy, tokenizer, pairs["prompt"]) == plain


def test_an_answer_that_hits_the_limit_is_not_finished(cfg, policy, tokenizer, pairs):
    answers = generation.generate(cfg, policy, tokenizer, pairs["prompt"], max_new_tokens=1)
    assert all(a["tokens"] == (0 if a["finished"] else 1) for a in answers)


@pytest.mark.parametrize("on", [True, False], ids=["policy", "base"])
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj",)], ids=["every layer", "one kind"])
def test_the_copy_that_writes_on_a_cpu_is_the_same_model(cfg, tokenizer, pairs, targets, on):
    model = get_peft_model(
        base := models.load_base(cfg), lora.lora_config(dataclasses.replace(cfg, lora_targets=targets), base)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = scoring.collate(encoded(tokenizer, pairs), tokenizer.pad_token_id, model.device)
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    model.eval()
    with torch.no_grad(), nullcontext() if on else model.disable_adapter():
        copied = generation.written_out(model)
        ours, theirs = (m(input_ids=batch["input_ids"]).logits for m in (model, copied))
    assert (ours - theirs).abs().max() < 1e-4
    assert {p.dtype for p in copied.parameters()} == {torch.float32}
    assert {type(m) for m in copied.modules() if isinstance(m, torch.nn.Linear)} == {torch.nn.Linear}
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items() if n in before), "a copy, not the model"


def test_the_copy_of_a_model_in_a_trainer_calls_itself(cfg, tokenizer, pairs, tmp_path):
    trainer = train.build_trainer(cfg, models.load_base(cfg), tokenizer, pairs, None, tmp_path)
    trainer.train()
    copied = generation.written_out(trainer.model)
    torch.nn.init.zeros_(copied.get_output_embeddings().weight)
    assert not copied(input_ids=torch.tensor([[5, 6]])).logits.any()


def test_where_the_copy_does_not_fit_the_model_itself_writes(cfg, policy, tokenizer, pairs, monkeypatch):
    roomy = generation.generate(cfg, policy, tokenizer, pairs["prompt"])
    monkeypatch.setattr("dpo_tutorial.machine.memory.free_memory_gib", lambda: 0.0)
    monkeypatch.setattr("dpo_tutorial.comparing.generation.written_out", lambda model: pytest.fail("there is no room"))
    assert generation.generate(cfg, policy, tokenizer, pairs["prompt"]) == roomy


@pytest.fixture
def sharp(policy, monkeypatch):
    """The policy with sharp distributions, so that its KL stands out of the noise."""
    head = policy.get_output_embeddings().weight
    monkeypatch.setattr(head, "data", head.data * 20)
    return policy


def encoded(tokenizer, pairs):
    return [encoding.encode(tokenizer, pair["prompt"], pair["chosen"]) for pair in pairs]


def test_the_kl_along_an_answer_is_the_sum_over_the_vocabulary_at_each_token(cfg, sharp, tokenizer, pairs):
    found = scoring.answer_kl(cfg, sharp, tokenizer, encoded(tokenizer, pairs))
    for nats, (prompt, answer) in zip(found, encoded(tokenizer, pairs), strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            p = sharp(input_ids=ids).logits[0].log_softmax(-1)
            with sharp.disable_adapter():
                q = sharp(input_ids=ids).logits[0].log_softmax(-1)
        by_hand = [(p[t].exp() * (p[t] - q[t])).sum().item() for t in range(len(prompt) - 1, ids.shape[1] - 1)]
        assert nats.tolist() == pytest.approx(by_hand, abs=1e-5) and len(nats) == len(answer)
        assert nats.min() > 0.01


def test_with_the_adapter_off_the_kl_is_0_at_every_token(cfg, sharp, tokenizer, pairs):
    with sharp.disable_adapter():
        found = scoring.answer_kl(cfg, sharp, tokenizer, encoded(tokenizer, pairs))
    assert not torch.cat(found).any()


def test_the_exact_kl_is_what_the_log_ratio_of_drawn_tokens_estimates(cfg, sharp, tokenizer, pairs, monkeypatch):
    """For answers of one token it is the same in every draw, and the mean log-ratio comes near to it."""
    drawn, draw = [], generation._answer_ids
    monkeypatch.setattr(generation, "_answer_ids", lambda *a, **k: drawn.extend(draw(*a, **k)) or drawn)
    prompt = pairs["prompt"][0]
    one = dataclasses.replace(cfg, max_new_tokens=1)
    exact = generation.kl_from_base(one, sharp, tokenizer, [prompt] * 200)[0]["per_answer"]
    assert exact["n"] == 200 and exact["mean"] > 0.05 and exact["standard_error"] < 1e-6
    ids = tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=False, add_generation_prompt=True)
    ours, theirs = scoring.answer_log_probs(cfg, sharp, tokenizer, [(ids, answer) for answer in drawn])
    ratios = stats.mean([(p - q).item() for p, q in zip(ours, theirs, strict=True)])
    assert abs(ratios["mean"] - exact["mean"]) < 4 * ratios["standard_error"] < exact["mean"]


def test_kl_per_answer_and_per_token_are_the_means_worked_by_hand(cfg, policy, tokenizer, pairs, monkeypatch):
    monkeypatch.setattr(generation, "_answer_ids", lambda *a, **k: [[5] * 10, [5] * 30])
    monkeypatch.setattr(scoring, "answer_kl", lambda *a: [torch.full((10,), 0.2), torch.full((30,), 8 / 30)])
    (kl,) = generation.kl_from_base(cfg, policy, tokenizer, pairs["prompt"][:2])
    # sums 2 and 8: mean 5, standard error 3; 10 nats over 40 tokens; residuals (2 - 2.5)/20 and (8 - 7.5)/20
    assert (kl["per_answer"]["mean"], kl["per_answer"]["standard_error"]) == pytest.approx((5.0, 3.0), abs=1e-5)
    assert (kl["per_token"]["mean"], kl["per_token"]["standard_error"]) == pytest.approx((0.25, 0.025), abs=1e-5)
    assert kl["tokens"] == 40 and kl["per_token"]["n"] == 2


def test_groups_of_prompts_are_drawn_together_and_reported_apart(cfg, policy, tokenizer, pairs, monkeypatch):
    calls = []

    def drawn(config, model, tokenizer, prompts, *_):
        calls.append(prompts)
        return [[5] * 10 * n for n in (1, 3, 2)]

    monkeypatch.setattr(generation, "_answer_ids", drawn)
    monkeypatch.setattr(scoring, "answer_kl", lambda *a: [torch.full((10 * n,), 0.1 * n) for n in (1, 3, 2)])
    prompts = pairs["prompt"][:3]
    first, second = generation.kl_from_base(cfg, policy, tokenizer, prompts[:2], prompts[2:])
    assert calls == [prompts]
    assert first["per_answer"]["mean"] == pytest.approx((1 + 9) / 2) and first["tokens"] == 40
    assert second["per_answer"]["mean"] == pytest.approx(4) and second["tokens"] == 20


def test_kl_is_drawn_on_every_second_prompt_and_on_all_of_up_to_three():
    found = {n: list(generation.every_second([*range(n)])) for n in range(6)}
    assert found == {0: [], 1: [0], 2: [0, 1], 3: [0, 1, 2], 4: [0, 2], 5: [0, 2, 4]}


def test_the_draw_for_the_kl_follows_the_seed_and_leaves_the_generator_alone(cfg, policy, tokenizer, pairs):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (generation.kl_from_base(cfg, policy, tokenizer, pairs["prompt"]) for _ in range(2))
    other = generation.kl_from_base(dataclasses.replace(cfg, seed=1), policy, tokenizer, pairs["prompt"])
    assert first == second != other
    assert torch.equal(state, torch.get_rng_state())


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
    assert not house_style.RULES["ends complete"](answer | {"finished": False})


# --- tokens, padding, noise ----


def test_token_rewards_add_up_to_the_reward_of_the_answer(cfg, policy, tokenizer, pairs):
    for record in scoring.score_pairs(cfg, policy, tokenizer, pairs):
        for side in ("chosen", "rejected"):
            tokens = record[f"{side}_token_rewards"]
            assert len(tokens) == record[f"{side}_tokens"]
            assert sum(tokens) == pytest.approx(record[f"reward_{side}"], abs=1e-4)
            assert record[f"reward_{side}"] == pytest.approx(
                cfg.beta * (record[f"policy_{side}"] - record[f"reference_{side}"]), abs=1e-6
            )
            assert any(tokens)


def test_the_tokens_of_a_heat_map_are_the_answer_and_its_rewards(cfg, policy, tokenizer, pairs):
    pair = pairs[0] | {"chosen": [{"role": "assistant", "content": "Put it in, 7 min. 🥚é"}]}
    record = scoring.score_pairs(cfg, policy, tokenizer, Dataset.from_list([pair]))[0]
    shown = scoring.token_rewards(tokenizer, pair, record)
    text = "".join(text for text, _ in shown["chosen"])
    assert text.startswith("Put it in, 7 min. 🥚é<|im_end|>") and "\ufffd" not in text
    assert sum(reward for _, reward in shown["chosen"]) == pytest.approx(shown["reward_chosen"], abs=1e-4)
    assert len(shown["chosen"]) < record["chosen_tokens"], "the bytes of one character are one piece"


def test_a_policy_equal_to_its_reference_has_zero_everywhere(cfg, tokenizer, pairs):
    cfg = dataclasses.replace(cfg, data="rows.jsonl", instructions=4)
    model = get_peft_model(models.load_base(cfg), lora.lora_config(cfg))
    records, comparison = compare.compare(cfg, model, tokenizer, {"train": pairs, "test": pairs}, 0.1)
    assert comparison["held_out"]["after"]["accuracy"]["rate"] == 0.5
    assert comparison["held_out"]["after"]["ties"] == len(pairs)
    kl = comparison["kl"]["inside"]
    assert kl["per_answer"]["mean"] == kl["per_token"]["mean"] == kl["per_token"]["standard_error"] == 0
    assert all(
        reward == 0 for shown in comparison["token_rewards"] for _, reward in shown["chosen"] + shown["rejected"]
    )
    assert all(part["mean"] == 0 for side in comparison["by_position"].values() for part in side)
    assert comparison["noise"]["spread"] == 0 and all(a["before"] == a["after"] for a in comparison["answers"])
    assert all(c["difference"] == 0 for c in comparison["rules"]["change"].values())
    assert "No effect" in comparison["verdict"][0]
    checked = comparison["instructions"]
    assert checked["before"] == checked["after"] and checked["before"]["n"] == len(checked["requests"]) == 4
    assert comparison["kl"]["outside"]["per_answer"]["mean"] == 0 and comparison["by_kind"] == {}
    assert comparison["rules"]["target"]["no opener"]["n"] == len(pairs)


def test_few_requests_are_taken_evenly_from_all_kinds():
    few, every = instructions.some(6), instructions.load()
    at = [every.index(request) for request in few]
    assert len({request["kind"] for request in few}) == 6 and at[0] == 0
    assert {b - a for a, b in itertools.pairwise([*at, len(every)])} == {len(every) // 6}


def test_requests_are_answered_by_the_base_before_and_by_the_policy_after(cfg, policy, tokenizer, pairs, monkeypatch):
    """They are answered in one batch with the prompts, and each goes back to its own."""
    cfg = dataclasses.replace(cfg, data="rows.jsonl", instructions=4)
    prompts = [*pairs["prompt"][: cfg.compare_prompts], *instructions.conversations(instructions.some(4))]
    n = len(prompts) - 4
    with policy.disable_adapter():
        base = generation.generate(cfg, policy, tokenizer, prompts)
    ours = generation.generate(cfg, policy, tokenizer, prompts)
    monkeypatch.setattr(instructions, "followed", lambda requests, answers: [answers == base[n:]] * len(answers))
    _, comparison = compare.compare(cfg, policy, tokenizer, {"test": pairs}, 0.1)
    found = comparison["instructions"]
    assert found["answers"] == {"before": base[n:], "after": ours[n:]} and found["requests"] == instructions.some(4)
    assert (found["before"]["rate"], found["after"]["rate"]) == (1, 0), "the two differ"
    assert [a["before"] for a in comparison["answers"]] == base[:n]
    assert [a["after"] for a in comparison["answers"]] == ours[:n]


def test_of_many_requests_no_kind_is_left_out():
    kinds = {request["kind"] for request in instructions.load()}
    for n in (50, 84, 100, 126, 1000):
        asked = instructions.some(n)
        assert {request["kind"] for request in asked} == kinds and len(asked) == min(n, 126), n


def test_chosen_answers_are_judged_as_generated_ones(tokenizer, pairs):
    found = generation.chosen_answers(tokenizer, pairs, 2)
    assert [a["text"] for a in found] == [TEXTS[0][1], TEXTS[1][1]] and all(a["finished"] for a in found)
    assert [a["tokens"] for a in found] == [n - 2 for n in pairs["chosen_tokens"][:2]], "without the template's end"


def test_kinds_are_those_noted_for_the_embedded_set_and_none_of_other_data(cfg, pairs):
    ids = list(sources.rejected_kinds())[:3]
    own = Dataset.from_list([{"prompt_id": name} for name in ids])
    assert compare.kinds_of(dataclasses.replace(cfg, data="embedded"), own) == [
        sources.rejected_kinds()[i] for i in ids
    ]
    assert compare.kinds_of(dataclasses.replace(cfg, data="rows.jsonl"), pairs) is None


def test_in_fp32_padding_moves_a_margin_by_rounding_alone(cfg, policy, tokenizer, pairs):
    records = scoring.score_pairs(cfg, policy, tokenizer, pairs)
    noise = scoring.noise_floor(cfg, policy, tokenizer, pairs, records)
    assert noise["spread"] < 1e-5 and noise["pairs"] == len(pairs) and noise["dtype"] == "fp32"


def test_the_noise_floor_is_the_spread_between_two_scorings(cfg, policy, tokenizer, pairs, monkeypatch):
    records = [{"margin": margin} for margin in (1.0, 2.0, -0.1, 0.3)]
    seen = {}

    def again(*args, padding):
        seen["padding"] = padding
        return [{"margin": r["margin"] + shift} for r, shift in zip(records, (0.3, -0.1, 0.1, -0.3), strict=True)]

    monkeypatch.setattr(scoring, "score_pairs", again)
    noise = scoring.noise_floor(cfg, policy, tokenizer, pairs, records)
    assert seen["padding"] > 0
    assert noise["spread"] == pytest.approx(0.05**0.5)  # sqrt of mean (0.09, 0.01, 0.01, 0.09)
    assert noise["floor"] == pytest.approx(1.96 * 0.05**0.5) and noise["within"] == 2


def test_padding_adds_columns_that_are_masked_out():
    batch = scoring.collate([([5, 6], [7])], pad_id=0, padding=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0]] and batch["completion_mask"].sum() == 1


# --- the report outside a notebook ----


@pytest.fixture(scope="module")
def trained(tiny_folder, tokenizer, tmp_path_factory):
    """An adapter as 05 saves it, trained for two steps on 24 rows of a file."""
    return trained_run(tiny_folder, tokenizer, tmp_path_factory.mktemp("trained"), compare_prompts=2)


def test_the_command_writes_the_report_of_an_adapter_from_its_folder_alone(trained, tmp_path, capsys):
    out = tmp_path / "report"
    assert cli.main(["compare", "--adapter", str(trained.adapter), "--out", str(out)]) == 0
    comparison = json.loads((out / "comparison.json").read_text())
    records = json.loads((out / "records.json").read_text())
    assert comparison["held_out"]["after"] == stats.summarise(records)
    assert comparison["held_out"]["after"]["accuracy"]["n"] == len(records) >= 2
    assert comparison["adapter"]["config"]["data"] == comparison["data"] == "rows.jsonl"
    assert comparison["versions"]["trl"]
    assert not list(out.glob("data*")), "the folder is there to be shown, and holds no training pairs"
    assert "tells chosen" in capsys.readouterr().out or comparison["verdict"][0].startswith("No effect")
    html = (out / "report.html").read_text()
    assert html.startswith("<!doctype html>") and html.count("<img alt=") == 5
    assert not re.findall(r"(?:src|href)=[\"'](?!data:image/png;base64)", html), "the page fetches nothing"


def test_of_the_settings_of_the_training_what_is_given_now_and_the_environment_come_first(
    trained, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(compare.lora, "check_adapter", lambda config, adapter: seen.append(config) or 1 / 0)
    monkeypatch.setenv("DPO_TUTORIAL_MAX_NEW_TOKENS", "5")
    monkeypatch.setenv("DPO_TUTORIAL_COMPARE_PROMPTS", "7")
    with pytest.raises(ZeroDivisionError):
        cli.main(
            ["compare", "--adapter", str(trained.adapter), "-p", "COMPARE_PROMPTS", "3", "-p", "MODEL", "someone/model"]
        )
    with pytest.raises(ZeroDivisionError):
        cli.main(["compare", "--adapter", str(trained.adapter), "-p", "PROFILE", "t4"])
    assert (seen[1].profile, seen[1].model, seen[1].data) == ("t4", trained.config.model, trained.config.data)
    assert (seen[0].max_new_tokens, seen[0].compare_prompts, seen[0].lora_r) == (5, 3, trained.config.lora_r)
    assert (seen[0].data, seen[0].model, seen[0].model_revision) == (trained.config.data, "someone/model", None)


def test_an_adapter_is_judged_in_the_compute_type_of_this_machine(trained, monkeypatch):
    monkeypatch.setattr(hardware, "pick_dtype", lambda facts: ("bf16", "as here"))
    assert config.resolve(save.recorded(trained.adapter)).dtype == "bf16" != trained.config.dtype


def judged(trained, out, *options):
    """The exit code of `compare`, and the prompts that it judged the adapter on; its figures are not drawn."""
    with patch.object(report, "_picture", return_value=""):
        code = cli.main(["compare", "--adapter", str(trained.adapter), "--out", str(out), *options])
    return code, [r["prompt_id"] for r in json.loads((out / "records.json").read_text())] if code == 0 else []


def prompts_trained_on(run):
    with (store.data_dir(run) / "train.jsonl").open() as stream:
        return {json.loads(line)["prompt_id"] for line in stream}


def other_rows(path, n):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(pair(f"Other {i}?", f"Yes, {i}.", "Perhaps!")) for i in range(n)))
    return str(path.parent if path.name == "test.jsonl" else path)


@pytest.mark.parametrize(("file", "n"), [("other.jsonl", 60), ("other.jsonl", 1), ("d/test.jsonl", 7)])
def test_the_command_judges_an_adapter_on_every_row_of_other_data(file, n, trained, tmp_path, capsys):
    data = other_rows(tmp_path / file, n)
    code, prompts = judged(trained, tmp_path / "out", "--data", data)
    assert code == 0 and sorted(prompts) == sorted(f"Other {i}?" for i in range(n))
    assert f"{n} rows; 0 left out," in capsys.readouterr().out
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "word counts" not in comparison["against"] and comparison["data"] == data.split("/")[-1]
    assert comparison["token_rewards"][0]["prompt"][0]["content"].startswith("Other")
    assert "Word counting was left out" in (tmp_path / "out" / "report.html").read_text()


def test_a_map_of_columns_is_of_the_data_of_the_training_alone(trained, tmp_path, capsys):
    adapter = shutil.copytree(trained.dir, tmp_path / "run") / "adapter"
    record = json.loads((adapter / "training.json").read_text())
    record["config"]["data_columns"] = "prompt=task,chosen=better,rejected=worse"
    (adapter / "training.json").write_text(json.dumps(record))
    other = SimpleNamespace(adapter=adapter)
    data = other_rows(tmp_path / "other.jsonl", 3)
    assert judged(other, tmp_path / "out", "--data", data)[0] == 0
    assert judged(other, tmp_path / "out", "--data", data, "-p", "DATA", data)[0] == 1
    assert "--data and -p DATA both name pairs" in capsys.readouterr().err


def test_of_other_data_as_many_rows_are_judged_as_max_test_says(trained, tmp_path):
    data = other_rows(tmp_path / "other.jsonl", 20)
    assert len(judged(trained, tmp_path / "out", "--data", data, "-p", "MAX_TEST", "6")[1]) == 6


def test_rows_it_was_trained_on_are_left_out_in_whatever_order_they_come(trained, tmp_path, capsys):
    rows = Path(trained.config.data).read_text().splitlines()
    (tmp_path / "reversed.jsonl").write_text("\n".join(reversed(rows)))
    code, prompts = judged(trained, tmp_path / "out", "--data", str(tmp_path / "reversed.jsonl"))
    seen = prompts_trained_on(trained)
    assert code == 0 and len(prompts) == len(rows) - len(seen) and not seen & set(prompts)
    assert f"{len(seen)} left out" in capsys.readouterr().out


def test_with_nothing_but_rows_it_was_trained_on_the_command_says_so(trained, tmp_path, capsys):
    seen = prompts_trained_on(trained)
    rows = Path(trained.config.data).read_text().splitlines()
    (tmp_path / "seen.jsonl").write_text("\n".join(row for row in rows if json.loads(row)["prompt_id"] in seen))
    assert judged(trained, tmp_path / "out", "--data", str(tmp_path / "seen.jsonl")) == (1, [])
    assert "trained on all usable pairs" in capsys.readouterr().err


def test_equal_pairs_are_equal_under_another_path_and_another_cut_of_them_is_refused(trained, tmp_path, capsys):
    copy = shutil.copy(trained.config.data, tmp_path / "copied.jsonl")
    assert judged(trained, tmp_path / "out", "-p", "DATA", str(copy))[0] == 0
    assert judged(trained, tmp_path / "out", "-p", "SEED", "7")[0] == 1
    said = capsys.readouterr().err
    assert re.search(r"was trained on \d of these \d test pairs", said) and "SEED" in said


def test_neither_adapter_nor_report_names_a_folder_of_this_machine(trained, tmp_path):
    assert judged(trained, tmp_path / "out")[0] == 0
    texts = [p.read_bytes() for d in (trained.adapter, tmp_path / "out") for p in d.rglob("*") if p.is_file()]
    for place in (trained.config.model, trained.config.data, str(trained.dir)):
        assert not any(str(Path(place).parent).encode() in text for text in texts), place
    card = (trained.adapter / "README.md").read_text()
    assert "| Data | rows.jsonl |" in card and "| Base | tiny-llama |" in card and "| Base weights | NF4 |" in card


def test_an_adapter_away_from_its_run_says_which_base_it_needs_and_takes_it_by_any_name(trained, tmp_path, capsys):
    away = shutil.copytree(trained.adapter, tmp_path / "away" / "adapter")
    options = ["compare", "--adapter", str(away), "--out", str(tmp_path / "out")]
    assert cli.main(options) == 1
    assert "trained on tiny-llama (digest" in capsys.readouterr().err
    renamed = shutil.copytree(trained.config.model, tmp_path / "renamed")
    assert cli.main([*options, "-p", "MODEL", str(renamed), "-p", "DATA", trained.config.data]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--adapter", "no-such-folder"], "There is no trained adapter in no-such-folder"),
        (["--adapter", "ADAPTER", "--data", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--adapter", "ADAPTER", "-p", "BTA", "0.2"], "Unknown parameter BTA"),
    ],
)
def test_the_command_names_cause_and_fix(options, words, trained, tmp_path, capsys):
    options = [str(trained.adapter) if o == "ADAPTER" else o for o in options]
    assert cli.main(["compare", *options, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert words in said and "Fix:" in said
