"""What effect.md shows of effect.jsonl: its tables, and one figure of all seeds beside every simple judge."""

from __future__ import annotations

from harness import UNMEASURED, image, interval, machines, newest, signed, table

FIGURE = "../docs/effect.png"  # from effect.md; README shows it too
CHOSEN, ALL = "DPO + SFT, 0.00015", 400  # the recipe of the profile, and the pairs that all recipes had
ALONE = "SFT alone"  # the control


def plus_minus(mean: dict, digits: int = 2) -> str:
    if not mean["standard_error"]:
        return f"{mean['mean']:.{digits}f}"
    return f"{mean['mean']:.{digits}f} ± {1.96 * mean['standard_error']:.{digits}f}"


def columns(results: dict[str, dict], write: dict) -> str:
    """One row per result; `write` says how the cell of each column is written."""
    return table(["", *write], [[name, *(cell(result) for cell in write.values())] for name, result in results.items()])


REWARDS = {
    "accuracy": lambda r: interval(r["accuracy"]),
    "chosen reward": lambda r: plus_minus(r["reward_chosen"]),
    "rejected reward": lambda r: plus_minus(r["reward_rejected"]),
}
OF_RECIPES = REWARDS | {
    "KL per token": lambda r: plus_minus(r["kl"]["per_token"]),
    "rules kept": lambda r: f"{sum(r['kept']) / len(r['kept']):.3f}",
    "ends complete": lambda r: f"{r['rules']['ends complete']['rate']:.0%}",
    "tokens": lambda r: plus_minus(r["tokens"], 0),
    "distinct-2": lambda r: plus_minus(r["distinct_2"]),
    "instructions": lambda r: f"{sum(r['followed'])} of {len(r['followed'])}",
}
OF_SEEDS = REWARDS | {
    "KL per answer": lambda r: plus_minus(r["kl"]["inside"]["per_answer"], 1),
    "KL per token": lambda r: plus_minus(r["kl"]["inside"]["per_token"]),
    "tokens": lambda r: f"{r['form']['before']['tokens']['mean']:.0f} → {r['form']['after']['tokens']['mean']:.0f}",
    "minutes of training": lambda r: f"{r['seconds'] / 60:.1f}",
    "peak GiB": lambda r: f"{r['peak_memory_gib']:.1f}",
}


def moved(change: dict) -> str:
    from dpo_tutorial.comparing import stats

    return " **moved**" if stats.moved(change) else ""


def written(value: dict, digits: int = 2) -> str:
    """A share in per cent, or a mean."""
    return f"{value['rate']:.0%}" if "rate" in value else f"{value['mean']:.{digits}f}"


def changes_table(runs: dict[str, dict]) -> str:
    """Every rule and every mean of form, before and after by seed, its corrected p in brackets."""
    rows = []
    for part, digits in (("rules", 2), ("form", 1)):
        for name, target in next(iter(runs.values()))[part]["target"].items():
            cells = [
                f"{written(r[part]['before'][name], digits)} → {written(r[part]['after'][name], digits)}"
                f" ({r[part]['change'][name]['corrected']:.2g}){moved(r[part]['change'][name])}"
                for r in runs.values()
            ]
            rows.append([name, *cells, written(target, digits)])
    return table(["", *runs, "chosen answers"], rows)


def against_table(runs: dict[str, dict]) -> str:
    """Each judge's accuracy, and the policy's above it on each seed."""
    names = list(dict.fromkeys(name for r in runs.values() for name in r["against"]))
    rows = []
    for name in names:
        found = [r["against"].get(name) for r in runs.values()]
        cells = [signed(f["difference"]) if f else "" for f in found]
        rows.append([name, interval(next(f for f in found if f)["share"]), *cells])
    return table(["judge", "accuracy", *(f"policy, {seed}" for seed in runs)], rows)


def apart_table(runs: dict[str, dict], alone: dict[str, dict]) -> str:
    """What DPO with the SFT term has more than SFT alone with the same seed, on the same prompts, pairs and requests.

    Shares and tokens, each with its 95% interval, paired by item and not corrected.
    """
    from dpo_tutorial.comparing import stats

    def items(run: dict, name: str):
        return stats.right(run["each"]["margin"]) if name == "pairs judged rightly" else run["each"][name]

    seeds = [seed for seed in runs if seed in alone]
    names = [*runs[seeds[0]]["rules"]["target"], "tokens", "followed", "pairs judged rightly"]
    differences = {
        name: [stats.paired_difference(items(alone[seed], name), items(runs[seed], name)) for seed in seeds]
        for name in names
    }
    rows = [
        [{"followed": "requests followed"}.get(name, name), *(signed(d, 0 if name == "tokens" else 2) for d in found)]
        for name, found in differences.items()
    ]
    return table(["", *seeds], rows)


def kinds_table(runs: dict[str, dict]) -> str:
    first = next(iter(runs.values()))["by_kind"]

    def policy(run: dict, kind: str) -> str:
        return f"{run['by_kind'][kind]['policy']['rate']:.2f}"

    rows = [
        [kind, row["n"], f"{row['word counts']['rate']:.2f}", *(policy(r, kind) for r in runs.values())]
        for kind, row in first.items()
    ]
    return table(["rejected answer", "pairs", "word counts", *(f"policy, {seed}" for seed in runs)], rows)


def instructions_table(runs: dict[str, dict]) -> str:
    rows = []
    for seed, r in runs.items():
        for part in ("all", "within_style", "against_style"):
            found = r["instructions"] if part == "all" else r["instructions"][part]
            seen = found["smallest"]["power_80"]
            rows.append([
                seed, part.replace("_", " "), found["before"]["n"], interval(found["before"]), interval(found["after"]),
                found["gained"], found["lost"], f"{found['p']:.2g}", "" if seen is None else f"{seen:.2f}",
            ])  # fmt: skip
    head = ["", "requests", "n", "base", "policy", "gained", "lost", "p", "smallest change noticed 4 times in 5"]
    return table(head, rows)


def figure(runs: dict[str, dict], alone: dict[str, dict]):
    """All seeds at a glance: the rules that answers keep, and the pairs judged rightly beside every simple judge.

    Args:
        alone: runs of SFT alone, the control; it may be empty.
    """
    import numpy as np

    from dpo_tutorial.show import figures
    from dpo_tutorial.show.result_figures import points

    first = next(iter(runs.values()))
    rules, judges = list(first["rules"]["target"]), list(first["against"])
    trained = [(run, figures.BLUE, "DPO + SFT" if not n else "") for n, run in enumerate(runs.values())]
    trained += [(run, figures.GREEN, ALONE if not n else "") for n, run in enumerate(alone.values())]
    said = [
        f"{rule} {written(first['rules']['before'][rule])} to "
        f"{' and '.join(written(run['rules']['after'][rule]) for run, *_ in trained)}"
        for rule in rules
    ]
    of_both = f"What {len(runs)} seeds gained" + (f", then {len(alone)} of {ALONE}" if alone else "")
    said += [f"right on {' and '.join(written(run['accuracy']) for run, *_ in trained)} of pairs"]
    said += [f"{judge} on {written(first['against'][judge]['share'])}" for judge in judges]
    drawn, (writes, right) = figures.new_figure(
        width=6, height=7.4, rows=2, alt=f"{of_both}. {'; '.join(said)}", height_ratios=[9, 6]
    )

    rows = np.arange(len(rules))
    points(writes, rows - 0.38, list(first["rules"]["before"].values()), figures.GREY, "base", across=True)
    for (run, color, label), shift in zip(trained, -0.24 + 0.12 * np.arange(len(trained)), strict=True):
        points(writes, rows + shift, list(run["rules"]["after"].values()), color, label, across=True)
        points(right, [shift], [run["accuracy"]], color, "", across=True)
    target = [value["rate"] for value in first["rules"]["target"].values()]
    writes.plot(target, rows, "|", color=figures.ORANGE, markersize=22, label="chosen answers")
    shares = [first["against"][judge]["share"] for judge in judges]
    points(right, np.arange(1, len(judges) + 1), shares, figures.GREY, "", across=True)
    right.axvline(0.5, color=figures.GREY, linestyle=":")
    n = first["rules"]["before"][rules[0]]["n"]
    for axis, names, title in (
        (writes, rules, f"Share of {n} answers that keep a rule"),
        (right, ["trained", *judges], f"Share of {first['accuracy']['n']} pairs judged rightly"),
    ):
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set(xlim=(-0.02, 1.02), title=title)
    right.set_xlabel("share, 95% interval; dotted: chance")
    drawn.legend(fontsize=9, ncols=4, frameon=False, loc="outside lower center")
    return drawn


def by_rate(name: str) -> tuple[str, float]:
    """What a recipe's name is sorted by: the base first, then recipes by name, each from its lowest rate up."""
    recipe, _, rate = name.rpartition(", ")
    return (recipe, float(rate)) if recipe else ("", 0.0)


def earlier(lines: list[dict], stage: str) -> dict[str, dict]:
    """Runs of a stage that newer ones have replaced, named by how many pairs they were trained on."""
    now = newest(lines, stage)
    return {
        f"{line['pairs']} pairs, {line['name']}": line
        for line in lines
        if line["stage"] == stage and line is not now.get(line["name"], line)
    }


def drawn(lines: list[dict]) -> dict:
    runs = newest(lines, "seeds")
    return {FIGURE: figure(runs, newest(lines, "control"))} if runs else {}


def tables(lines: list[dict]) -> dict[str, str]:
    stages = ("recipes", "seeds", "control", "fewer", "swapped")
    tried, runs, alone, fewer, opposite = (newest(lines, stage) for stage in stages)
    made = {}
    if tried:
        in_order = {name: tried[name] for name in sorted(tried, key=by_rate)}
        made |= {"recipes": columns(in_order, OF_RECIPES), "recipes on": machines(lines, "recipes")}
    if runs:
        control, before = (
            {f"{ALONE}, {name}": run for name, run in found.items()} for found in (alone, earlier(lines, "control"))
        )
        every = runs | control
        made |= {
            "seeds": columns(every | earlier(lines, "seeds") | before, OF_SEEDS),
            "figure": image(figure(runs, alone), FIGURE),
            "against": against_table(runs), "kinds": kinds_table(every), "changes": changes_table(runs),
            "instructions": instructions_table(every), "seeds on": machines(lines, "seeds"),
        }  # fmt: skip
    made["control"] = changes_table(alone) if alone else UNMEASURED
    made["apart"] = apart_table(runs, alone) if runs.keys() & alone.keys() else UNMEASURED
    sizes = fewer | ({f"{ALL} pairs": tried[CHOSEN]} if CHOSEN in tried else {})
    made["fewer"] = columns(dict(sorted(sizes.items())), OF_RECIPES) if fewer else UNMEASURED
    made |= {f"{stage} on": machines(lines, stage) for stage in ("control", "fewer")}
    if opposite:
        made |= {"swapped": columns(opposite, REWARDS), "swapped on": machines(lines, "swapped")}
    return made
