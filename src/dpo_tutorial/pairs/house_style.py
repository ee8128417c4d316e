"""The house style that the repository's own preference set teaches, and the rules of it that a program can check."""

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
