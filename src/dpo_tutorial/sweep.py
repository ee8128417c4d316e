"""Train and compare once per value of one knob: `python -m dpo_tutorial.sweep BETA 0.05 0.1 0.3 -p PROFILE cpu`."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

from . import artifacts, config, run
from .errors import ConfigError, exit_code
from .report import markdown_table

#: Of a sweep only what the knob can change runs; 05 makes the data it needs.
NOTEBOOKS = ("05_train_dpo", "06_compare")


def sweep(knob: str, values: list[str], parameters: dict[str, str]) -> list[dict]:
    """Run notebooks 05 and 06 for each value, each in a folder of its own, and tabulate what 06 found.

    Args:
        knob: a parameter of the notebooks, for example `BETA`.
        parameters: of every run, as for `dpo_tutorial.run`.

    Returns:
        One row per value; also written to `<artifacts>/sweep-<knob>/<profile>/sweep.json` and `sweep.md`.

    Raises:
        ConfigError: no such parameter, a value out of range, or a value twice; nothing has run yet.
        NotebookError: a run failed; the rows of those before it are kept.
    """
    if knob in parameters or len(set(values)) < len(values):
        raise ConfigError(f"{knob} has a value twice.", "Give each value once, after the knob's name.")
    paths = [path for path in run.notebooks() if path.stem in NOTEBOOKS]
    for value in values:  # all are right before the first one runs
        resolved = config.resolve(**config.named((parameters | {knob: value}).items()))
    root = Path(resolved.artifacts) / f"sweep-{knob.lower()}"
    table, rows = artifacts.Run(dataclasses.replace(resolved, artifacts=str(root))), []
    for value in values:
        folder = {"ARTIFACTS": str(root / re.sub(r"[^\w.@+-]", "_", value))}
        rows.append(_row(knob, value, run.run_all(parameters | {knob: value} | folder, paths)))
        table.write_json("sweep.json", rows)
        table.write_text("sweep.md", markdown(rows))
    print(f"\n{markdown(rows)}\nsweep      {table.dir / 'sweep.md'}")
    return rows


def _row(knob: str, value: str, summary: dict) -> dict:
    accuracy = summary["held_out"]
    return {
        knob: value,
        "accuracy": f"{accuracy['rate']:.2f} ({accuracy['low']:.2f} to {accuracy['high']:.2f}, n = {accuracy['n']})",
        "reward chosen": f"{summary['rewards']['chosen']:+.2f}",
        "reward rejected": f"{summary['rewards']['rejected']:+.2f}",
        "KL, nats an answer": f"{summary['kl_per_answer']:.1f}",
        "minutes": f"{sum(summary['minutes'].values()):.1f}",
    }


def markdown(rows: list[dict]) -> str:
    """The rows as a table."""
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Train and compare once per value of one knob."""
    parser = argparse.ArgumentParser(prog="python -m dpo_tutorial.sweep", description=main.__doc__)
    parser.add_argument("knob", help="a parameter of the notebooks, for example BETA")
    parser.add_argument("values", nargs="+")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    options = parser.parse_args(argv)
    return exit_code(sweep, options.knob.upper(), options.values, dict(options.p))


if __name__ == "__main__":
    raise SystemExit(main())
