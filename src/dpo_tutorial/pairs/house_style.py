"""The house style that the repository's own preference set teaches, and the rules of it that a program can check."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

_OPENER = re.compile(
    r"^\W*(sure\b|certainly\b|of course\b|absolutely\b|great[!,.]|great (question|choice|idea)\b|good question|"
    r"(what|that['’]s) an? ([^.?!]{1,40}!|(\w+ )?(question|point|idea)\b)|thank you for|thanks\b|as an ai\b|"
    r"as a language model\b|i['’]d be\b|i would be (happy|delighted|most)\b|i['’]m (happy|glad|sorry)\b|i am happy\b|"
    r"here (is|are)\b|here['’]s\b|ah\b|oh\b|(hello|hi)\b( there)?[!.]|well,)",
    re.IGNORECASE,
)
_CLOSER = re.compile(
    r"(let me know|hope this helps|hope that helps|feel free|happy to help|in conclusion|in summary|to sum up|overall,|"
    r"if you have any|would you like)",
    re.IGNORECASE,
)
_LIST = re.compile(r"^\s*([-*•]|\d+[.)])\s+", re.MULTILINE)
_HEAVY = re.compile(
    r"\b(delve|utiliz|utilis|crucial|essential|important to note|it['’]s important|it is important|various|leverage|"
    r"plays? an? (\w+ )?(role|part)\b|a variety of|wide range|in order to|ensure|additionally|furthermore|moreover)\w*",
    re.IGNORECASE,
)
_EMOJI = re.compile("[\U0001f300-\U0001faff☀-➿]")

#: Rule → check of one generated answer (`{"text", "tokens", "finished"}`). "Concrete" and "honest" need a reader.
RULES: dict[str, Callable[[dict], bool]] = {
    "no opener": lambda a: not _OPENER.search(a["text"]),
    "plain prose": lambda a: not (_LIST.search(a["text"]) or "**" in a["text"] or a["text"].lstrip().startswith("#")),
    "one paragraph": lambda a: "\n" not in a["text"].strip(),
    "no exclamation": lambda a: "!" not in a["text"] and not _EMOJI.search(a["text"]),
    "plain words": lambda a: not _HEAVY.search(a["text"]),
    "no closer": lambda a: not _CLOSER.search(a["text"]),
    "ends complete": lambda a: a["finished"] and a["text"].rstrip().endswith((".", "?", ")", "`", '"', "”", "'")),
}

#: The rules that judge the text alone; "ends complete" also asks whether the token limit cut it.
OF_TEXT = {name: check for name, check in RULES.items() if name != "ends complete"}


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text.strip().removeprefix("```json").strip("`\n ")), dict)
    except ValueError:
        return False


#: Requests outside the style's reach, most of them for a form that it forbids; each with a check of the answer's text.
OUTSIDE: dict[str, Callable[[str], bool]] = {
    "List the three primary colours as bullet points.": lambda text: len(_LIST.findall(text)) == 3,
    "Turn this into a numbered list: wash the rice, boil it for 12 minutes, let it rest.": lambda text: bool(
        re.search(r"^\s*1[.)].*^\s*3[.)]", text, re.MULTILINE | re.DOTALL)
    ),
    "In capital letters only: what is the capital of Italy?": lambda text: text.isupper() and "ROME" in text,
    "Translate into French: Where is the station?": lambda text: "gare" in text.lower(),
    "Write a Python function that returns the larger of two numbers. Code only.": lambda text: "def " in text,
    "Give me a JSON object with the keys name and age for Ana, who is 31. Only the object.": _is_json,
    "Repeat exactly, and nothing else: the quick brown fox": lambda text: text.strip("\"'. ") == "the quick brown fox",
    "What is 17 + 26? Only the number.": lambda text: text.strip(" .") == "43",
    "Continue the sequence: 2, 4, 6, 8,": lambda text: "10" in text,
    "In one word: what is the opposite of hot?": lambda text: text.strip(" .").lower() == "cold",
}
