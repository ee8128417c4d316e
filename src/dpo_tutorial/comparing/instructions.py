"""What training cost in following instructions: short requests whose answers a program can check, before and after.

The kinds of request are those of IFEval (Zhou et al. 2023, "Instruction-Following Evaluation for Large Language
Models", arXiv 2311.07911); the requests are this project's own. Form is checked, not whether an answer is true.
"""

import json
import re
from collections.abc import Callable, Sequence

from ..pairs import sources
from . import significance, stats

# --- one check for each kind --------------------------------------------------------------------------------------


def _bare(text: str) -> str:
    return text.strip(" \n\t.!:#*\"“”'‘’")


def _words(text: str) -> list[str]:
    """Words and numbers in lower case; "well-known", "don't" and "3.5" are one each."""
    return re.findall(r"\d+(?:[.,:]\d+)+|[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def _has(text: str, word: str) -> bool:
    """Whether it stands in the text as a word of its own: "sun" is not in "sunny"."""
    return bool(re.search(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", text, re.IGNORECASE))


def _begins(text: str, phrase: str) -> bool:
    wanted, words = _words(phrase), _words(text)
    return len(words) > len(wanted) and words[: len(wanted)] == wanted


def _ends(text: str, phrase: str) -> bool:
    wanted, words = _words(phrase), _words(text)
    return len(words) > len(wanted) and words[-len(wanted) :] == wanted


def _sentences(text: str, n: int) -> bool:
    """A sentence ends at . ! ? or …, unless a small letter follows, and at the end of a line."""
    text = re.sub(r"(?m)\b(Mr|Mrs|Dr|e\.g|i\.e)\.|^\s*\d+[.)]\s", " ", text)
    return sum(bool(_words(part)) for part in re.split(r"[.!?…]+[\"”'’)*]*(?:\s+(?![a-z])|$)|\n+", text)) == n


def _json(text: str, keys: list[str]) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\s(.*)```", text.strip(), re.DOTALL)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and set(found) == set(keys)


def _sequence(text: str, given: list[str], then: list[str]) -> bool:
    items = re.findall(r"\w+", text.lower())
    return items[: len(then)] == then or items[: len(given + then)] == given + then


def _title(text: str) -> bool:
    title = re.search(r"<<([^<>\n]*\w[^<>\n]*)>>", text)
    return title is not None and _words(title[1]) != ["title"] and bool(_words(text.replace(title[0], "")))


def _headings(text: str, names: list[str]) -> bool:
    _, *parts = re.split(r"(?m)^\s*#+[ \t]*(\S.*)$", text)
    return [_bare(part).lower() for part in parts[::2]] == [n.lower() for n in names] and all(map(_words, parts[1::2]))


def _two(text: str) -> bool:
    parts = [_words(part) for part in re.split(r"(?<!\*)\*{6}(?!\*)", text)]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


#: Kind of request → check of an answer's text, with the request's `args`.
CHECKS: dict[str, Callable[..., bool]] = {
    "at most words": lambda text, n: 0 < len(_words(text)) <= n,
    "sentences": _sentences,
    "with words": lambda text, words: all(_has(text, word) for word in words),
    "without words": lambda text, about, words: _has(text, about) and not any(_has(text, word) for word in words),
    "without letter": lambda text, letter: bool(_words(text)) and letter not in text.lower(),
    "lower case": lambda text: text.islower(),
    "capitals": lambda text: text.isupper(),
    "no commas": lambda text: bool(_words(text)) and "," not in text,
    "JSON": _json,
    "begin with": _begins,
    "end with": _ends,
    "choice": lambda text, options: _bare(text).lower() in options,
    "repeat first": lambda text, request: _begins(text, request),
    "only a number": lambda text: bool(re.fullmatch(r"-?\d+([.,]\d+)*", _bare(text))),
    "one word": lambda text: len(_words(text)) == 1,
    "sequence": _sequence,
    "placeholder": lambda text, names: all(f"[{name}]" in text.lower() for name in names),
    "quoted": lambda text: bool(re.fullmatch(r'"[^"]*\w[^"]*"|“[^“”]*\w[^“”]*”', text.strip())),
    "title": _title,
    "postscript": lambda text: bool(re.search(r"(?s)\w.*(?:[.!?)\"”]\s+|\n)\W{0,2}P\.\s?S\.\W{1,3}\w", text)),
    "copy": lambda text, wanted: _bare(" ".join(text.split())) == _bare(wanted),
    "bullets": lambda text, n: len(re.findall(r"(?m)^\s*[-–*•]\s+\S", text)) == n,
    "numbered list": lambda text, n: re.findall(r"(?m)^\s*(\d+)[.)]\s+\S", text) == [str(i + 1) for i in range(n)],
    "headings": _headings,
    "paragraphs": lambda text, n: len(re.split(r"\n\s*\n", text.strip())) == n,
    "two answers": _two,
}

#: Kinds that only a whole answer can follow. Where the token limit cut an answer, the others are judged by what it
#: holds: a word that is there stays there, and a comma avoided so far counts as avoided, since the limit is ours.
WHOLE = {
    "at most words", "sentences", "JSON", "end with", "choice", "only a number", "one word", "quoted", "copy",
    "bullets", "numbered list", "headings", "paragraphs", "two answers",
}  # fmt: skip

# --- requests and answers -----------------------------------------------------------------------------------------


def load() -> list[dict]:
    """The requests, each `{"prompt", "kind", "args", "against_style"}`, kind after kind.

    `against_style`: nobody can follow it and keep all of `house_style.OF_TEXT`, so training may have harmed it.
    """
    return sources.embedded_rows("instructions")


def some(n: int) -> list[dict]:
    """`n` of the requests, evenly from all kinds; all of them where there are fewer."""
    requests = load()
    n = min(n, len(requests))
    return [requests[i * len(requests) // n] for i in range(n)]


def conversations(requests: Sequence[dict]) -> list[list[dict]]:
    """The requests as prompts, each a conversation of one message."""
    return [[{"role": "user", "content": request["prompt"]}] for request in requests]


def followed(requests: Sequence[dict], answers: Sequence[dict]) -> list[bool]:
    """Whether each answer, as `generation.generate` gives it, does what was asked.

    An empty answer does not, nor one that holds the whole prompt: its words would count as the answer's.
    """
    return [_follows(request, answer) for request, answer in zip(requests, answers, strict=True)]


def _follows(request: dict, answer: dict) -> bool:
    text, kind = answer["text"].strip(), request["kind"]
    if not text or request["prompt"] in text or (kind in WHOLE and not answer["finished"]):
        return False
    return CHECKS[kind](text, **request["args"])


def check(requests: Sequence[dict], before: Sequence[dict], after: Sequence[dict], kl: dict) -> dict:
    """How many requests base and policy follow, by their answers as `generation.generate` gives them.

    Args:
        kl: the policy's from its reference on these requests, as `generation.kl_from_base` gives it.

    Returns:
        As `summary`; with `requests`, `answers` (`before`, `after`), `followed` (likewise) and `kl`.
    """
    answers = {"before": list(before), "after": list(after)}
    good = {when: followed(requests, given) for when, given in answers.items()}
    found = summary(good["before"], good["after"], requests)
    return found | {"requests": list(requests), "answers": answers, "followed": good, "kl": kl}


def summary(before: Sequence[bool], after: Sequence[bool], requests: Sequence[dict]) -> dict:
    """How many requests base and policy follow, and whether the change is more than chance.

    Returns:
        `before` and `after` as `stats.rate`; `gained` and `lost`, counts; `p` of `significance.sign_test`; `smallest`
        as `significance.smallest_change`. `against_style` and `within_style`: the same of these requests, None where
        there are none.
    """
    rows = list(zip(before, after, requests, strict=True))
    parts = {}
    for name, wanted in (("against_style", True), ("within_style", False)):
        chosen = [(old, new) for old, new, request in rows if request["against_style"] is wanted]
        parts[name] = _change(chosen) if chosen else None
    return _change([row[:2] for row in rows]) | parts


def _change(rows: Sequence[tuple[bool, bool]]) -> dict:
    old, new = zip(*rows, strict=True)
    n, gained, lost = len(rows), rows.count((False, True)), rows.count((True, False))
    return {
        "before": stats.rate(sum(old), n), "after": stats.rate(sum(new), n), "gained": gained, "lost": lost,
        "p": significance.sign_test(old, new), "smallest": significance.smallest_change(n, gained + lost),
    }  # fmt: skip
