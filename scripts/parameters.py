"""Write docs/parameters.md, every knob with type, unit and default by profile: `python scripts/parameters.py`."""

import dataclasses
from pathlib import Path

from dpo_tutorial import config, run
from dpo_tutorial.report import markdown_table

TARGET = Path(__file__).parents[1] / "docs" / "parameters.md"
HEAD = """# Parameters

Made from the config by `python scripts/parameters.py`; a test compares. Every name works as `-p NAME VALUE` of
`python -m dpo_tutorial.train`; those marked with a dot also stand in the parameters cell of the notebooks, so that
papermill, `make run` and Colab's reader can set them. Empty or None takes the value of the profile. Where a profile's
column is empty, the general default holds. `DTYPE` follows the hardware.
"""


def shown(value) -> str:
    if isinstance(value, tuple):
        return " ".join(value)
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


def page() -> str:
    """The table: one row per knob."""
    in_notebooks = set(run.declared_parameters(run.notebooks(TARGET.parents[1] / "notebooks")[0]))
    head = ["parameter", "in notebooks", "type", "unit", "default", *config.PROFILES, "what it is"]
    rows = []
    for f in dataclasses.fields(config.Config):
        if f.name in ("reasons", "profile"):
            continue
        values = [config.PROFILES[p].get(f.name, f.default) for p in config.PROFILES]
        own = ["" if v == f.default else shown(v) for v in values]
        kind = type(f.default).__name__
        kind = {"NoneType": "text", "str": "text", "tuple": "names"}.get(kind, kind)
        rows.append(
            [f"`{f.name.upper()}`", "•" if f.name.upper() in in_notebooks else "", kind, f.metadata["unit"]]
            + [shown(f.default), *own, f.metadata["help"]]
        )
    return f"{HEAD}\n{markdown_table(head, rows)}\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
