"""Is a row fit to train on? One validator for every source; each dropped row is counted under one reason."""

import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from . import encoding
from .reasons import REASONS

COLUMNS = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")

#: Roles of what a tool is asked and says.
TOOLS = ("tool", "function", "function_call", "observation", "ipython")

#: C0 and C1 controls except tab, line feed, carriage return and U+0085 (a line break); surrogates; noncharacters;
#: U+FFFD, which stands where a decoder failed.
_ASTRAL_NONCHARACTERS = "".join(chr(plane << 16 | low) for plane in range(1, 17) for low in (0xFFFE, 0xFFFF))
_INVALID = re.compile(
    f"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffd-\uffff{_ASTRAL_NONCHARACTERS}]"
)


# --- one row ------------------------------------------------------------------------------------------------------


def row_problem(row: dict, characters: float = math.inf) -> str | None:
    """The first of `REASONS` that applies to this row alone, or None.

    Args:
        row: its `problem`, where it is one of `REASONS`, is what reading it found.
        characters: a side of more than so many is "too long", and its text is looked at no further.
    """
    if (found := row.get("problem")) in [*REASONS]:
        return found
    values: list[Any] = [row.get(c) for c in COLUMNS]
    prompt, *sides, chosen, rejected = values
    if None in (prompt, *sides) or (chosen is None) != (rejected is None):
        return "missing column"
    if any(calls_tool(m) for s in sides if isinstance(s, list) for m in s):
        return "tool call"
    if (
        not isinstance(prompt, str)
        or not all(isinstance(s, list) and all(_is_message(m) for m in s) for s in sides)
        or not all(score is None or is_number(score) for score in (chosen, rejected))
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
    if any(not m["content"].strip() for s in sides for m in s[:-1]):
        return "empty turn"
    if max(_characters(s) for s in sides) > characters:
        return "too long"
    texts = [str(row.get("prompt_id") or ""), *(m["content"] for s in sides for m in s)]
    if any(_INVALID.search(text) for text in texts):
        return "invalid text"
    if [_message(m) for m in sides[0][:-1]] != [_message(m) for m in sides[1][:-1]]:
        return "prompts differ"
    if sides[0][-1]["content"].strip() == sides[1][-1]["content"].strip():
        return "chosen equals rejected"
    if chosen is None or chosen > rejected:  # without scores, chosen is taken at its word
        return None
    return "tied scores" if chosen == rejected else "inverted scores"


def is_number(value: object) -> bool:
    """Whether it is a finite number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def calls_tool(m: object) -> bool:
    """Whether a turn calls a tool, or tells what one said; its text alone would be another turn."""
    return isinstance(m, dict) and bool(m.get("tool_calls") or m.get("function_call") or m.get("role") in TOOLS)


def _characters(turns: list[dict]) -> int:
    return sum(len(m["content"]) for m in turns)


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
    return hashlib.sha256(prompt_key(prompt).encode(errors="surrogatepass")).digest()


# --- a split ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Audit:
    """What became of every row of one split: the numbers of those `kept`, in order; the rest counted by reason.

    `examples`: up to three ids per reason; `decoded`: up to three excerpts per template reason and control token;
    `prompts`: digests of all prompts that a later split must not have. No row itself: a source may be larger than
    memory.
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
    controls, most = encoding.control_tokens(tokenizer), max_tokens * encoding.longest_token(tokenizer)

    def drop(reason, name):
        dropped[reason] += 1
        if len(named := examples.setdefault(reason, [])) < 3:
            named.append(name)

    for index, row in enumerate(rows):
        total += 1
        row = {"problem": "invalid text"} if row is None else row
        name, problem, excerpt = _name(row, index), row_problem(row, most), ""
        if problem == "too long" and _characters(row["chosen"][:-1]) <= most:
            prompts.add(prompt_digest(extract(row)["prompt"]))
        if problem is None:
            example = extract(row)
            key = prompt_digest(example["prompt"])
            problem = "prompt in test" if key in held_out else None
        if problem is None:
            prompts.add(key)
            problem, excerpt = encoding.token_problem(tokenizer, example, max_tokens, controls)
        if problem is None:
            content = hashlib.sha256(json.dumps(example, sort_keys=True).encode()).digest()
            sound.append((index, key, content, name))
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


def _name(row: dict, index: int) -> str:
    """What a person finds the row by: its id, or its place in the source; broken Unicode is written as an escape."""
    name = str(row.get("prompt_id") or "")[:16] or row.get("place") or f"row {index}"
    return name.encode(errors="backslashreplace").decode()


def prepared_row(tokenizer: PreTrainedTokenizerBase, row: dict) -> dict:
    """A row that the audit kept, as training wants it: extracted, with its token counts."""
    example = extract(row)
    problem, _ = encoding.token_problem(tokenizer, example, max_tokens=2**62)
    assert problem is None, problem
    return example
