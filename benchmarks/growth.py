"""How does cost grow with pairs, length, weights and rows of the source? `python benchmarks/growth.py [growth|page]`.

Random weights, pairs of equal length, every training in a process of its own; a quarter of an hour.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from harness import HERE, Record, child, latest, machine, main, table, turns

TRAININGS = {
    "pairs": [("30M", pairs, 128) for pairs in (32, 128, 512)],
    "length": [("30M", 32, length) for length in (128, 256, 512)],
    "size": [(shape, 24, 256) for shape in ("30M", "135M", "360M")],
}
#: What the table and the figure show: group of the record, what grows, its values, and what is fitted to it.
FITS = (
    ("pairs", "pairs", "tokens", "seconds"),
    ("length", "length", "tokens", "seconds"),
    ("size", "weights", "weights", "seconds"),
    ("rows", "rows", "rows", "seconds"),
    ("rows", "rows", "rows", "peak_mib"),
    ("pairs", "pairs", "pairs", "peak_gib"),
)
SHOWN = {"seconds": ("seconds", ".0f"), "peak_mib": ("MiB of the audit", ".0f"), "peak_gib": ("peak GiB", ".2f")}


def growth(record: Record, options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        weights = {}
        for shape in ("30M", "135M", "360M"):
            made = child("tasks.py", {"kind": "make", "shape": shape, "path": f"{folder}/{shape}"})
            weights[shape] = made["weights"]
        for turn, name in turns(TRAININGS, 2):
            for shape, pairs, length in TRAININGS[name]:
                task = {"kind": "train", "trainer": "ours", "pairs": pairs, "val": 0, "length": length}
                task["knobs"] = {"model": f"{folder}/{shape}", "max_tokens": length}
                found = child("tasks.py", task, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"})
                steady = statistics.mean(found["steps"][1:])  # the first step also fills caches
                record.write(
                    "growth", name, turn=turn, weights=weights[shape], pairs=pairs, length=length,
                    tokens=found["tokens"], seconds=steady * len(found["steps"]), peak_gib=found["peak_gib"],
                )  # fmt: skip
    for rows in (1000, 4000, 16000):
        record.write("growth", "rows", turn=0, **child("tasks.py", {"kind": "prepare", "rows": rows}))


def smallest(rows: list[dict], x: str, y: str) -> tuple[list[float], list[float]]:
    """(x, y) of the repeats with the smallest y: other work on the machine only ever adds."""
    values = sorted({row[x] for row in rows})
    return values, [min(row[y] for row in rows if row[x] == value) for value in values]


def slope(rows: list[dict], x: str, y: str) -> float:
    """Exponent of y in x, by least squares on logarithms: 1 is in proportion."""
    import numpy as np

    xs, ys = smallest(rows, x, y)
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def tables(lines: list[dict]) -> dict[str, str]:
    about, found = latest(lines, "growth")
    rows = []
    for group, grows, x, y in FITS:
        values = [f"{v / 1e6:.0f}M" if v > 1e6 else f"{v:,}" for v in smallest(found[group], grows, y)[0]]
        what, digits = SHOWN[y]
        measured = ", ".join(f"{v:{digits}}" for v in smallest(found[group], x, y)[1])
        rows.append([grows, ", ".join(values), what, measured, f"{slope(found[group], x, y):.2f}"])
    return {"growth": table(["grows with", "values", "what", "measured", "exponent"], rows), "machine": machine(about)}


def figure(found: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [fit for fit in FITS if fit[0] != "rows"]
    fig, axes = plt.subplots(1, len(panels), figsize=(13, 3.2), layout="constrained")
    for axis, (group, grows, x, y) in zip(axes, panels, strict=True):
        rows = sorted(found[group], key=lambda row: row[x])
        xs, ys = [row[x] for row in rows], [row[y] for row in rows]
        power = slope(rows, x, y)
        scale = statistics.geometric_mean(b / a**power for a, b in zip(xs, ys, strict=True))
        axis.loglog(xs, ys, "o", color="#0072B2")
        axis.loglog([xs[0], xs[-1]], [scale * v**power for v in (xs[0], xs[-1])], "-", color="#D55E00")
        axis.set(title=f"{SHOWN[y][0]} by {grows}\nexponent {power:.2f}", xlabel=x)
        axis.set_ylim(min(ys) / 2, max(ys) * 2)
        axis.minorticks_off()
        seen = sorted(set(xs))
        axis.set_xticks(seen, [f"{v / 1e6:.0f}M" if v > 1e6 else f"{v:,}" for v in seen])
        ends = [min(ys), max(ys)] if max(ys) > 1.5 * min(ys) else [max(ys)]
        axis.set_yticks(ends, [f"{v:.3g}" for v in ends])
    fig.savefig(path, dpi=110)
    plt.close(fig)


if __name__ == "__main__":
    figure(latest(main(__file__, {"growth": growth}, tables), "growth")[1], HERE / "growth.png")
