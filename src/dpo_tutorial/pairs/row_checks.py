"""Is a row fit to train on? One validator for every source; each dropped row is counted under one reason."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from . import encoding

COLUMNS = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")

#: Reasons a row is dropped, in the order they are checked. One row has one reason.
REASONS = {
    "unreadable line": "no JSON, not UTF-8, or a line that was cut",
    "missing column": "a needed column is absent or null",
    "wrong type": "prompt is not text, a conversation not a list of {role, content} texts, or a score not a number",
    "empty conversation": "a side has no turn at all",
    "bad role": "a role other than system, user, assistant",
    "roles out of order": "user and assistant do not alternate, starting with the user",
    "last turn not assistant": "there is no answer to prefer",
    "empty answer": "the last turn is empty or white space",
    "invalid text": "control characters or broken Unicode",
    "prompts differ": "the two answers belong to different conversations",
    "chosen equals rejected": "nothing to prefer",
    "tied scores": "the annotator had no preference",
    "inverted scores": "the rejected answer has the higher score",
    "prompt in test": "the conversation is also in a held-out split",
    "template refuses": "the chat template stops at this conversation with an error of its own",
    "template border": "the prompt's tokens change once an answer follows: no clean cut between the two",
    "template eos": "the answer does not end in exactly one EOS (white space may follow it)",
    "template mask": "the answer's tokens hold a special token or the opening of the turn, which belongs to the prompt",
    "too long": "prompt and answer exceed max_tokens; never cut silently",
    "duplicate prompt": "the same conversation again in this split; the row with the smallest content hash stays",
}

#: C0 and C1 controls except tab, line feed, carriage return and U+0085 (a line break); surrogates; noncharacters;
#: U+FFFD, which stands where a decoder failed.
_ASTRAL_NONCHARACTERS = "".join(chr(plane << 16 | low) for plane in range(1, 17) for low in (0xFFFE, 0xFFFF))
_INVALID = re.compile(
    f"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffd-\uffff{_ASTRAL_NONCHARACTERS}]"
)


# --- one row ------------------------------------------------------------------------------------------------------


def row_problem(row: dict) -> str | None:
    """The first of `REASONS` that applies to this row alone, or None."""
    if row.get("problem"):
        return row["problem"]
    if any(row.get(c) is None for c in COLUMNS):
        return "missing column"
    sides = (row["chosen"], row["rejected"])
    if (
        not isinstance(row["prompt"], str)
        or not all(isinstance(s, list) and all(_is_message(m) for m in s) for s in sides)
        or not all(_is_number(row[c]) for c in ("score_chosen", "score_rejected"))
    ):
        return "wrong type"
    if not all(sides):
        return "empty conversation"
    if any(m["role"] not in ("system", "user", "assistant") for s in sides for m in s):
        return "bad role"
    if any(not _alternates([m["role"] for m in s]) for s in sides):
        return "roles out of order"
    if any(s[-1]["role"] != "assistant" for s in sides):
        return "last turn not assistant"
    if any(not s[-1]["content"].strip() for s in sides):
        return "empty answer"
    texts = [str(row.get("prompt_id") or ""), *(m["content"] for s in sides for m in s)]
    if any(_INVALID.search(text) for text in texts):
        return "invalid text"
    if [_message(m) for m in sides[0][:-1]] != [_message(m) for m in sides[1][:-1]]:
        return "prompts differ"
    if sides[0][-1]["content"].strip() == sides[1][-1]["content"].strip():
        return "chosen equals rejected"
    if row["score_chosen"] == row["score_rejected"]:
        return "tied scores"
    if row["score_chosen"] < row["score_rejected"]:
        return "inverted scores"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def _is_message(m: object) -> bool:
    return isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)


def _alternates(roles: list[str]) -> bool:
    turns = roles[1:] if roles[0] == "system" else roles
    return bool(turns) and all(role == ("user", "assistant")[i % 2] for i, role in enumerate(turns))


def extract(row: dict) -> dict:
    """Split a checked row into what TRL trains on.

    Returns:
        `prompt`: every turn before the last answer; `chosen` and `rejected`: the last turn of each side, as a list of
        one message; `prompt_id`: the row's own id, or "" where it has none.
    """
    return {
        "prompt_id": str(row.get("prompt_id") or ""),
        "prompt": [_message(m) for m in row["chosen"][:-1]],
        "chosen": [_message(row["chosen"][-1])],
        "rejected": [_message(row["rejected"][-1])],
    }


def _message(m: dict) -> dict:
    return {"role": m["role"], "content": m["content"]}


def prompt_key(prompt: list[dict]) -> str:
    """Case- and space-blind text of a conversation: two prompts with one key are the same prompt."""
    return "\n".join(f"{m['role']}: {' '.join(m['content'].lower().split())}" for m in prompt)


def prompt_digest(prompt: list[dict]) -> bytes:
    """SHA-256 of `prompt_key`: 32 bytes, however long the prompt."""
    return hashlib.sha256(prompt_key(prompt).encode()).digest()


# --- a split ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Audit:
    """What became of every row of one split: the numbers of those `kept`, in order; the rest counted by reason.

    `examples`: up to three ids per reason; `decoded`: up to three excerpts per template reason; `prompts`: digests of
    all prompts that a later split must not have. No row itself: a source may be larger than memory.
    """

    rows: int
    kept: list[int]
    dropped: dict[str, int]
    examples: dict[str, list[str]]
    decoded: dict[str, list[str]]
    prompts: set[bytes]


def audit_split(
    rows: Iterable[dict | None], tokenizer: PreTrainedTokenizerBase, max_tokens: int, held_out: Collection[bytes] = ()
) -> Audit:
    """Check every row of a split. The order of the rows decides the order of `kept` and of the examples, nothing else.

    Args:
        rows: in `COLUMNS`' schema, or anything else; None for a row that could not be decoded.
        max_tokens: longest prompt + answer that is kept, in tokens.
        held_out: `prompts` of the splits that these rows must not repeat.
    """
    total, sound, prompts, dropped, examples, decoded = 0, [], set(), Counter(), {}, {}

    def drop(reason, name):
        dropped[reason] += 1
        if len(named := examples.setdefault(reason, [])) < 3:
            named.append(name)

    for index, row in enumerate(rows):
        total += 1
        name = _name(row, index)
        problem, excerpt = ("invalid text" if row is None else row_problem(row)), ""
        if row is not None and problem is None:
            example = extract(row)
            key = prompt_digest(example["prompt"])
            problem = "prompt in test" if key in held_out else None
        if problem is None:
            prompts.add(key)
            problem, excerpt = _add_token_counts(tokenizer, example, max_tokens)
        if problem is None:
            sound.append((index, key, _content_hash(example), name))
            continue
        drop(problem, name)
        if excerpt and len(shown := decoded.setdefault(problem, [])) < 3:
            shown.append(excerpt)

    # Duplicates last: only a row that passed all else displaces another, so no prompt is lost to a bad twin.
    stays, kept = {}, []
    for _, key, digest, _ in sound:
        stays[key] = min(digest, stays.get(key, digest))
    for index, key, digest, name in sound:
        if stays[key] == digest:
            stays[key] = b""  # an exact copy of it is a duplicate too
            kept.append(index)
        else:
            drop("duplicate prompt", name)
    assert total == len(kept) + dropped.total(), "every row is kept or dropped by one reason"
    ordered = {reason: dropped[reason] for reason in REASONS if dropped[reason]}
    return Audit(total, kept, ordered, {r: examples[r] for r in ordered}, decoded, prompts)


def _name(row: dict | None, index: int) -> str:
    """The id a person finds the row by; broken Unicode in it is written as an escape."""
    row = row or {}
    own = str(row.get("prompt_id") or "").encode(errors="backslashreplace").decode()[:16]
    return own or row.get("place") or f"row {index}"


def prepared_row(tokenizer: PreTrainedTokenizerBase, row: dict) -> dict:
    """A row that the audit kept, as training wants it: extracted, with its token counts."""
    example = extract(row)
    problem, _ = _add_token_counts(tokenizer, example, max_tokens=2**62)
    assert problem is None, problem
    return example


def _add_token_counts(tokenizer: PreTrainedTokenizerBase, example: dict, max_tokens: int) -> tuple[str | None, str]:
    """Add the token counts to `example`; returns the problem of its tokens, and an excerpt that shows it."""
    for side in ("chosen", "rejected"):
        try:
            before, after = encoding.encode(tokenizer, example["prompt"], example[side])
        except DataError as error:
            return ("template refuses" if error.__cause__ else "template border"), error.cause
        problem = encoding.template_problem(tokenizer, example["prompt"], example[side], after)
        if problem:
            return problem, f"{tokenizer.decode(before[-8:])}¦{encoding.short(tokenizer.decode(after))}"
        example |= {"prompt_tokens": len(before), f"{side}_tokens": len(after)}
    longest = example["prompt_tokens"] + max(example["chosen_tokens"], example["rejected_tokens"])
    return ("too long" if longest > max_tokens else None), ""


def _content_hash(example: dict) -> bytes:
    return hashlib.sha256(json.dumps(example, sort_keys=True).encode()).digest()
