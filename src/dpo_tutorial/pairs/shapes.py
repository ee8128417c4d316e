"""What a row may look like: the usual layouts of a preference pair, told apart row by row and brought to one.

Nothing is rewritten: a text stays as it is, byte for byte. `docs/data.md` shows each layout and what it becomes.
"""

import os.path
import re
from collections.abc import Mapping
from itertools import chain

from ..errors import ConfigError
from .row_checks import calls_tool, is_number

#: The names that data sets give to prompt, pair, system turn and scores; the first that a row has counts.
PROMPTS = ("prompt", "conversations", "question", "instruction", "query", "input", "messages")
ANSWERS = (
    ("chosen", "rejected"), ("preferred_output", "non_preferred_output"), ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"), ("output_chosen", "output_rejected"), ("preferred", "dispreferred"),
)  # fmt: skip
SYSTEMS = ("system", "system_prompt")
SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"), ("margin",),
)  # fmt: skip
#: What `DATA_COLUMNS` may name, and parts of the names that people give to some of it.
BY_HAND = {
    "prompt": "prompt|question|instruct|query|ask|input", "chosen": "good|bett?e|win|accept|prefer|posit|choose|chosen",
    "rejected": "reject|bad|wors|los|dispref|negat", "system": "", "score_chosen": "", "score_rejected": "",
    "prompt_id": "",
}  # fmt: skip

_ROLES = {"human": "user", "gpt": "assistant", "Human": "user", "Assistant": "assistant"}
_HH_TEXT = re.compile(r"\n\nHuman:|Human:.*\n\nAssistant:", re.DOTALL)
_HH = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")  # the space behind a colon belongs to the mark
_SPELT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")  # what a table of text makes of a list


class NotAPair(Exception):
    """A row that is no preference pair: `reason`, one of `row_checks.REASONS`, and `detail`, what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


def columns(text: str) -> dict[str, str]:
    """The map by hand, `prompt=question,chosen=good,rejected=bad`: our name → the source's.

    Raises:
        ConfigError: not of this form, or a name that is none of `BY_HAND`.
    """
    parts = [[word.strip() for word in part.partition("=")[::2]] for part in text.split(",") if part.strip()]
    found = {ours: theirs for ours, theirs in parts}
    if not all(found.values()) or len(found) < len(parts) or set(found) - set(BY_HAND):
        raise ConfigError(
            f"DATA_COLUMNS={text!r} is no map of columns.",
            f"Write it as prompt=question,chosen=good,rejected=bad; the names on the left: {', '.join(BY_HAND)}.",
        )
    return found


def to_pair(row: object, columns: Mapping[str, str] = {}) -> tuple[dict, str]:
    """Bring a row of any known layout to one.

    Args:
        columns: the map by hand, as the function of that name makes it.

    Returns:
        (`prompt_id`: text, "" where there is none; `prompt`: the first user turn's text; `chosen`, `rejected`: whole
        conversations, lists of {role, content}; `score_chosen`, `score_rejected`: floats, or both None where the row
        has none; the layout in words).

    Raises:
        NotAPair: and nothing else, whatever the row is.
    """
    if not isinstance(row, dict):
        raise NotAPair("wrong type", f"a row is an object with columns, and this is {_kind(row)}")
    row = row | {ours: row.get(theirs) for ours, theirs in columns.items()}
    there = [pair for pair in ANSWERS if pair[0] in row and pair[1] in row] or ANSWERS[:1]
    names = next((pair for pair in there if None not in map(row.get, pair)), there[0])
    for name in names:
        if row.get(name) is None:
            raise NotAPair("missing column", f"{name} is absent or null")
    asked, prompt = _prompt(row)
    other = [n for n, v in row.items() if n not in (*names, *SYSTEMS) and isinstance(v, str) and " " in v.strip()]
    if not asked and other and isinstance(row[names[0]], str) and not _HH_TEXT.match(row[names[0]]):
        raise NotAPair("missing column", f"there is no prompt by a name that is known; {other[0]} may be it")
    answers, layout = _conversations(asked, prompt, {name: row[name] for name in names})
    system = next((name for name in SYSTEMS if row.get(name) not in (None, "")), None)
    if system and not any(m["role"] == "system" for turns in answers for m in turns[:1]):
        answers = [_turns(system, {"role": "system", "content": row[system]}) + turns for turns in answers]
        layout = f"{system}, {layout}"
    first = next((m["content"] for m in answers[0] if m["role"] == "user"), "")
    name = next((row[key] for key in ("prompt_id", "id") if isinstance(row.get(key), (str, int))), "")
    layout += "" if names == ANSWERS[0] else f" in {' and '.join(names)}"
    pair = {"prompt_id": str(name), "prompt": first, "chosen": answers[0], "rejected": answers[1]}
    return pair | _scores(row), layout


def left_alone(row: object, columns: Mapping[str, str] = {}) -> set[str]:
    """The columns of a pair that `to_pair` does not read, such as a `history` of earlier turns."""
    if not isinstance(row, dict):
        return set()
    asked, _ = _prompt(row | {ours: row.get(theirs) for ours, theirs in columns.items()})
    known = {"prompt_id", "id", *SYSTEMS, *columns, *columns.values(), *chain(*ANSWERS, *SCORES)}
    return set(row) - known - set(asked.removesuffix(".messages").split(" and "))


def _prompt(row: dict) -> tuple[str, str | list | None]:
    """(The column that holds the prompt, its value); ("", None) where both sides hold it."""
    there = [name for name in PROMPTS if name in row]
    asked = next((name for name in there if row[name] is not None), "")
    prompt, more = row.get(asked), row.get("input")
    if asked == "input" and isinstance(prompt, dict):
        asked, prompt = "input.messages", prompt.get("messages")
    if there and prompt is None:
        raise NotAPair("missing column", f"{asked or there[0]} is absent or null")
    if not isinstance(prompt, (str, list, type(None))):
        raise NotAPair("wrong type", f"{asked} is {_kind(prompt)}")
    if asked == "instruction" and isinstance(prompt, str) and more not in (None, ""):
        if not isinstance(more, str):
            raise NotAPair("wrong type", f"input is {_kind(more)}")
        asked, prompt = "instruction and input", f"{prompt}\n{more}"
    return asked, prompt


def _conversations(asked: str, prompt: str | list | None, sides: dict) -> tuple[list[list[dict]], str]:
    """(Both whole conversations, the layout in words)."""
    texts = [side for side in sides.values() if isinstance(side, str)]
    if len(texts) == 1:
        raise NotAPair("wrong type", f"of {' and '.join(sides)}, one is text and one is not")
    if texts and all(map(_SPELT.match, texts)):
        raise NotAPair("wrong type", f"{' and '.join(sides)} are text that spells out messages, not lists of them")
    if texts and not isinstance(prompt, list) and all(_HH_TEXT.match(prompt or text) for text in texts):
        mark = "\n\nAssistant: " if prompt and not re.search(r"\n\nAssistant: ?\Z", prompt) else ""
        parts = [_HH.split((prompt or "") + mark + text)[1:] for text in texts]
        answers = [[_message(*turn) for turn in zip(said[::2], said[1::2], strict=True)] for said in parts]
        return answers, f"{asked or 'prompt in both sides'}, Human: and Assistant: in text"
    layout = f"{asked} as {'messages' if isinstance(prompt, list) else 'text'}" if asked else "prompt in both sides"
    if texts and prompt is None:
        prompt = _common_start(*texts)
        texts = [text[len(prompt) :] for text in texts]
    before = _turns(asked, prompt) if isinstance(prompt, list) else [] if prompt is None else [_message("user", prompt)]
    if texts:
        return [[*before, _message("assistant", text)] for text in texts], f"{layout}, answers as text"
    answers = [_turns(name, side) for name, side in sides.items()]
    if before and all(turns and turns[0]["role"] not in ("system", "user") for turns in answers):
        return [before + turns for turns in answers], f"{layout}, answers as messages"
    asks = isinstance(prompt, list) and before and before[-1]["role"] == "user"  # else it is a whole conversation, too
    if asks and any(m not in turns for turns in answers for m in before):
        raise NotAPair("prompts differ", f"{asked} holds a turn that is not in both sides")
    return answers, f"{layout}, whole conversations"


def _common_start(one: str, other: str) -> str:
    """What two texts begin with alike, up to the end of a word; a space before the rest is the rest's, as in TRL."""
    start = os.path.commonprefix([one, other])
    if any(re.match(r"\w\w", start[-1:] + text[len(start) :][:1]) for text in (one, other)):
        start = re.sub(r"\w+$", "", start)
    if not start.strip():
        raise NotAPair("missing column", "there is no prompt, and the two sides do not begin alike")
    return start.removesuffix(" ")


def _message(role: str, content: str) -> dict:
    return {"role": _ROLES.get(role, role), "content": content}


def _turns(where: str, value: object) -> list[dict]:
    turns = []
    for m in value if isinstance(value, list) else [value]:
        if not isinstance(m, dict):
            raise NotAPair("wrong type", f"{where} is {_kind(value)}")
        sharegpt = m.get("role") is None and isinstance(m.get("from"), str)
        role, content = (m["from"], m.get("value")) if sharegpt else (m.get("role"), m.get("content"))
        if calls_tool(m | {"role": role}):
            raise NotAPair("tool call", f"{where} calls a tool or holds what one said")
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            if odd := [p for p in content if p.get("type") not in ("text", None) or not isinstance(p.get("text"), str)]:
                raise NotAPair("tool call", f"{where} holds a part that is no text: {_kind(odd[0])}")
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise NotAPair("wrong type", f"{where} holds a turn whose role is {_kind(role)}, content {_kind(content)}")
        turns.append(_message(role, content) if sharegpt else {"role": role, "content": content})
    return turns


def _scores(row: dict) -> dict[str, float | None]:
    names = next((names for names in SCORES if any(row.get(name) is not None for name in names)), ())
    for name in names:
        if not is_number(row.get(name)):
            reason = "missing column" if row.get(name) is None else "wrong type"
            raise NotAPair(reason, f"{name} is {_kind(row.get(name))}, not a finite number")
    values = [float(row[name]) for name in names] + [0.0] * (names == ("margin",))
    return dict(zip(SCORES[0], values or (None, None), strict=True))


def _kind(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {'lists' if isinstance(value[0], list) else _kind(value[0])}" if value else "an empty list"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, list(value)[:4])) or 'nothing in it'}"
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)


def describe(row: object) -> str:
    """What a row has, column by column, and the map by hand that may make a pair of it: two sentences."""
    if not isinstance(row, dict) or not row:
        return f"The first row is {_kind(row)}, not an object with columns."
    found, free = [], list(row)
    for ours in ("rejected", "chosen", "prompt"):
        theirs = next((name for name in free if re.search(BY_HAND[ours], str(name), re.IGNORECASE)), "…")
        free = [name for name in free if name != theirs]
        found.insert(0, f"{ours}={theirs}")
    listed = ", ".join(f"{name} ({_kind(value)})" for name, value in row.items())
    return f'The first row has {listed}. If a pair is in it, say where: DATA_COLUMNS="{",".join(found)}".'
