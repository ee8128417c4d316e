"""Is what was exported still what was trained? The same held-out pairs, scored again by the export itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..comparing import generation, stats
from ..errors import ModelUnsuitableError, first_line
from ..knobs import Config
from ..machine import hardware
from ..pairs import encoding
from ..training import dpo

PROMPTS, TOKENS = 8, 64

#: Of each measure the largest value that a faithful export may have; `benchmarks/export.md` has what they measured.
LIMITS = {"margin_change_share": 0.10, "kl": 0.01, "other_tokens": 0.05}


@dataclass(frozen=True)
class Exported:
    """An export, opened by what scores it.

    Args:
        engine: which library that is, in words.
        logits: token ids → `[length, vocabulary]` in float32 on the CPU; row t predicts token t + 1.
        encode: (prompt, answer), lists of messages → (prompt ids, answer ids), through the export's own template.
        eos: the tokens that end its answers.
    """

    engine: str
    logits: Callable[[list[int]], Tensor]
    encode: Callable[[list[dict], list[dict]], tuple[list[int], list[int]]]
    eos: frozenset[int]


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel, ids: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float().cpu()


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: list[dict], answer: list[dict]) -> tuple[list[int], list[int]]:
    """As `encoding.encode`, which refuses a template that is wrong: here that is to be measured."""
    options = dict(tokenize=True, return_dict=False)
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
    return before, tokenizer.apply_chat_template(prompt + answer, **options)[len(before) :]


# --- opening an export --------------------------------------------------------------------------------------------


def open_folder(folder: Path, config: Config) -> Exported:
    """A merged folder, opened by plain transformers in `config.dtype`."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=hardware.torch_dtype(config.dtype), device_map={"": hardware.device()}, trust_remote_code=False
    ).eval()
    eos = model.generation_config.eos_token_id
    return Exported(
        "transformers",
        lambda ids: logits_of(model, ids),
        lambda prompt, answer: _encode(tokenizer, prompt, answer),
        frozenset(eos if isinstance(eos, list) else [eos]),
    )


def open_gguf(path: Path, config: Config) -> Exported:
    """A GGUF file, opened by transformers, which dequantizes it and computes in `config.dtype`.

    So the gate sees what the file holds (weights, vocabulary, template, EOS), not what llama.cpp's kernels make of it.

    Raises:
        ModelUnsuitableError: transformers cannot read this kind of GGUF.
    """
    from gguf import GGUFReader

    where = dict(gguf_file=path.name, trust_remote_code=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=hardware.torch_dtype(config.dtype), **where)
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ModelUnsuitableError(
            f"{path.name} cannot be scored again: {first_line(error)}", "Export the merged folder instead."
        ) from error
    model = model.to(hardware.device()).eval()
    names = ("chat_template", "ggml.bos_token_id", "ggml.add_bos_token", "ggml.eos_token_id")
    written = GGUFReader(path).fields
    fields = {n: written[f"tokenizer.{n}"].contents() for n in names if f"tokenizer.{n}" in written}
    tokenizer.chat_template = fields["chat_template"]
    first = [fields["ggml.bos_token_id"]] if fields.get("ggml.add_bos_token") else []

    def encode(prompt, answer):
        before, after = _encode(tokenizer, prompt, answer)
        return first + before, after  # llama.cpp puts it there, whether the template has it already or not

    eos = frozenset([fields["ggml.eos_token_id"]])
    return Exported("transformers' GGUF reader", lambda ids: logits_of(model, ids), encode, eos)


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(
    config: Config,
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    exported: Exported,
    pairs: Dataset,
    beta: float,
) -> dict:
    """Score held-out pairs by the adapter on its 4-bit base and by the export, and say whether they are one model.

    Greedy answers are compared without generating twice: along the adapter's own answer, the export's likeliest token
    at each place is the one it would have written, up to and including the first that differs.

    Returns:
        `engine`; `pairs`; `accuracy` and `margin` (mean), each with `adapter` and `exported`; `margin_change_rms`,
        `margin_change_share` (of the root mean square margin), `margin_change_largest`; `kl` (adapter ‖ export, nats
        per answer token); `other_tokens` (share of places where the likeliest token differs); `greedy`: `prompts`,
        `equal`, `differs` (the first differing prompt, where and how; or None); `prompts_equal` (share with the same
        ids); `one_eos`; `why` (reasons it is not the trained model, empty if it is).
    """
    margins: dict[str, list[float]] = {"adapter": [], "exported": []}
    divergences, other, same_prompt, one_eos = [], [], [], []
    for pair in tqdm(pairs, desc="gate", leave=False):
        rewards: dict[str, list[float]] = {"adapter": [], "exported": []}
        for side in ("chosen", "rejected"):
            theirs = encoding.encode(tokenizer, pair["prompt"], pair[side])
            ours = exported.encode(pair["prompt"], pair[side])
            trained = logits_of(policy, sum(theirs, []))
            with policy.disable_adapter():
                base = _log_prob(logits_of(policy, sum(theirs, [])), theirs)
            found = exported.logits(sum(ours, []))
            rewards["adapter"].append(beta * (_log_prob(trained, theirs) - base))
            rewards["exported"].append(beta * (_log_prob(found, ours) - base))
            same_prompt.append(theirs[0] == ours[0])
            one_eos.append([i for i in ours[1] if i in exported.eos] == [tokenizer.eos_token_id])
            if ours == theirs:
                rows = slice(len(theirs[0]) - 1, -1)  # the rows that predict the answer's tokens
                divergences.append(_kl(trained[rows], found[rows]))
                other.append(trained[rows].argmax(-1) != found[rows].argmax(-1))
        for who, (chosen, rejected) in rewards.items():
            margins[who].append(chosen - rejected)
    changes = np.subtract(margins["exported"], margins["adapter"])
    rms = float(np.sqrt(np.mean(changes**2)))
    found = {
        "engine": exported.engine, "pairs": len(pairs),
        "accuracy": {who: stats.accuracy(values)["rate"] for who, values in margins.items()},
        "margin": {who: float(np.mean(values)) for who, values in margins.items()},
        "margin_change_rms": rms,
        "margin_change_share": rms / max(float(np.sqrt(np.mean(np.square(margins["adapter"])))), 1e-9),
        "margin_change_largest": float(np.abs(changes).max()),
        "kl": float(torch.cat(divergences).mean()) if divergences else None,
        "other_tokens": float(torch.cat(other).float().mean()) if other else None,
        "greedy": _greedy(config, policy, tokenizer, exported, pairs["prompt"][:PROMPTS]),
        "prompts_equal": float(np.mean(same_prompt)), "one_eos": all(one_eos),
    }  # fmt: skip
    return found | {"why": judge(found)}


def _log_prob(logits: Tensor, encoded: tuple[list[int], list[int]]) -> float:
    prompt, answer = encoded
    ids = torch.tensor([prompt + answer])
    return dpo.token_log_probs(logits[None], ids)[0, len(prompt) - 1 :].double().sum().item()


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of each row, in nats."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _greedy(config, policy, tokenizer, exported: Exported, prompts: Sequence[list[dict]]) -> dict:
    answers = generation._answer_ids(config, policy, tokenizer, prompts, TOKENS, sample=False)
    differs, equal = None, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = exported.encode(prompt, [{"role": "assistant", "content": "."}])[0]
        written = exported.logits(ids + answer)[len(ids) - 1 : -1].argmax(-1).tolist()
        at = next((i for i, (a, b) in enumerate(zip(answer, written, strict=True)) if a != b), None)
        equal += at is None
        if at is not None and differs is None:
            after = tokenizer.decode(answer[max(0, at - 8) : at])
            differs = {
                "prompt": prompt[-1]["content"], "token": at, "after": after,
                "adapter": tokenizer.decode([answer[at]]), "exported": tokenizer.decode([written[at]]),
            }  # fmt: skip
    return {"prompts": len(prompts), "equal": equal, "differs": differs}


def judge(found: dict) -> list[str]:
    """Why an export is not the trained model, one sentence each; none where it is."""
    why = []
    if found["prompts_equal"] < 1:
        why.append(f"Its template or tokenizer gives {1 - found['prompts_equal']:.0%} of the prompts other token ids.")
    if not found["one_eos"]:
        why.append("An answer does not end with exactly one EOS that the export stops at.")
    names = {"margin_change_share": "The margins changed by {} of their size", "kl": "KL per token is {} nats",
             "other_tokens": "The likeliest token is another at {} of all places"}  # fmt: skip
    for name, limit in LIMITS.items():
        if found[name] is not None and not found[name] <= limit:  # also where it is not a number
            why.append(f"{names[name].format(f'{found[name]:.3f}')} (limit {limit:g}).")
    return why


def rows(found: dict) -> list[dict]:
    """What `measure` found as a table: measure, adapter, export, limit."""
    greedy, differs = found["greedy"], found["greedy"]["differs"]
    told = (
        f"“…{differs['after']}” goes on with “{differs['adapter']}”, exported with “{differs['exported']}”"
        if differs else "no difference"
    )  # fmt: skip
    change, limit = found["margin_change_rms"], LIMITS["margin_change_share"]
    lines = [
        ("scored by", "adapter on its 4-bit base", found["engine"], ""),
        (f"accuracy, {found['pairs']} pairs", found["accuracy"]["adapter"], found["accuracy"]["exported"], ""),
        ("mean margin", found["margin"]["adapter"], found["margin"]["exported"], ""),
        ("change of a margin, rms", "", change, f"{limit:.0%} of the margins' rms: {found['margin_change_share']:.1%}"),
        ("change of a margin, largest", "", found["margin_change_largest"], ""),
        ("KL per token, nats", "", _or_none(found["kl"]), LIMITS["kl"]),
        ("places with another likeliest token", "", _or_none(found["other_tokens"]), LIMITS["other_tokens"]),
        (f"first {TOKENS} greedy tokens equal", f"{greedy['prompts']} prompts", f"{greedy['equal']}; {told}", ""),
        ("prompts with equal token ids", "", found["prompts_equal"], "all"),
        ("one EOS in each answer", "", "yes" if found["one_eos"] else "no", "yes"),
        ("the trained model", "", "no: " + " ".join(found["why"]) if found["why"] else "yes", ""),
    ]
    return [dict(zip(("measure", "adapter", "exported", "limit"), line, strict=True)) for line in lines]


def _or_none(value: float | None) -> float | str:
    return "other token ids" if value is None else value
