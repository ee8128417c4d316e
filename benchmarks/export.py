"""Is an export still the trained model? `python benchmarks/export.py --adapter DIR [ways|page]`.

Every way to merge and to convert, scored by the gate on the same 16 test pairs in float32. The limits of
`dpo_tutorial.using.gate` are set from this table. Needs the extra `export`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness import Record, child, latest, machine, main, table

#: name → arguments of `export.export`
WAYS = {
    "merged into the 4-bit weights, fp16": dict(to="merged"),
    "merged into the 4-bit weights, bf16": dict(to="merged", store="bf16"),
    "merged into the 16-bit checkpoint, fp16": dict(to="merged", into="16bit"),
    "merged into the 16-bit checkpoint, bf16": dict(to="merged", into="16bit", store="bf16"),
    "GGUF F16": dict(to="gguf", kind="f16"),
    "GGUF Q8_0": dict(to="gguf", kind="q8_0"),
}


def measure(task: dict, folder: Path) -> dict:
    import time

    from dpo_tutorial.using import export, merge

    config = merge.config_of(task["adapter"], {}, "fp32")
    start = time.perf_counter()
    found = export.export(config, task["adapter"], out=folder / "out", pairs=task["pairs"], **task["how"])
    size = sum(path.stat().st_size for path in (folder / "out").glob("model*"))
    return found | {"megabytes": round(size / 1e6), "seconds": round(time.perf_counter() - start)}


def ways(record: Record, options: argparse.Namespace) -> None:
    for name, how in WAYS.items():
        task = {"kind": "measure", "adapter": str(options.adapter), "pairs": options.pairs, "how": how}
        record.write("ways", name, **child(__file__, task))


def tables(lines: list[dict]) -> dict[str, str]:
    about, found = latest(lines, "ways")
    rows = [
        [name, f"{r['margin']['exported']:.3f}", f"{r['margin_change_rms']:.3f}", f"{r['margin_change_share']:.1%}",
         f"{r['margin_change_largest']:.3f}", f"{r['kl']:.5f}", f"{r['other_tokens']:.1%}",
         f"{r['greedy']['equal']} of {r['greedy']['prompts']}", r["megabytes"], "no" if r["why"] else "yes"]
        for name, (r,) in found.items()
    ]  # fmt: skip
    head = ["export", "mean margin", "change, rms", "of the margins' rms", "largest", "KL per token, nats",
            "other likeliest token", "64 greedy tokens equal", "MB", "passes"]  # fmt: skip
    (first, *_) = (r for (r,) in found.values())
    margin = f"{first['margin']['adapter']:.3f}, {first['pairs']} pairs"
    return {"ways": table(head, rows), "adapter": margin, "machine": machine(about)}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", type=Path, default=Path("artifacts/cpu/adapter"), help="folder that training saved"
    )
    parser.add_argument("--pairs", type=int, default=16, help="test pairs to score")


if __name__ == "__main__":
    main(__file__, {"ways": ways}, tables, kinds={"measure": measure}, options=options)
