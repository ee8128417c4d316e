"""How fast is training, beside stock TRL's? `python benchmarks/training_speed.py [STAGE …] [page]`, an hour in all.

compare   ours, stock TRL and bare forward and backward passes in turn, on 64 pairs of the `cpu` profile
whole     the same once, on all of its pairs
switches  ours with one part changed, in turn
order     losses step by step on the same batches in the same order, and what rounding does to them

What a GPU does is in `gpu.py`, how cost grows with pairs, length and weights in `growth.py`.
"""

from __future__ import annotations

import statistics

from harness import Record, child, latest, machine, main, median, spread, table, turns

ALL = 329  # training pairs of the `cpu` profile
OURS = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}  # as `make run` starts its kernels
FRESH = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}  # what compiling costs a first run

#: What `ours` is made of, one part changed at a time.
SWITCHES = {
    "ours": {},
    "prompt computed once per answer": {"knobs": {"prefix_sharing": False}},
    "TRL's LM head as it comes": {"without": ["head"]},
    "allocator as it comes": {"without": ["allocator"]},
    "2 pairs at a time, 4 times": {"knobs": {"batch_size": 2, "grad_accum": 4}},
    "batches in random order": {"arguments": {"train_sampling_strategy": "random"}},
    "gradient checkpointing": {"knobs": {"gradient_checkpointing": True}},
    "reference precomputed": {"arguments": {"precompute_ref_log_probs": True}},
    "base not quantized": {"quantize": False},
    "blocks compiled": {"compiled": True},
}
HEAD, SHARING, COMPILED = "TRL's LM head as it comes", "prompt computed once per answer", "blocks compiled"
PADDED = "stock, padded to a multiple of 64"


def measure(**task) -> dict:
    task = {"kind": "train", "trainer": "ours"} | task
    return child("tasks.py", task, FRESH | ({} if task["trainer"] == "stock" else OURS))


# --- stages ---------------------------------------------------------------------------------------------------------


def in_turn(record: Record, stage: str, pairs: int, n: int) -> None:
    task = {"pairs": pairs, "val": round(48 * pairs / ALL) or 1, "generate": 4}
    tasks = {"ours": task, "stock": task | {"trainer": "stock"}, "raw": {"kind": "raw"}}
    for turn, name in turns(tasks, n):
        record.write(stage, name, turn=turn, **measure(**tasks[name]))


def compare(record: Record, options) -> None:
    in_turn(record, "compare", options.pairs, options.turns)


def whole(record: Record, options) -> None:
    in_turn(record, "whole", ALL, 1)


def switches(record: Record, options) -> None:
    for turn, name in turns(SWITCHES, 2):
        record.write("switches", name, turn=turn, **measure(pairs=48, val=8, **SWITCHES[name]))


def order(record: Record, options) -> None:
    """On the same batches in the same order: ours, without our hooks, and what rounding does."""
    knobs = {"prefix_sharing": False, "gradient_checkpointing": True}
    stock = {"knobs": knobs, "without": ["head", "allocator"], "untouched": True}
    tasks = {
        "ours": {"untouched": True},
        "stock": stock,
        PADDED: stock | {"arguments": {"pad_to_multiple_of": 64}},
        "ours, float32": {"knobs": {"dtype": "fp32"}, "untouched": True},
        "ours, blocks compiled": {"compiled": True},
    }
    for name, task in tasks.items():
        record.write("order", name, **measure(pairs=48, **task))


# --- tables ---------------------------------------------------------------------------------------------------------


def ratios(runs: list[dict], others: list[dict], key: str) -> list[float]:
    """run / other, turn by turn; of a turn that was stopped there is none."""
    return [a[key] / b[key] for a, b in zip(runs, others, strict=False)]


def fastest(runs: list[dict]) -> float:
    """Pairs per second of the best run: other work on the machine only ever slows."""
    return max(run["pairs_per_second"] for run in runs)


def medians(found: dict[str, list[dict]]) -> str:
    rows = [
        [
            name, f"{median(runs, 'pairs_per_second'):.2f}", f"{median(runs, 'tokens_per_second'):,.0f}",
            f"{median(runs, 'padding'):.0%}", f"{median(runs, 'positions') / median(runs, 'tokens'):.2f}",
            f"{median(runs, 'peak_gib'):.1f}",
        ]
        for name, runs in (("ours", found["ours"]), ("stock TRL", found["stock"]))
    ]  # fmt: skip
    rows.append(["bare passes", "", f"{median(found['raw'], 'tokens_per_second'):,.0f}", "", "", ""])
    return table(["", "pairs/s", "tokens/s", "padding", "positions computed per token", "peak GiB"], rows)


def ratio_table(found: dict[str, list[dict]]) -> str:
    rows = [
        [what, spread(ratios(found["ours"], found[other], key), digits)]
        for what, other, key, digits in (
            ("pairs per second, ours / stock", "stock", "pairs_per_second", 1),
            ("peak memory, ours / stock", "stock", "peak_gib", 2),
            ("tokens per second, ours / bare passes", "raw", "tokens_per_second", 2),
        )
    ]
    return table(["", "median (least to most)"], rows)


def phase_table(found: dict[str, list[dict]]) -> str:
    names = dict.fromkeys(phase for who in ("ours", "stock") for run in found[who] for phase in run["phases"])
    seconds = {
        name: [statistics.median(r["phases"].get(name, 0) for r in found[who]) for who in ("ours", "stock")]
        for name in names
    }
    return table(["phase", "ours", "stock TRL"], [[n, *(f"{s:.1f}" for s in pair)] for n, pair in seconds.items()])


def switch_table(found: dict[str, list[dict]]) -> str:
    rows = [
        [
            name, f"{fastest(runs):.2f}", f"{fastest(runs) / fastest(found['ours']):.2f}",
            f"{median(runs, 'peak_gib'):.1f}", " ".join(f"{run['pairs_per_second']:.2f}" for run in runs),
        ]
        for name, runs in found.items()
    ]  # fmt: skip
    return table(["", "pairs/s", "of ours", "peak GiB", "all runs"], rows)


def compile_table(found: dict[str, list[dict]]) -> str:
    ours, compiled = (
        statistics.median(step for run in found[name] for step in run["steps"][1:]) for name in ("ours", COMPILED)
    )
    extra = statistics.median(run["steps"][0] for run in found[COMPILED]) - ours
    head = ["seconds of a step, of ours", "seconds that the first step takes longer", "steps that win them back"]
    return table(head, [[f"{compiled / ours:.2f}", f"{extra:.0f}", f"{extra / (ours - compiled):.0f}"]])


def apart(found: dict[str, list[dict]], name: str, key: str) -> float:
    """Largest difference of a step from a training without our hooks."""
    return max(abs(a - b) for a, b in zip(found["stock"][0][key], found[name][0][key], strict=True))


def order_table(found: dict[str, list[dict]]) -> str:
    rows = [[name, *(f"{apart(found, name, key):.4f}" for key in ("losses", "rewards"))] for name in ("ours", PADDED)]
    return table(["", "loss", "chosen reward"], rows)


def young_table(found: dict[str, list[dict]]) -> str:
    rows = [
        [
            name, f"{run['losses'][-1]:.3f}", f"{run['rewards'][1]:+.3f}", f"{run['rewards'][-1]:.3f}",
            f"{run['untouched']:.0%}" if "untouched" in run else "",
        ]
        for name, (run,) in found.items()
    ]  # fmt: skip
    return table(["", "last loss", "chosen reward, step 2", "last chosen reward", "outputs untouched"], rows)


def tables(lines: list[dict]) -> dict[str, str]:
    about, found = latest(lines, "compare")
    _, all_pairs = latest(lines, "whole")
    _, changed = latest(lines, "switches")
    _, steps = latest(lines, "order")
    return {
        "compare": medians(found), "ratios": ratio_table(found), "phases": phase_table(found),
        "whole": medians(all_pairs), "whole ratios": ratio_table(all_pairs),
        "switches": switch_table(changed), "compiled": compile_table(changed),
        "order": order_table(steps), "young": young_table(steps), "machine": machine(about),
    }  # fmt: skip


def options(parser) -> None:
    parser.add_argument("--turns", type=int, default=3, help="of `compare`")
    parser.add_argument("--pairs", type=int, default=64, help="training pairs of `compare`")


STAGES = {"compare": compare, "whole": whole, "switches": switches, "order": order}

if __name__ == "__main__":
    main(__file__, STAGES, tables, options=options)
