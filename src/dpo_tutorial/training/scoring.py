"""Log-probabilities and implicit rewards of pairs, under the policy and under the reference."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import use_adapter

from ..knobs import Config
from ..machine import hardware
from ..pairs import encoding
from . import dpo, prefix


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

    A prompt is computed once for both answers, as in training (`prefix`), where there is more than one batch and no
    padding is asked for.

    Returns:
        One record per pair, in order: `prompt_id`; log-probabilities in nats (`policy_chosen`, `policy_rejected`,
        `reference_chosen`, `reference_rejected`); `reward_chosen`, `reward_rejected`, `margin`;
        `chosen_token_rewards`, `rejected_token_rewards` (beta times the log-ratio of each token; they add up to the
        reward); `chosen_tokens`, `rejected_tokens`.
    """
    beta = config.beta if beta is None else beta
    encoded = [
        encoding.encode(tokenizer, pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")
    ]
    scored = zip(*answer_log_probs(config, model, tokenizer, encoded, padding, sides=2), strict=True)
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
def answer_log_probs(
    config: Config, model: PeftModel, tokenizer: PreTrainedTokenizerBase, encoded, padding: int = 0, sides: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities of the answer's tokens, `[answer length]` each, of (prompt ids, answer ids) in the given order.

    Policy and reference see the same batches, so that their difference is free of padding noise.

    Args:
        sides: 2 where two in a row always answer one prompt, as of `score_pairs`.
    """
    model.eval()
    policy, reference = ([torch.empty(0)] * len(encoded) for _ in range(2))
    lengths = np.array([sum(map(len, ids)) for ids in encoded], dtype=int).reshape(-1, sides).max(1) + padding
    size = 2 * config.batch_size  # of similar length and without gradients: twice the training batch fits
    shared = config.prefix_sharing and sides == 2 and not padding and len(lengths) > size
    shared = shared and not prefix.obstacle(model.get_base_model())
    with prefix.sharing(model.get_base_model(), lengths.max()) if shared else nullcontext():
        for rows in batches(lengths, size, "scoring"):
            chosen = [sides * row + side for side in range(sides) for row in rows]  # first sides, then second ones
            batch = collate([encoded[i] for i in chosen], tokenizer.pad_token_id, model.device, padding)
            found = log_probs_of(config, model, batch)
            with reference_of(model):
                base = log_probs_of(config, model, batch)
            for i, ours, theirs in zip(chosen, found, base, strict=True):
                policy[i], reference[i] = ours, theirs
    return policy, reference


@torch.no_grad()
def answer_kl(config: Config, model: PeftModel, tokenizer: PreTrainedTokenizerBase, encoded) -> list[Tensor]:
    """KL(policy ‖ base) of the next token, summed over the whole vocabulary, at each token of the answers.

    Returns:
        `[answer length]` each, nats, in the order of the (prompt ids, answer ids); below 0 only by rounding.
    """
    model.eval()
    found = [torch.empty(0)] * len(encoded)
    size = 2 * config.batch_size  # a training step has twice as many sequences; here are logits of two models
    for chosen in batches([sum(map(len, ids)) for ids in encoded], size, "measuring KL"):
        batch = collate([encoded[i] for i in chosen], tokenizer.pad_token_id, model.device)
        ours = answer_logits(config, model, batch)
        with model.disable_adapter():
            theirs = answer_logits(config, model, batch)
        for i, row, other in zip(chosen, ours, theirs, strict=True):
            p, q = (logits[:-1].float().log_softmax(-1) for logits in (row, other))  # the last predicts what follows it
            found[i] = (p.exp() * (p - q)).sum(-1).double().cpu()
    return found


def batches(lengths: Sequence[int], size: int, what: str) -> Iterator[list[int]]:
    """Places of sequences in batches of similar length, so that little is padding; with a progress bar.

    The longest come first: memory peaks at once, and later batches fit into what earlier ones gave back.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in tqdm(range(0, len(order), size), desc=what, leave=False):
        yield order[start : start + size]


def reference_of(model: PeftModel):
    """Inside the block `model` is the reference: its adapter off, or TRL's adapter `ref` where there is one."""
    return use_adapter(model, "ref" if "ref" in model.peft_config else None)


def log_probs_of(config: Config, model: PreTrainedModel | PeftModel, batch: dict) -> list[Tensor]:
    """Log-probabilities of the answers' tokens, nats, `[answer length]` each, of a batch as `collate` makes it."""
    ids = [row[kept][None] for row, kept in zip(batch["input_ids"], _from_the_prompt(batch), strict=True)]
    found = zip(answer_logits(config, model, batch), ids, strict=True)  # one by one: softmax in fp32 is large
    return [dpo.token_log_probs(logits[None], row)[0].double().cpu() for logits, row in found]


def answer_logits(config: Config, model: PreTrainedModel | PeftModel, batch: dict) -> tuple[Tensor, ...]:
    """Logits from the last token before each answer to its end, `[answer length + 1, vocabulary]` each.

    In the precision of training. The LM head, a fifth of a small model's work, leaves prompt and padding out.
    """
    kept = _from_the_prompt(batch)
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, states: (states[0][kept][None],))
    mixed = hardware.device() == "cpu" and config.dtype != "fp32"  # adapters read their input as it is: no bit changes
    try:
        with autocast(config), disable_input_dtype_casting(model, active=mixed):
            out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        hook.remove()
    return out.logits[0].split(kept.sum(1).tolist())


def _from_the_prompt(batch: dict) -> Tensor:
    """True on each answer and on the token before it, which predicts its first; `[n, length]`."""
    answer = batch["completion_mask"].bool()
    return answer | F.pad(answer[:, 1:], (0, 1))


def autocast(config: Config):
    """The mixed precision of training, so that evaluation sees the numbers that training saw."""
    dtype = hardware.torch_dtype(config.dtype)
    return torch.autocast(hardware.device(), dtype=dtype, enabled=dtype != torch.float32)


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
    batch = {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}
    return {name: numbers.to(device) for name, numbers in batch.items()}


def noise_floor(
    config: Config,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    records: Sequence[dict],
    beta: float | None = None,
) -> dict:
    """How far rounding alone moves a margin: the first pairs again, in other batches, padded, no prompt shared.

    In exact arithmetic padding changes nothing. In 16 bits, sums come out differently, and a log-probability of an
    answer moves by tenths of a nat. `records` are what `score_pairs` gave for all of `pairs`, in order.

    Returns:
        `spread`: root mean square of the differences between both margins; `floor`: 1.96 times that; `within`: how
        many of all records have a |margin| below the floor; `pairs`: scored again; `dtype`.
    """
    again = pairs.select(range(min(16, config.compare_prompts, len(pairs))))
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
        _, ids = encoding.encode(tokenizer, pair["prompt"], pair[side])
        shown[side] = encoding.pieces(tokenizer, ids, record[f"{side}_token_rewards"])
    return shown
