"""Is what was exported still what was trained? The same held-out pairs, scored again by the export itself."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..comparing import generation, stats
from ..knobs import Config
from ..pairs import encoding
from .engines import Exported, logits_of

PROMPTS, TOKENS = 24, 64

_USER, _ANSWER = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}
_SYSTEM = {"role": "system", "content": "Be brief."}
#: Tried beside the pairs' own prompts, which seldom have a system turn or a third one.
CONVERSATIONS = [[_SYSTEM, _USER], [_USER, _ANSWER, _USER], [_SYSTEM, _USER, _ANSWER, _USER]]

#: Twice what Q8_0 measured in llama.cpp, the least exact export that keeps the model (`benchmarks/export.md`).
LIMITS = {"margin_change_share": 0.14, "kl": 0.0093, "other_tokens": 0.10}


@dataclass
class Trained:
    """What the adapter on its 4-bit base makes of the held-out pairs: all that an export is compared with.

    Args:
        answers: chosen and rejected of each pair, in turn: prompt, answer, ids of both, logits `[answer length,
            vocabulary]` that predict the answer, and its log-probability under the base in nats.
        greedy: (prompt, ids of its first `TOKENS` greedy tokens) of some prompts.
        talks: (conversation, its ids) of those of `CONVERSATIONS` that its template takes.
    """

    answers: list[tuple[list[dict], list[dict], tuple[list[int], list[int]], Tensor, float]]
    greedy: list[tuple[list[dict], list[int]]]
    talks: list[tuple[list[dict], list[int]]]
    tokenizer: PreTrainedTokenizerBase
    beta: float


def trained(
    config: Config, policy: PeftModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, prompts=None
) -> Trained:
    """Score the pairs by the trained model, once for any number of exports.

    Args:
        prompts: conversations that it answers greedily; default: those of the first `PROMPTS` pairs.
    """
    answers = []
    for pair in tqdm(pairs, desc="scoring", leave=False):
        for side in ("chosen", "rejected"):
            ids = encoding.encode(tokenizer, pair["prompt"], pair[side])
            with policy.disable_adapter():
                base = _log_prob(_rows(logits_of(policy, sum(ids, [])), ids), ids[1])
            answers.append((pair["prompt"], pair[side], ids, _rows(logits_of(policy, sum(ids, [])), ids), base))
    prompts = prompts or pairs["prompt"][:PROMPTS]
    greedy = generation._answer_ids(config, policy, tokenizer, prompts, TOKENS)
    how = dict(add_generation_prompt=True, tokenize=True, return_dict=False)
    tried = [(talk, _ids(lambda talk: tokenizer.apply_chat_template(talk, **how), talk)) for talk in CONVERSATIONS]
    talks = [(talk, ids) for talk, ids in tried if ids is not None]
    return Trained(answers, list(zip(prompts, greedy, strict=True)), talks, tokenizer, config.beta)


def _ids(template: Callable, messages: list[dict]) -> list[int] | None:
    """Token ids of a conversation; None where the template refuses it, as some do a system turn."""
    try:
        return template(messages)
    except Exception:  # a template raises whatever its author wrote
        return None


def measure(model: Trained, exported: Exported) -> dict:
    """Score the same pairs by the export, and say whether both are one model.

    Greedy answers are compared without generating again: along the trained model's own answer, the export's likeliest
    token at each place is the one it would have written, up to and including the first that differs.

    Returns:
        `engine`; `pairs`; `accuracy` and `margin` (mean), each with `adapter` and `exported`; `margin_change_rms`,
        `margin_change_share` (of the root mean square margin), `margin_change_largest`; `kl` (adapter ‖ export, nats
        per answer token) and `other_tokens` (share of places where the likeliest token differs), both None where no
        answer has the same ids; `greedy`: `prompts`, `equal`, `differs` (the first that does; or None);
        `prompts_equal` (share with the same ids, of the pairs' prompts, a pair's twice, and of `talks`); `one_eos`
        (each answer has one, the export stops there, and its tokenizer calls it so); `why` (reasons it is not the
        trained model).
    """
    rewards: dict[str, list[float]] = {"adapter": [], "exported": []}
    apart, other, same_prompt, one_eos = [], [], [], []
    for prompt, answer, ids, logits, base in tqdm(model.answers, desc="gate", leave=False):
        before = exported.ids(prompt, True)  # as `encoding.encode`, but a template that is wrong is to be measured
        ours = before, exported.ids(prompt + answer)[len(before) :]
        rows = _rows(exported.logits(sum(ours, [])), ours)
        rewards["adapter"].append(model.beta * (_log_prob(logits, ids[1]) - base))
        rewards["exported"].append(model.beta * (_log_prob(rows, ours[1]) - base))
        same_prompt.append(ours[0] == ids[0])
        one_eos.append([i for i in ours[1] if i in exported.eos] == [model.tokenizer.eos_token_id])
        if ours == ids:
            p, q = logits.log_softmax(-1), rows.log_softmax(-1)
            apart.append((p.exp() * (p - q)).sum(-1))
            other.append(p.argmax(-1) != q.argmax(-1))
    same_prompt += [_ids(lambda talk: exported.ids(talk, True), talk) == ids for talk, ids in model.talks]
    one_eos.append(exported.turn_end == model.tokenizer.eos_token_id)
    margins = {who: np.subtract(values[::2], values[1::2]) for who, values in rewards.items()}
    changes = margins["exported"] - margins["adapter"]
    rms = float(np.sqrt(np.mean(changes**2)))
    found = {
        "engine": exported.engine, "pairs": len(changes),
        "accuracy": {who: stats.accuracy(values)["rate"] for who, values in margins.items()},
        "margin": {who: float(values.mean()) for who, values in margins.items()},
        "margin_change_rms": rms,
        "margin_change_share": rms / max(float(np.sqrt(np.mean(margins["adapter"] ** 2))), 1e-9),
        "margin_change_largest": float(np.abs(changes).max()),
        "kl": float(torch.cat(apart).mean()) if apart else None,
        "other_tokens": float(torch.cat(other).float().mean()) if other else None,
        "greedy": _greedy(model, exported), "prompts_equal": float(np.mean(same_prompt)), "one_eos": all(one_eos),
    }  # fmt: skip
    return found | {"why": judge(found)}


def _rows(logits: Tensor, ids: tuple[list[int], list[int]]) -> Tensor:
    return logits[len(ids[0]) - 1 : -1].clone()


def _log_prob(rows: Tensor, answer: list[int]) -> float:
    return rows.log_softmax(-1).gather(-1, torch.tensor(answer, dtype=torch.long)[:, None]).double().sum().item()


def _greedy(model: Trained, exported: Exported) -> dict:
    differs, equal = None, 0
    for prompt, answer in model.greedy:
        ids = exported.ids(prompt, True)
        written = _rows(exported.logits(ids + answer), (ids, answer)).argmax(-1).tolist()
        at = next((i for i, (a, b) in enumerate(zip(answer, written, strict=True)) if a != b), None)
        equal += at is None
        if at is not None and differs is None:
            spans = (answer[max(0, at - 8) : at], [answer[at]], [written[at]])
            after, ours, theirs = map(model.tokenizer.decode, spans)
            differs = dict(prompt=prompt[-1]["content"], token=at, after=after, adapter=ours, exported=theirs)
    return {"prompts": len(model.greedy), "equal": equal, "differs": differs}


def judge(found: dict) -> list[str]:
    """Why an export is not the trained model, one sentence each; none where it is."""
    why = []
    if found["prompts_equal"] < 1:
        share = f"{1 - found['prompts_equal']:.1%} of the prompts and conversations"
        why.append(f"Its template or tokenizer gives {share} other token ids.")
    if not found["one_eos"]:
        why.append("An answer does not end with exactly one EOS that its tokenizer names and the export stops at.")
    names = {"margin_change_share": "The margins changed by {} of their size", "kl": "KL per token is {} nats",
             "other_tokens": "The likeliest token is another at {} of all places"}  # fmt: skip
    for name, limit in LIMITS.items():
        if found[name] is not None and not found[name] <= limit:  # also where it is not a number
            why.append(f"{names[name].format(f'{found[name]:.3f}')} (limit {limit:g}).")
    return why


def rows(found: dict) -> list[dict]:
    """What `measure` found as a table: measure, adapter, export, limit."""
    greedy, limit = found["greedy"], LIMITS
    adapter, exported = ({name: found[name][who] for name in ("accuracy", "margin")} for who in ("adapter", "exported"))
    told, share = f"{greedy['equal']} of {greedy['prompts']}", found["margin_change_share"]
    if d := greedy["differs"]:
        told += f"; after “…{d['after']}” it writes “{d['exported']}”, not “{d['adapter']}”"
    other = {n: "other token ids" if found[n] is None else found[n] for n in ("kl", "other_tokens")}
    lines = [
        ("scored by", "4-bit base and adapter", found["engine"], ""),
        (f"accuracy, {found['pairs']} pairs", adapter["accuracy"], exported["accuracy"], ""),
        ("mean margin", adapter["margin"], exported["margin"], ""),
        ("change of a margin, rms", 0, found["margin_change_rms"], ""),
        ("the same, as a share of the margins' rms", 0, share, limit["margin_change_share"]),
        ("change of a margin, largest", 0, found["margin_change_largest"], ""),
        ("KL per token, nats", 0, other["kl"], limit["kl"]),
        ("places with another likeliest token", 0, other["other_tokens"], limit["other_tokens"]),
        (f"first {TOKENS} greedy tokens equal", "", told, ""),
        ("share of prompts with equal token ids", 1, found["prompts_equal"], 1),
        ("one EOS in each answer", "yes", "yes" if found["one_eos"] else "no", "yes"),
        ("the trained model", "", "no: " + " ".join(found["why"]) if found["why"] else "yes", ""),
    ]
    return [dict(zip(("measure", "adapter", "exported", "limit"), line, strict=True)) for line in lines]
