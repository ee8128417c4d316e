"""Write docs/parameters.md, every knob with type, unit and default by profile: `python scripts/parameters.py`."""

import dataclasses
from pathlib import Path

from dpo_tutorial import knobs
from dpo_tutorial.comparing.report import markdown_table

TARGET = Path(__file__).parents[1] / "docs" / "parameters.md"
HEAD = """# Parameters

Every name works in five places and means the same in each; an unknown name is an error that lists the known ones.

| where | how |
| --- | --- |
| make | `make run BETA=0.3` |
| a command | `dpo-tutorial run -p BETA 0.3`; every word takes `-p` |
| papermill | `papermill notebooks/05_train_dpo.ipynb out.ipynb -p BETA 0.3` |
| a notebook | `BETA = 0.3` in its cell of parameters, also where the cell does not list it |
| the environment | `DPO_TUTORIAL_BETA=0.3` |

What is given wins over the environment, that over the profile; an empty value is not given. The text is read as the
type in the table, so `ARTIFACTS=007` is a folder called 007. Only papermill's own `-p` reads a number first, which is
refused for a text, since 7 may have been 007: there, use `-r NAME VALUE`. It also warns of names that the cell does not
list; they are taken all the same. Names of layers are separated by commas: `LORA_TARGETS=q_proj,v_proj`.

`PROFILE` chooses the column; where it is empty, the general default holds. `DTYPE` follows the hardware. This page is
made from the config by `python scripts/parameters.py`, and a test compares.
"""


def shown(value) -> str:
    if isinstance(value, tuple):
        return f"`{','.join(value)}`".replace("|", r"\|") if value else ""  # a pattern may have a bar
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


def page() -> str:
    """The table: one row per knob."""
    head = ["parameter", "type", "unit", "default", *knobs.PROFILES, "what it is"]
    rows = []
    for f in dataclasses.fields(knobs.Config):
        if f.name in ("reasons", "profile"):
            continue
        values = [knobs.PROFILES[p].get(f.name, f.default) for p in knobs.PROFILES]
        own = ["" if v == f.default else shown(v) for v in values]
        kind = type(f.default).__name__
        kind = {"NoneType": "text", "str": "text", "tuple": "names"}.get(kind, kind)
        rows.append([f"`{f.name.upper()}`", kind, f.metadata["unit"]] + [shown(f.default), *own, f.metadata["help"]])
    return f"{HEAD}\n{markdown_table(head, rows)}\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
