"""What the two models write: greedy answers of both, and how far the policy is from the reference."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice

import bitsandbytes as bnb
import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..knobs import Config
from ..loading import models
from ..machine import memory
from ..training import scoring
from . import stats


def generate(
    config: Config,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict]],
    max_new_tokens: int | None = None,
    seed: int | None = None,
    **how,
) -> list[dict]:
    """Answer each conversation: greedily or, with a seed, drawn from the model.

    Args:
        how: of what is drawn, arguments of transformers' `generate` in place of temperature 1 and all tokens.

    Returns:
        One `{"text", "tokens", "finished"}` per prompt, in order; `finished` is False where the limit cut the answer.
    """
    answers, ends = [], models.generate_arguments(model, tokenizer)["eos_token_id"]
    for ids in _answer_ids(config, model, tokenizer, prompts, max_new_tokens or config.max_new_tokens, seed, **how):
        finished = ids[-1] in ends
        ids = ids[:-1] if finished else ids
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        answers.append({"text": text, "tokens": len(ids), "finished": finished})
    return answers


@torch.no_grad()
def _answer_ids(
    config: Config, model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts, limit: int,
    seed: int | None = None, **how,
) -> list[list[int]]:  # fmt: skip
    """Token ids of one answer per prompt, the EOS included where there is one; arguments as of `generate`."""
    model.eval()
    always = models.generate_arguments(model, tokenizer)
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    drawn: dict = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0) | how
    how = dict(do_sample=False) if seed is None else drawn
    # On the left, so that every answer starts at the same column.
    padded = dict(return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    answers: list[list[int]] = [[]] * len(texts)
    model, precision, cache = _fast(model, config)
    device = torch.device(model.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        rows = 64 if device.type == "cpu" else 24  # a CPU reads the weights for each token, however many answers
        for chosen in scoring.batches([*map(len, texts)], rows, "generating"):
            batch = tokenizer([texts[i] for i in chosen], **padded)
            with precision:
                out = model.generate(**batch.to(model.device), **always | how, **cache, max_new_tokens=limit)
            for i, ids in zip(chosen, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                end = next((n for n, token in enumerate(ids, 1) if token in always["eos_token_id"]), len(ids))
                answers[i] = ids[:end]
    return answers


def _fast(model, config: Config):
    """The model that writes, its precision and kind of cache: on a CPU with room a float32 copy without 4-bit layers.

    A static cache is filled in place. The default one is copied at each token, which with many answers takes long.
    """
    fits = isinstance(model, PreTrainedModel | PeftModel) and model.device.type == "cpu"
    if fits and model.num_parameters() * 4 / 2**30 < memory.free_memory_gib() / 2:
        return written_out(model), nullcontext(), dict(cache_implementation="static", disable_compile=True)
    return model, scoring.autocast(config), {}


def written_out(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """A copy in float32 that computes what `model` does now: nothing in 4 bits, the adapter added where it is on.

    On a CPU it writes a token three times as fast: 4-bit layers and adapters are most of the work.
    """
    plain = copy.deepcopy(model.get_base_model() if isinstance(model, PeftModel) else model)
    vars(plain).pop("forward", None)  # a trainer puts one there, which would call the model that was copied
    for name, layer in [*plain.named_modules()]:
        adapted = isinstance(layer, BaseTunerLayer)
        if not adapted and (not isinstance(layer, bnb.nn.Linear4bit) or name.endswith(".base_layer")):
            continue
        inner = layer.get_base_layer() if adapted else layer
        linear = torch.nn.Linear(inner.in_features, inner.out_features, bias=False, device="meta")  # draws no numbers
        weight = dequantize_module_weight(inner).detach().float()
        if adapted and not layer.disable_adapters:
            weight = weight + sum(layer.get_delta_weight(active).float() for active in layer.active_adapters)
        linear.weight, linear.bias = torch.nn.Parameter(weight), inner.bias
        plain.set_submodule(name, linear)
    return torch.nn.Module.float(plain)  # transformers' own refuses a model that was quantized


def kl_from_base(
    config: Config, model: PeftModel, tokenizer: PreTrainedTokenizerBase, *groups: Sequence[list[dict]]
) -> list[dict]:
    """Estimate KL(policy ‖ base): how far training has moved the model, on answers that it would now give.

    One answer per prompt is drawn from the policy (temperature 1, whole vocabulary, `config.seed`). Along it, the KL of
    the next token is summed exactly over the vocabulary: unbiased as the mean log-ratio of the drawn tokens is, never
    negative, and of less variance (Amini, Vieira, Cotterell 2025). It is the term that the RLHF objective holds down
    (Rafailov et al. 2023, eq. 3), for answers up to the token limit.

    Args:
        groups: prompts, in groups that are reported apart; all are answered together.

    Returns:
        For each group `per_answer` and `per_token`, in nats, each `{"mean", "standard_error", "low", "high", "n"}`;
        `tokens` drawn.
    """
    prompts = [prompt for group in groups for prompt in group]
    answers = _answer_ids(config, model, tokenizer, prompts, config.max_new_tokens, config.seed)
    encoded = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=False, add_generation_prompt=True)
        encoded.append((ids, answer))
    nats = iter([along.sum().item() for along in scoring.answer_kl(config, model, tokenizer, encoded)])
    lengths = iter([len(answer) for answer in answers])
    found = [(list(islice(nats, len(group))), list(islice(lengths, len(group)))) for group in groups]
    return [{"per_answer": stats.mean(n), "per_token": stats.ratio(n, long), "tokens": sum(long)} for n, long in found]


def every_second(prompts: Sequence[list[dict]]) -> Sequence[list[dict]]:
    """Those that 06 draws an answer to, for KL: every second one, since drawing takes long; all, of up to three."""
    return prompts[:: 2 if len(prompts) > 3 else 1]


def answers_of_both(
    config: Config, policy: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[dict]]
) -> tuple[list[dict], list[dict]]:
    """(base's answers, policy's answers) to the same prompts, same greedy decoding; the adapter is the difference."""
    with policy.disable_adapter():
        before = generate(config, policy, tokenizer, prompts)
    return before, generate(config, policy, tokenizer, prompts)


def chosen_answers(tokenizer: PreTrainedTokenizerBase, pairs: Dataset, n: int) -> list[dict]:
    """The chosen answers of the first `n` pairs as `generate` gives answers, to be judged by the same rules."""
    texts = [answer[0]["content"] for answer in pairs[:n]["chosen"]]
    return [
        {"text": text, "tokens": len(tokenizer(text, add_special_tokens=False)["input_ids"]), "finished": True}
        for text in texts
    ]
