"""Judge the change: implicit rewards on held-out pairs, answers before and after, how far the policy moved.

`dpo-tutorial compare --adapter DIR` gives the report of notebook 06 without a notebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from . import artifacts, data, dpo, environment, house_style, models, statistics
from .config import Config, resolve


def score_pairs(
    config: Config,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    beta: float | None = None,
    padding: int = 0,
) -> list[dict]:
    """Score each pair under the policy and, with the adapter switched off, under the reference.

    Args:
        model: a `PeftModel`; with its adapter disabled it is the reference.
        beta: the beta the policy was trained with; default `config.beta`.
        padding: columns of padding beyond what the batches need, to see what rounding does (`noise_floor`).

    Returns:
        One record per pair, in order: `prompt_id`; log-probabilities in nats (`policy_chosen`, `policy_rejected`,
        `reference_chosen`, `reference_rejected`); `reward_chosen`, `reward_rejected`, `margin`;
        `chosen_token_rewards`, `rejected_token_rewards` (beta times the log-ratio of each token; they add up to the
        reward); `chosen_tokens`, `rejected_tokens`.
    """
    beta = config.beta if beta is None else beta
    encoded = [data.encode(tokenizer, pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")]
    scored = zip(*_log_probs(config, model, tokenizer, encoded, padding), strict=True)
    records = []
    for pair, chosen, rejected in zip(pairs, scored, scored, strict=True):
        record = {"prompt_id": pair["prompt_id"]}
        for side, (policy, reference) in (("chosen", chosen), ("rejected", rejected)):
            tokens = dpo.implicit_reward(policy, reference, beta)
            record |= {
                f"policy_{side}": policy.sum().item(), f"reference_{side}": reference.sum().item(),
                f"reward_{side}": tokens.sum().item(), f"{side}_tokens": len(tokens),
                f"{side}_token_rewards": [round(value, 6) for value in tokens.tolist()],
            }  # fmt: skip
        records.append(record | {"margin": record["reward_chosen"] - record["reward_rejected"]})
    return records


@torch.no_grad()
def _log_probs(
    config: Config, model: PeftModel, tokenizer: PreTrainedTokenizerBase, encoded, padding: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities of the answer's tokens, `[answer length]` each, of (prompt ids, answer ids) in the given order.

    Sorted by length so that little is padding, the longest first: memory peaks at once, and later batches fit into
    what earlier ones gave back. Policy and reference see the same batches, so that their difference is free of padding
    noise.
    """
    model.eval()
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]) - len(encoded[i][1]))
    policy, reference = ([torch.empty(0)] * len(encoded) for _ in range(2))
    size = 2 * config.batch_size  # of similar length and without gradients: twice the training batch fits
    for start in tqdm(range(0, len(order), size), desc="scoring", leave=False):
        chosen = order[start : start + size]
        batch = collate([encoded[i] for i in chosen], tokenizer.pad_token_id, model.device, padding)
        found = _forward(config, model, batch)
        with model.disable_adapter():
            base = _forward(config, model, batch)
        for i, ours, theirs in zip(chosen, found, base, strict=True):
            policy[i], reference[i] = ours, theirs
    return policy, reference


def _forward(config: Config, model: PeftModel, batch: dict) -> list[Tensor]:
    with autocast(config):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    rows = zip(logits, batch["input_ids"], batch["completion_mask"], strict=True)
    return [  # row by row: softmax in fp32 is large
        dpo.token_log_probs(row[None], ids[None])[0][mask[1:].bool()].double().cpu() for row, ids, mask in rows
    ]


def autocast(config: Config):
    """The mixed precision of training, so that evaluation sees the numbers that training saw."""
    dtype = environment.torch_dtype(config.dtype)
    return torch.autocast(environment.device(), dtype=dtype, enabled=dtype != torch.float32)


def collate(
    encoded: Sequence[tuple[list[int], list[int]]], pad_id: int, device="cpu", padding: int = 0
) -> dict[str, Tensor]:
    """Pad on the right into `input_ids`, `attention_mask`, `completion_mask`, each `[n, length]`.

    `padding` adds so many columns that no row needs.
    """
    length = max(len(p) + len(a) for p, a in encoded) + padding
    ids = torch.full((len(encoded), length), pad_id)
    attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(encoded):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        attention[row, :end] = 1
        completion[row, len(prompt) : end] = 1
    return {
        "input_ids": ids.to(device),
        "attention_mask": attention.to(device),
        "completion_mask": completion.to(device),
    }


def noise_floor(
    config: Config,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    records: Sequence[dict],
    beta: float | None = None,
) -> dict:
    """How far rounding alone moves a margin: the first pairs scored again, in other batches and with other padding.

    In exact arithmetic padding changes nothing. In 16 bits, sums come out differently, and a log-probability of an
    answer moves by tenths of a nat.

    Args:
        records: what `score_pairs` gave for all of `pairs`, in order.

    Returns:
        `spread`: root mean square of the differences between both margins; `floor`: 1.96 times that; `within`: how
        many of all records have a |margin| below the floor; `pairs`: scored again; `dtype`.
    """
    again = pairs.select(range(min(config.compare_prompts, len(pairs))))
    second = score_pairs(config, model, tokenizer, again, beta, padding=24)
    changes = np.array([b["margin"] - a["margin"] for a, b in zip(records, second, strict=False)])
    spread = float(np.sqrt(np.mean(changes**2)))
    within = sum(abs(r["margin"]) < 1.96 * spread for r in records)
    return {
        "spread": spread, "floor": 1.96 * spread, "within": within, "pairs": len(again), "dtype": config.dtype,
    }  # fmt: skip


def token_rewards(tokenizer: PreTrainedTokenizerBase, pair: dict, record: dict) -> dict:
    """The tokens of both answers of one pair in words, each with its share of the reward: what a heat map shows.

    Returns:
        `prompt` (conversation); `chosen` and `rejected`: lists of (text, reward); `reward_chosen`, `reward_rejected`.
    """
    shown = {name: record[name] for name in ("reward_chosen", "reward_rejected")} | {"prompt": pair["prompt"]}
    for side in ("chosen", "rejected"):
        rewards = iter(record[f"{side}_token_rewards"])
        pieces = data.pieces(tokenizer, data.encode(tokenizer, pair["prompt"], pair[side])[1])
        shown[side] = [(text, sum(next(rewards) for _ in range(n))) for text, n in pieces]
    return shown


# --- generation ---------------------------------------------------------------------------------------------------


def generate(
    config: Config,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict]],
    max_new_tokens: int | None = None,
):
    """Answer each conversation greedily.

    Returns:
        One `{"text", "tokens", "finished"}` per prompt, in order; `finished` is False where the limit cut the answer.
    """
    answers = []
    for ids in _answer_ids(config, model, tokenizer, prompts, max_new_tokens or config.max_new_tokens, sample=False):
        finished = ids[-1:] == [tokenizer.eos_token_id]
        ids = ids[:-1] if finished else ids
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        answers.append({"text": text, "tokens": len(ids), "finished": finished})
    return answers


@torch.no_grad()
def _answer_ids(
    config: Config, model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts, limit: int, sample: bool
) -> list[list[int]]:
    """Token ids of one answer per prompt, the EOS included where there is one; greedy, or drawn from the model."""
    model.eval()
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    side, tokenizer.padding_side = tokenizer.padding_side, "left"  # every answer starts at the same column
    how = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0) if sample else dict(do_sample=False)
    answers: list[list[int]] = [[]] * len(texts)
    try:
        for start in tqdm(range(0, len(order), 24), desc="generating", leave=False):
            chosen = order[start : start + 24]
            batch = tokenizer([texts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False)
            with autocast(config):
                out = model.generate(
                    **batch.to(model.device), **how, max_new_tokens=limit, use_cache=True,
                    repetition_penalty=1.0,  # a checkpoint may ship its own, which acts under greedy decoding too
                    pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                )  # fmt: skip
            for i, ids in zip(chosen, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
                answers[i] = ids[:end]
    finally:
        tokenizer.padding_side = side
    return answers


def kl_from_reference(
    config: Config,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict]],
    max_new_tokens: int | None = None,
) -> dict:
    """Estimate KL(policy ‖ reference): how far training has moved the model, on answers that it would now give.

    One answer per prompt is drawn from the policy (temperature 1, whole vocabulary, `config.seed`); the mean of
    log π(y|x) − log π_ref(y|x) over these is an unbiased estimate of the KL of answers up to the token limit, the term
    that the RLHF objective holds down (Rafailov et al. 2023, eq. 3).

    Returns:
        `per_answer` and `per_token`, in nats, each `{"mean", "standard_error", "n"}`; `tokens` drawn in all.
    """
    limit = max_new_tokens or config.max_new_tokens
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.seed)
        answers = _answer_ids(config, model, tokenizer, prompts, limit, sample=True)
    encoded = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=False, add_generation_prompt=True)
        encoded.append((ids, answer))
    policy, reference = _log_probs(config, model, tokenizer, encoded)
    ratios = [(ours - theirs).sum().item() for ours, theirs in zip(policy, reference, strict=True)]
    lengths = [len(answer) for answer in answers]
    return {
        "per_answer": statistics.mean(ratios),
        "per_token": statistics.ratio(ratios, lengths),
        "tokens": sum(lengths),
    }


def answers_of_both(
    config: Config, policy: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[dict]]
) -> tuple[list[dict], list[dict]]:
    """(base's answers, policy's answers) to the same prompts, same greedy decoding; the adapter is the difference."""
    with policy.disable_adapter():
        before = generate(config, policy, tokenizer, prompts)
    return before, generate(config, policy, tokenizer, prompts)


def outside_the_style(config: Config, policy: PeftModel, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Requests that the trained style does not cover (`house_style.OUTSIDE`): what base and policy make of them.

    Returns:
        `prompts`, `before`, `after` (answers), `kept` (`before`, `after`: whether each answer does what was asked),
        `kl` as `kl_from_reference`.
    """
    checks = list(house_style.OUTSIDE.items())[: config.compare_prompts]
    prompts = [[{"role": "user", "content": text}] for text, _ in checks]
    before, after = answers_of_both(config, policy, tokenizer, prompts)
    kept = {
        when: [check(a["text"]) for (_, check), a in zip(checks, answers, strict=True)]
        for when, answers in (("before", before), ("after", after))
    }
    kl = kl_from_reference(config, policy, tokenizer, prompts)
    return {"prompts": prompts, "before": before, "after": after, "kept": kept, "kl": kl}


# --- the report ---------------------------------------------------------------------------------------------------


def compare(
    config: Config, policy: PeftModel, tokenizer: PreTrainedTokenizerBase, splits, beta: float
) -> tuple[list[dict], dict]:
    """Everything notebook 06 measures, in one call.

    Args:
        splits: `train` (for the word-counting opponent only) and `test`, as `data.prepare` makes them.

    Returns:
        (the row-level records, the comparison as `derive` makes it).
    """
    test = splits["test"]
    prompts = test[: config.compare_prompts]["prompt"]
    records = score_pairs(config, policy, tokenizer, test, beta)
    noise = noise_floor(config, policy, tokenizer, test, records, beta)
    kl = kl_from_reference(config, policy, tokenizer, prompts)
    before, after = answers_of_both(config, policy, tokenizer, prompts)
    outside = outside_the_style(config, policy, tokenizer)
    words = statistics.bag_of_words(splits["train"], test)
    shown = [token_rewards(tokenizer, pair, record) for pair, record in zip(test, records[:3], strict=False)]
    return records, derive(
        records, prompts, before, after, noise=noise, kl=kl, outside=outside, words=words, shown=shown
    )


def derive(records, prompts, before, after, *, noise, kl, outside, words, shown) -> dict:
    """The report, derived from what was measured: statistics with intervals, and the conclusion in words."""
    held_out = statistics.summarise(records)
    rules, form = statistics.rules(before, after, house_style.RULES), statistics.form(before, after)
    cut = statistics.equal_length(before, after)
    same_length, same_form = statistics.rules(*cut, house_style.OF_TEXT), statistics.form(*cut)
    against_words = {
        "words": statistics.rate(sum(words), len(words)),
        "difference": statistics.paired_difference(words, statistics.right([r["margin"] for r in records])),
    }
    return {
        "held_out": {"before": statistics.summarise(statistics.untrained(records)), "after": held_out},
        "noise": noise,
        "against_words": against_words,
        "by_position": statistics.reward_by_position(records),
        "kl": {"inside": kl, "outside": outside["kl"]},
        "rules": rules,
        "form": form,
        "same_length": same_length,
        "same_form": same_form,
        "outside": outside,
        "verdict": statistics.verdict(held_out, rules, noise, against_words, kl, form, same_length, same_form),
        "token_rewards": shown,
        "answers": [{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)],
    }


def write_report(adapter: str, source: str, out: str, parameters: dict[str, str]) -> None:
    """Judge the adapter in a folder: `comparison.json`, `records.json` and one self-contained `report.html` in `out`.

    Args:
        source: hub id[@revision], folder or file with pairs to judge it on; "" for what it was trained on.
    """
    from . import report  # here, because report.py draws and this module need not

    record = artifacts.read_training_record(Path(adapter))
    beta = record["config"]["beta"]
    recorded = {name: value for name, value in record["config"].items() if name != "dtype"}
    config = resolve(recorded, **({"DATA": source} if source else {}) | parameters)
    environment.seed_everything(config.seed)
    tokenizer = models.load_tokenizer(config)
    run = artifacts.Run(config, Path(out))
    prepared = run.ensure_data(tokenizer)
    if source:
        print("Other data than it was trained on: whether the training rows are among them is for you to know.")
    else:
        run.check_adapter(record, prepared.choices)
    policy = models.load_policy(config, adapter)
    records, comparison = compare(config, policy, tokenizer, prepared.splits, beta)
    for path in report.save(run, record, records, comparison):
        print(f"wrote {path}")
    print("\n".join(comparison["verdict"]))
