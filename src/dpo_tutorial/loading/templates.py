"""What a chat template leaves open, settled once: which token ends a turn, whether the model thinks, what day it is."""

import re
from datetime import datetime

from transformers import PreTrainedTokenizerBase

#: What "today" is to a template that asks: else tomorrow's tokens would not be today's. It is Llama 3's own default.
DATE = datetime(2024, 7, 26)

_ASKED, _ANSWER = "A colour?", "Blue."


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that the template puts behind an answer; the tokenizer's EOS where it names none, None without either.

    That is not always EOS: Gemma's `<end_of_turn>`, Phi's `<|end|>`, ChatML on a tokenizer whose EOS ends a document.
    What ends an answer within a conversation counts, since some templates write EOS once more at its end.
    """
    asked, answered = {"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWER}
    last, inner = (_added_behind(tokenizer, turns) for turns in ([asked, answered], [asked, answered, asked]))
    ends = [token for token in last if token in inner] or last
    return tokenizer.eos_token if tokenizer.eos_token in ends or not ends else ends[0]


def _added_behind(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[str]:
    """The added tokens that follow the last answer, in order."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template raises whatever its author wrote; the audit says so of each row
        return []
    _, found, behind = text.rpartition(_ANSWER)
    added = tokenizer.added_tokens_decoder
    ids = tokenizer(behind.partition(_ASKED)[0] if found else "", add_special_tokens=False)["input_ids"]
    return [added[i].content for i in ids if i in added]


def template_options(tokenizer: PreTrainedTokenizerBase) -> dict:
    """What `settle` fixes for this tokenizer's template, by the names under which `training.json` records it.

    `turn_end`: the token that ends an answer; `enable_thinking`: False where the template knows the word; `date`: day
    that `strftime_now` answers, where the template calls it.
    """
    template, options = tokenizer.get_chat_template(), {"turn_end": tokenizer.eos_token}
    if re.search(r"\benable_thinking\b", template):
        options["enable_thinking"] = False
    if re.search(r"\bstrftime_now\b", template):
        options["date"] = f"{DATE:%Y-%m-%d}"
    return options


def settle(tokenizer: PreTrainedTokenizerBase) -> None:
    """Write these choices into the tokenizer, so that TRL, generation and whoever loads it later see the same tokens.

    EOS becomes the token that ends a turn. The template gets a first line of defaults: no thinking, a fixed date, and
    the EOS it was written for. A caller's own `enable_thinking` still counts. A second call changes nothing.
    """
    template, eos, end = tokenizer.get_chat_template(), tokenizer.eos_token, turn_end(tokenizer)
    options, first = template_options(tokenizer), ""
    if "enable_thinking" in options:
        first += "{% if enable_thinking is not defined %}{% set enable_thinking = false %}{% endif %}"
    if "date" in options:
        codes = "".join(f" | replace('%{code}', '{DATE.strftime('%' + code)}')" for code in "YymdBbAajHIMSp")
        first += "{% macro strftime_now(format) %}{{ format" + codes + " }}{% endmacro %}"
    if end != eos and re.search(r"\beos_token\b", template):
        first += "{% set eos_token = " + repr(eos or "") + " %}"
    if end != eos:
        tokenizer.eos_token = end
    if first and not template.startswith(first):
        tokenizer.chat_template = f"{first}\n{template}"
