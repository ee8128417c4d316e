"""Judge the change: implicit rewards on held-out pairs, with intervals, and answers before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy.sparse
import torch
from datasets import Dataset
from statsmodels.stats.proportion import proportion_confint
from tqdm.auto import tqdm

from . import data, dpo, environment
from .config import Config


def score_pairs(config: Config, model, tokenizer, pairs: Dataset, beta: float | None = None) -> list[dict]:
    """Score each pair under the policy and, with the adapter switched off, under the reference.

    Args:
        model: a `PeftModel`; with its adapter disabled it is the reference.
        beta: the beta the policy was trained with; default `config.beta`.

    Returns:
        One record per pair, in order: `prompt_id`; log-probabilities in nats (`policy_chosen`, `policy_rejected`,
        `reference_chosen`, `reference_rejected`); `reward_chosen`, `reward_rejected`, `margin`;
        `chosen_tokens`, `rejected_tokens`.
    """
    beta = config.beta if beta is None else beta
    encoded = []
    for pair in pairs:
        for side in ("chosen", "rejected"):
            encoded.append(data.encode(tokenizer, pair["prompt"], pair[side]))
    policy, reference = _log_probs(config, model, tokenizer, encoded)
    records = []
    for i, pair in enumerate(pairs):
        (pc, pr), (rc, rr) = policy[2 * i : 2 * i + 2].tolist(), reference[2 * i : 2 * i + 2].tolist()
        chosen, rejected = dpo.implicit_reward(pc, rc, beta), dpo.implicit_reward(pr, rr, beta)
        records.append({
            "prompt_id": pair["prompt_id"],
            "policy_chosen": pc, "policy_rejected": pr, "reference_chosen": rc, "reference_rejected": rr,
            "reward_chosen": chosen, "reward_rejected": rejected, "margin": chosen - rejected,
            "chosen_tokens": len(encoded[2 * i][1]), "rejected_tokens": len(encoded[2 * i + 1][1]),
        })  # fmt: skip
    return records


@torch.no_grad()
def _log_probs(config: Config, model, tokenizer, encoded) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence log-probabilities of (prompt ids, answer ids), under policy and reference, in the given order.

    Sorted by length so that little is padding; both models see the same batches, so that their difference is free
    of padding noise.
    """
    model.eval()
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]) + len(encoded[i][1]))
    policy, reference = torch.zeros(len(encoded)), torch.zeros(len(encoded))
    size = 4 * config.batch_size  # of similar length and without gradients: twice the training batch fits
    for start in tqdm(range(0, len(order), size), desc="scoring", leave=False):
        chosen = order[start : start + size]
        batch = collate([encoded[i] for i in chosen], tokenizer.pad_token_id, model.device)
        policy[chosen] = _forward(config, model, batch)
        with model.disable_adapter():
            reference[chosen] = _forward(config, model, batch)
    return policy, reference


def _forward(config: Config, model, batch: dict) -> torch.Tensor:
    with autocast(config):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    rows = zip(
        logits, batch["input_ids"], batch["completion_mask"], strict=True
    )  # row by row: softmax in fp32 is large
    return torch.cat([dpo.sequence_log_prob(a[None], b[None], c[None]) for a, b, c in rows]).cpu()


def autocast(config: Config):
    """The mixed precision of training, so that evaluation sees the numbers that training saw."""
    dtype = environment.torch_dtype(config.dtype)
    return torch.autocast(environment.device(), dtype=dtype, enabled=dtype != torch.float32)


def collate(encoded: Sequence[tuple[list[int], list[int]]], pad_id: int, device="cpu") -> dict[str, torch.Tensor]:
    """Pad on the right into `input_ids`, `attention_mask`, `completion_mask`, each `[n, length]`."""
    length = max(len(p) + len(a) for p, a in encoded)
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


# --- statistics ---------------------------------------------------------------------------------------------------


def rate(hits: float, n: int) -> dict:
    """A share with its 95% Wilson interval (statsmodels); `hits` may count a tie as one half."""
    low, high = proportion_confint(hits, n, alpha=0.05, method="wilson")
    return {"rate": hits / n, "low": float(low), "high": float(high), "n": n}


def mean(values: Sequence[float]) -> dict:
    """A mean with its standard error."""
    values = np.asarray(values, dtype=float)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return {"mean": float(values.mean()), "standard_error": float(error), "n": len(values)}


def summarise(records: Sequence[dict]) -> dict:
    """Everything the report says of held-out pairs, derived from the row-level records.

    A pair is right when the chosen answer earns the higher implicit reward; a tie counts half. Before training every
    pair ties (policy and reference are one model), so the accuracy is 0.5 by construction.
    """
    margins = np.array([r["margin"] for r in records])
    gaps = np.array([r["chosen_tokens"] - r["rejected_tokens"] for r in records])
    n = len(records)
    return {
        "accuracy": rate(float((margins > 0).sum() + 0.5 * (margins == 0).sum()), n),
        "ties": int((margins == 0).sum()),
        "margin": mean(margins),
        "reward_chosen": mean([r["reward_chosen"] for r in records]),
        "reward_rejected": mean([r["reward_rejected"] for r in records]),
        "pick_the_longer": rate(float((gaps > 0).sum() + 0.5 * (gaps == 0).sum()), n),
        "pick_the_shorter": rate(float((gaps < 0).sum() + 0.5 * (gaps == 0).sum()), n),
    }


def bag_of_words_accuracy(train: Dataset, test: Dataset) -> dict:
    """How well a logistic regression over words and word pairs tells chosen from rejected on `test`.

    It sees the difference of the two answers' word counts and nothing else: no prompt, no word order.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    def texts(split, side):
        return [answer[0]["content"] for answer in split[side]]

    words = CountVectorizer(ngram_range=(1, 2), min_df=2, token_pattern=r"[\w']+|[^\w\s]")
    words.fit(texts(train, "chosen") + texts(train, "rejected"))

    def difference(split):
        return words.transform(texts(split, "chosen")).astype(float) - words.transform(texts(split, "rejected"))

    x = difference(train)
    model = LogisticRegression(fit_intercept=False, C=0.1, max_iter=1000)
    model.fit(scipy.sparse.vstack([x, -x]), [1] * x.shape[0] + [0] * x.shape[0])
    score = model.decision_function(difference(test))
    return rate(float((score > 0).sum() + 0.5 * (score == 0).sum()), len(score))


# --- generation ---------------------------------------------------------------------------------------------------


def generate(config: Config, model, tokenizer, prompts: Sequence[list[dict]], max_new_tokens: int | None = None):
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
def _answer_ids(config: Config, model, tokenizer, prompts, limit: int, sample: bool) -> list[list[int]]:
    """Token ids of one answer per prompt, the EOS included where there is one; greedy, or drawn from the model."""
    model.eval()
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
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
    config: Config, model, tokenizer, prompts: Sequence[list[dict]], max_new_tokens: int | None = None
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
    ratios, lengths = (policy - reference).numpy(), np.array([len(answer) for answer in answers])
    per_token = ratios.sum() / lengths.sum()
    spread = mean((ratios - per_token * lengths) / lengths.mean())  # a ratio of two means: the delta method
    return {
        "per_answer": mean(ratios),
        "per_token": spread | {"mean": float(per_token)},
        "tokens": int(lengths.sum()),
    }


def rule_rates(answers: Sequence[dict], rules: dict[str, Callable[[dict], bool]]) -> dict[str, dict]:
    """Share of answers that keep each rule, with its interval."""
    return {name: rate(float(sum(check(a) for a in answers)), len(answers)) for name, check in rules.items()}


def distinct(text: str, n: int = 2) -> float:
    """distinct-n (Li et al. 2016): different n-grams of words over all n-grams; 1.0 means no repetition."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


# --- in words -----------------------------------------------------------------------------------------------------


def verdict(held_out: dict, rules_before: dict, rules_after: dict) -> list[str]:
    """What changed and what did not, one sentence each, drawn from the numbers."""
    a, chosen, rejected = held_out["accuracy"], held_out["reward_chosen"]["mean"], held_out["reward_rejected"]["mean"]
    span = f"{a['rate']:.2f} (95% interval {a['low']:.2f} to {a['high']:.2f}, {a['n']} pairs)"
    if a["low"] > 0.5:
        said = [f"The policy tells chosen from rejected on held-out pairs: accuracy {span}, against 0.50 before."]
    elif a["high"] < 0.5:
        said = [f"The policy prefers the rejected answers: accuracy {span}. Look for swapped labels."]
    else:
        said = [f"No effect is shown on held-out pairs: accuracy {span} includes 0.50."]
    if chosen > 0 > rejected:
        said.append(
            f"Chosen answers became more likely (reward {chosen:+.2f}) and rejected ones less ({rejected:+.2f})."
        )
    elif chosen < 0 and rejected < 0:
        said.append(
            f"Both sides became less likely (rewards {chosen:+.2f} and {rejected:+.2f}): DPO raises the difference, "
            "not the chosen answer. Some fall is usual; a long fall is a sign to stop earlier or raise beta."
        )
    else:
        said.append(f"Rewards: chosen {chosen:+.2f}, rejected {rejected:+.2f}.")
    moved, still = [], []
    for name, before in rules_before.items():
        after = rules_after[name]
        line = f"{name} {before['rate']:.0%} → {after['rate']:.0%}"
        apart = after["low"] > before["high"] or after["high"] < before["low"]
        (moved if apart else still).append(line)
    n = next(iter(rules_before.values()))["n"]
    if moved:
        said.append(f"In {n} generated answers these moved beyond their intervals: {'; '.join(moved)}.")
    said.append(
        f"Not shown to move with {n} answers: {'; '.join(still)}."
        if still
        else "Every rule that a program can check moved."
    )
    return said
