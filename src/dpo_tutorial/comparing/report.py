"""One report of a comparison: JSON for programs, and an HTML page for people that needs nothing beside it."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from .. import run_folder, show
from ..machine import hardware, session

#: Nothing on the page may run or be fetched, whatever a model wrote into it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """<style>
:root {color-scheme: light dark;} body {font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto;
padding: 0 1em;} img {max-width: 100%; height: auto;} section {overflow-x: auto;}
</style>"""


NO_WORD_COUNTS = "Word counting was left out: it learns from a training split, and these pairs have none."


def save(run: run_folder.Run, training: dict, records: Sequence[dict], comparison: dict) -> list[Path]:
    """Write `records.json`, `comparison.json` and `report.html` into the run's folder.

    `training` is the adapter's `training.json`; the others are as `compare.compare` gives them.
    """
    whole = comparison | {
        "data": run.config.identity()["data"],
        "adapter": {name: training[name] for name in ("base", "config", "seconds", "versions", "hardware")},
        "versions": session.versions(),
        "hardware": hardware.hardware(),
    }
    return [
        run.write_json("records.json", list(records)),
        run.write_json("comparison.json", whole),
        run.write_text("report.html", page(records, whole)),
    ]


def page(records: Sequence[dict], comparison: dict) -> str:
    """The report as one HTML file: figures inside it, no script, every text of model and data escaped."""
    c, held_out = comparison, comparison["held_out"]
    settings, noise = c["adapter"]["config"], c["noise"]
    inside, outside = c["kl"]["inside"], c["kl"]["outside"]
    asked = [row["prompt"] for row in c["answers"]]
    before, after = ([row[when] for row in c["answers"]] for when in ("before", "after"))
    checked = c["instructions"]
    sections = {
        "In words": "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in c["verdict"]) + "</ul>",
        "Held-out pairs": show.held_out_table(held_out["before"], held_out["after"]).data
        + _text(
            f"Scoring the same pairs with other padding moves a margin by {noise['spread']:.2g} (root mean square, "
            f"{noise['dtype']}); {noise['within']} of {len(records)} margins are below the noise floor of "
            f"{noise['floor']:.2g}."
        )
        + show.against_table(c["against"], held_out["after"]["accuracy"]).data
        + ("" if "word counts" in c["against"] else _text(NO_WORD_COUNTS))
        + (show.kinds_table(c["by_kind"]).data if c["by_kind"] else "")
        + _picture(show.margins(records))
        + _picture(show.by_length_gap(held_out["after"]["by_length_gap"], held_out["after"]["accuracy"]))
        + _picture(show.calibration(held_out["after"]["calibration"])),
        "Where the reward lies": _picture(show.by_position(c["by_position"]))
        + "".join(show.conversation(shown["prompt"]).data + show.heat_map(shown).data for shown in c["token_rewards"]),
        "How far it moved": _text(
            f"KL from the base on the policy's own answers: {show.average(inside['per_answer'])} nats an answer, "
            f"{show.average(inside['per_token'])} a token; on the instructions below "
            f"{show.average(outside['per_token'])} a token."
        ),
        "Rules kept": _picture(show.rates(c["rules"]["before"], c["rules"]["after"]))
        + show.change_table(c["rules"], "share of answers that keep the rule").data,
        "Form of the answers": show.change_table(c["form"], "form of the answers").data,
        "Answers": show.answers(asked, before, after).data,
        "Instructions": show.instructions_table(checked).data
        + show.requests_table(checked["requests"], checked["answers"], checked["followed"]).data,
        "How it was made": _text(f"Judged on {len(records)} pairs of {c['data']}.")
        + show.table([{"": name, "value": value} for name, value in settings.items()], "Training").data
        + show.table(
            [{"": name, "value": value} for name, value in (c["versions"] | c["hardware"]).items()], "This evaluation"
        ).data,
    }
    base = html.escape(c["adapter"]["base"]["name"])
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Before and after DPO: {base}</title>{_STYLE}</head>"
        f"<body><h1>Before and after DPO: {base}</h1>{body}</body></html>\n"
    )


def _text(words: str) -> str:
    return f"<p>{html.escape(words)}</p>"


def _picture(figure) -> str:
    image = show.picture(figure)
    data = base64.b64encode(image.data).decode()
    alt = html.escape(show.alt_text(figure))
    return f'<p><img alt="{alt}" src="data:image/png;base64,{data}" width="{image.width}"></p>'


def markdown_table(head: Sequence, rows: Sequence[Sequence]) -> str:
    """A table in Markdown, for records and command lines; each value is written as its text."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])
