"""Tables, conversations and answers as HTML for a notebook."""

import html
import math
from collections.abc import Sequence

from IPython.display import HTML

_STYLE = """<style>
.dpo {border-collapse: collapse; font-size: 0.92em; color: inherit;}
.dpo th, .dpo td {border: 1px solid #8886; padding: 0.35em 0.6em; text-align: left !important; vertical-align: top;
  white-space: pre-wrap; overflow-wrap: anywhere; max-width: 36em;}
.dpo th {background: #8883;}
.dpo-tokens span {border-radius: 3px; padding: 1px 0; white-space: pre-wrap;}
.dpo-prompt {background: #80808033;} .dpo-answer {background: #0072B244; border-bottom: 2px solid #0072B2;}
.dpo-tokens .dpo-down {border-bottom: 2px dotted currentColor;}
.dpo-hidden {position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);}
</style>"""


def table(rows: Sequence[dict], caption: str = "") -> HTML:
    """An HTML table with one column per key of the first row; every cell is escaped text."""
    return HTML(_STYLE + html_table(rows, caption))


def html_table(rows: Sequence[dict], caption: str = "") -> str:
    if not rows:
        return "<p>(no rows)</p>"
    head = "".join(f"<th scope='col'>{html.escape(str(k))}</th>" for k in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(row.get(k, '')))}</td>" for k in rows[0]) + "</tr>" for row in rows
    )
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return (
        f"<table class='dpo tex2jax_ignore mathjax_ignore'>{title}"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value + 0.0:.4g}"  # no -0
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def span(found: dict, form: str = ".2f") -> str:
    """The interval of a rate, a mean or a difference in words, its ends formatted as `form`; or that there is none."""
    if found["low"] is None or math.isnan(found["low"]):  # None: read from JSON, which has no NaN
        return "no interval: one value"
    return f"{found['low']:{form}} to {found['high']:{form}}"


def share(rate: dict) -> str:
    """A rate with its interval, in words."""
    return f"{rate['rate']:.2f} ({span(rate)})"


def average(mean: dict) -> str:
    """A mean with its interval, in words."""
    return f"{mean['mean']:.2f} ({span(mean)})"


def change(difference: dict) -> str:
    """A difference with its sign and its interval, in words."""
    return f"{difference['difference']:+.2f} ({span(difference, '+.2f')})"


def held_out_table(before: dict, after: dict) -> HTML:
    """What base and policy make of the held-out pairs (`stats.summarise` of each), with 95% intervals."""
    rows = [  # before training all is 0 by construction, not by sampling: no interval there
        ("accuracy", f"{before['accuracy']['rate']:.2f} by construction", share(after["accuracy"])),
        ("ties", before["ties"], after["ties"]),
        ("margin", "0", average(after["margin"])),
        ("reward of chosen", "0", average(after["reward_chosen"])),
        ("reward of rejected", "0", average(after["reward_rejected"])),
        ("rule: pick the longer answer", share(before["pick_the_longer"]), "the same"),
        ("rule: pick the shorter answer", share(before["pick_the_shorter"]), "the same"),
    ]
    return table([{"held-out pairs": what, "before": b, "after": a} for what, b, a in rows])


def change_table(found: dict[str, dict], what: str) -> HTML:
    """`stats.rules` or `stats.form` as a table: before, after, the chosen answers if given, and the paired change."""

    def written(when: str, name: str) -> str:
        value = found[when][name]
        return f"{value['rate'] if 'rate' in value else value['mean']:.2f}"

    rows = []
    for name, changed in found["change"].items():
        p = changed.get("corrected", changed["p"])
        row = {what: name, "before → after": f"{written('before', name)} → {written('after', name)}"}
        row |= {"chosen answers": written("target", name)} if "target" in found else {}
        row |= {"change, same prompts": change(changed)}
        row["corrected p" if "corrected" in changed else "p"] = f"{p:.2g}" + (", moved" if p < 0.05 else "")
        rows.append(row)
    return table(rows)


def against_table(against: dict[str, dict], accuracy: dict) -> HTML:
    """The policy's accuracy, and each simple judge's of the same pairs with the paired difference."""
    rows = [{"judge": "policy", "accuracy": share(accuracy), "policy minus judge": ""}]
    rows += [
        {"judge": name, "accuracy": share(found["share"]), "policy minus judge": change(found["difference"])}
        for name, found in against.items()
    ]
    return table(rows, f"{accuracy['n']} held-out pairs")


def kinds_table(found: dict[str, dict]) -> HTML:
    """`baselines.by_kind` as a table, without the judges that go by length or per token."""

    def shown(name: str) -> bool:
        return name not in ("n", "longer", "shorter") and "per token" not in name

    return table([
        {"rejected answer": kind, "pairs": row["n"]}
        | {name: f"{value['rate']:.2f}" for name, value in row.items() if shown(name)}
        for kind, row in found.items()
    ])  # fmt: skip


def instructions_table(found: dict) -> HTML:
    """`instructions.summary`: all requests, and those that go with and against the style."""
    parts = {"all": found, "within the style": found["within_style"], "against the style": found["against_style"]}
    rows = []
    for name, part in parts.items():
        if part is None:
            continue
        seen = part["smallest"]["power_80"]
        rows.append({
            "requests": name, "n": part["before"]["n"], "base": share(part["before"]), "policy": share(part["after"]),
            "gained, lost": f"{part['gained']}, {part['lost']}", "p": f"{part['p']:.2g}",
            "smallest change noticed 4 times in 5": "none" if seen is None else f"{seen:.2f}",
        })  # fmt: skip
    return table(rows)


def requests_table(requests: Sequence[dict], answers: dict, followed: dict) -> HTML:
    """Each request with both answers, and whether they do what it asks."""
    rows = [{"request": request["prompt"]} for request in requests]
    for column, when in (("base", "before"), ("after DPO", "after")):
        for row, answer, good in zip(rows, answers[when], followed[when], strict=True):
            row[column] = ("followed: " if good else "not followed: ") + answer_text(answer)
    return table(rows)


def config_table(config) -> HTML:
    """Every hyper-parameter and data limit of a run, with unit and meaning."""
    return table(config.rows(), f"Profile {config.profile}")


def conversation(messages: Sequence[dict]) -> HTML:
    """One conversation, a row per turn."""
    return table([{"role": m["role"], "content": m["content"]} for m in messages])


def answers(prompts, before, after, rejected_label="base", chosen_label="after DPO") -> HTML:
    """Side by side: the last user message, the base's answer, the policy's answer. All of it escaped.

    Where more came before that message, the row says so.
    """

    def asked(prompt):
        turns = sum(m["role"] == "user" for m in prompt)
        return (f"[question {turns} of a conversation] " if turns > 1 else "") + prompt[-1]["content"]

    rows = [
        {"prompt": asked(p), rejected_label: answer_text(b), chosen_label: answer_text(a)}
        for p, b, a in zip(prompts, before, after, strict=True)
    ]
    return table(rows, "Same prompts, same greedy decoding")


def samples(lines: Sequence[dict]) -> HTML:
    """`tracking.read_samples` as a strip: a row per step, a column per prompt."""
    rows: dict[int, dict] = {}
    for line in lines:
        text = answer_text({"text": line["answer"], "finished": line["finished"]})
        rows.setdefault(line["step"], {"step": line["step"]})[line["prompt"]] = text
    return table(list(rows.values()), "Greedy answers while it trained")


def answer_text(answer: dict) -> str:
    """An answer as `generation.generate` gives it; that it was cut is said."""
    return answer["text"] + ("" if answer["finished"] else " […cut at the token limit]")
