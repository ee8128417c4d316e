"""From messages to tokens: prompt and answer through the chat template, and where the border lies."""

import functools
import re

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import DataError


def encode(tokenizer: PreTrainedTokenizerBase, prompt: list[dict], answer: list[dict]) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer under the chat template, cut exactly as `DPOTrainer` cuts them.

    The whole conversation is templated once and the prompt's ids are taken off its front, so no token can merge
    across the border.

    Raises:
        DataError: the template refuses the conversation, or the prompt's ids are not a prefix of the whole (shows
            both, decoded from where they part).
    """
    options = dict(tokenize=True, return_dict=False)
    try:
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template(prompt + answer, **options)
    except Exception as error:  # a template raises whatever its author wrote, for example for a system turn
        raise DataError(
            f"The chat template refuses this conversation: {error}.",
            "Use a template that takes these turns, or leave such rows out.",
        ) from error
    if whole[: len(before)] != before:
        same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
        old, new = (short(tokenizer.decode(ids[same : same + 24])) for ids in (before, whole))
        raise DataError(
            f"The prompt's tokens change once an answer follows: {old!r} becomes {new!r}.",
            "Use a template whose prompt is a prefix of the whole conversation.",
        )
    return before, whole[len(before) :]


def template_problem(
    tokenizer: PreTrainedTokenizerBase, prompt: list[dict], answer: list[dict], after: list[int]
) -> str | None:
    """What is wrong with the tokens that the completion mask covers (`after`, as `encode` cuts them).

    "template eos", "template mask" or None.
    """
    if after.count(tokenizer.eos_token_id) != 1:
        return "template eos"
    end = after.index(tokenizer.eos_token_id)
    if tokenizer.decode(after[end + 1 :], skip_special_tokens=True).strip():
        return "template eos"
    added = tokenizer.added_tokens_decoder
    if any(i in added and added[i].special and i != tokenizer.unk_token_id for i in after[:end]):
        return "template mask"
    # A template that ignores add_generation_prompt leaves the opening of the turn to the answer.
    asked, opened, whole = (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening)
        for messages, opening in ((prompt, False), (prompt, True), (prompt + answer, False))
    )
    if asked == opened and not whole[len(opened) :].lstrip().startswith(answer[0]["content"].strip()):
        return "template mask"
    return None


def token_problem(
    tokenizer: PreTrainedTokenizerBase, example: dict, max_tokens: int, controls: re.Pattern | None = None
) -> tuple[str | None, str]:
    """What the tokens of a pair say against it, and an excerpt that shows it; (None, "") for a sound pair.

    Args:
        example: `prompt`, `chosen` and `rejected` as lists of messages; gets their token counts.
        controls: as `control_tokens` makes it; without it, control tokens in a text are not looked for.
    """
    for text in (m["content"] for part in ("prompt", "chosen", "rejected") for m in example[part]):
        if controls and (found := controls.search(text)):
            return "control token", f"{found[0]} in {text[max(0, found.start() - 40) : found.end() + 40]!r}"
    for side in ("chosen", "rejected"):
        try:
            before, after = encode(tokenizer, example["prompt"], example[side])
        except DataError as error:
            return ("template refuses" if error.__cause__ else "template border"), error.cause
        problem = template_problem(tokenizer, example["prompt"], example[side], after)
        if problem:
            return problem, f"{tokenizer.decode(before[-8:])}¦{short(tokenizer.decode(after))}"
        example |= {"prompt_tokens": len(before), f"{side}_tokens": len(after)}
    longest = example["prompt_tokens"] + max(example["chosen_tokens"], example["rejected_tokens"])
    return ("too long" if longest > max_tokens else None), ""


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """Finds text that the tokenizer reads as one of its special tokens: such text opens and ends turns by itself.

    Added words that are not special, such as `<think>`, are text; so is the unknown token.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    words = sorted(special - {tokenizer.unk_token}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words)) or r"(?!)")


@functools.lru_cache(maxsize=4)
def longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of the longest token of the vocabulary: so many times n hold all that n tokens can say."""
    return max(map(len, tokenizer.get_vocab()))


def short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:80]} … {text[-80:]}"


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], values: list[float]) -> list[tuple[str, float]]:
    """The text that each token adds, and the token's value: a character of several byte tokens has their sum.

    Decoded as a growing whole, because some tokenizers decode a token alone without its leading space.
    """
    found, shown, waiting = [], "", 0.0
    for end, value in enumerate(values, 1):
        text, waiting = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False), waiting + value
        if text.endswith("\ufffd") and end < len(ids):  # half a character: the next token has the rest
            continue
        found.append((text[len(shown) :], waiting))
        shown, waiting = text, 0.0
    return found


def token_lengths(split: Dataset) -> list[int]:
    """Tokens of the longer side of each pair: prompt plus the longer answer."""
    return [
        p + max(c, r)
        for p, c, r in zip(split["prompt_tokens"], split["chosen_tokens"], split["rejected_tokens"], strict=True)
    ]
