"""From messages to tokens: prompt and answer through the chat template, and where the border lies."""

from __future__ import annotations

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import DataError

# --- its tokens ---------------------------------------------------------------------------------------------------


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
    """What is wrong with the tokens that the completion mask covers: "template eos", "template mask" or None.

    Args:
        after: the answer's ids, as `encode` cuts them.
    """
    if after.count(tokenizer.eos_token_id) != 1:
        return "template eos"
    end = after.index(tokenizer.eos_token_id)
    if tokenizer.decode(after[end + 1 :]).strip():
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


def short(text: str, n: int = 80) -> str:
    return text if len(text) <= 2 * n else f"{text[:n]} … {text[-n:]}"


# --- prepared data ------------------------------------------------------------------------------------------------


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[tuple[str, int]]:
    """The text that each token adds, and how many tokens it took: a character of several byte tokens is one piece.

    Decoded as a growing whole, because some tokenizers decode a token alone without its leading space.
    """
    found, shown, waiting = [], "", 0
    for end in range(1, len(ids) + 1):
        text, waiting = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False), waiting + 1
        if text.endswith("\ufffd") and end < len(ids):  # half a character: the next token has the rest
            continue
        found.append((text[len(shown) :], waiting))
        shown, waiting = text, 0
    return found


def token_lengths(split: Dataset) -> list[int]:
    """Tokens of the longer side of each pair: prompt plus the longer answer."""
    return [
        p + max(c, r)
        for p, c, r in zip(split["prompt_tokens"], split["chosen_tokens"], split["rejected_tokens"], strict=True)
    ]
