"""Is an export still the trained model? `python benchmarks/export.py --adapter DIR [ways|llama_cpp|rounding|page]`.

Every way to merge and to convert, scored by the gate on the same 16 test pairs in float32. The limits of
`dpo_tutorial.using.gate` are twice what llama.cpp itself makes of Q8_0. Needs the extra `export`, and for the stage
`llama_cpp` that extra too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness import Record, child, latest, machine, main, table

#: name → arguments of `export.export`
WAYS = {
    "merged into the dequantized 4-bit weights, fp16": dict(to="merged"),
    "merged into the dequantized 4-bit weights, bf16": dict(to="merged", store="bf16"),
    "merged into the 16-bit checkpoint, fp16": dict(to="merged", into="16bit"),
    "merged into the 16-bit checkpoint, bf16": dict(to="merged", into="16bit", store="bf16"),
    "GGUF F16": dict(to="gguf", kind="f16"),
    "GGUF Q8_0": dict(to="gguf", kind="q8_0"),
}
#: the same, of what llama.cpp itself computes
LLAMA_CPP = {f"GGUF {kind.upper()}": dict(to="gguf", kind=kind) for kind in ("f16", "q8_0", "q4_k_m")}


def measure(task: dict, folder: Path) -> dict:
    """What the gate finds in each way, by its name; the trained model is scored once."""
    from dpo_tutorial.adapter import lora
    from dpo_tutorial.loading import models
    from dpo_tutorial.pairs import prepare
    from dpo_tutorial.using import engines, export, gate, merge

    ways, opened = (LLAMA_CPP, engines.LlamaCpp) if task["llama_cpp"] else (WAYS, engines.Transformers)
    config = merge.config_of(task["adapter"], {}, "fp32")
    tokenizer = models.load_tokenizer(config)
    test = prepare.prepare(config, tokenizer).splits["test"]
    policy, prompts = lora.load_policy(config, task["adapter"]), test["prompt"][: gate.PROMPTS]
    model = gate.trained(config, policy, tokenizer, test.select(range(task["pairs"])), prompts)
    found = {}
    for name, how in ways.items():
        how = {"into": "4bit", "store": "fp16", "kind": "", "opened": opened} | how
        found[name] = export.write(config, task["adapter"], model, out=folder / "out", **how)
        size = sum(path.stat().st_size for path in (folder / "out").glob("model*"))
        found[name] |= {"megabytes": round(size / 1e6)}
    return found


def rounding(task: dict, folder: Path) -> dict:
    """What is left of the update once base plus update is rounded to bfloat16.

    `kept`: the projection of what the weights moved by on the update, 1 where all of it is there; `unmoved`: the share
    of adapted weights that are the same number as before.
    """
    from peft import PeftModel

    from dpo_tutorial.loading import models
    from dpo_tutorial.using import merge

    config = merge.config_of(task["adapter"], {}, "fp32")
    base = models.load_base(config, quantize=task["quantize"])
    base = base.dequantize() if task["quantize"] else base
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    merged = PeftModel.from_pretrained(base, task["adapter"]).merge_and_unload()
    kept = size = unmoved = count = 0.0
    for name, after in merged.named_parameters():
        update = after.detach() - before[name]
        if update.any():
            start = before[name].bfloat16().float() if task["rounded"] else before[name]
            moved = (start + update).bfloat16().float() - start
            kept, size = kept + (moved * update).sum().item(), size + (update**2).sum().item()
            unmoved, count = unmoved + (moved == 0).sum().item(), count + update.numel()
    return {"kept": round(kept / size, 3), "unmoved": round(unmoved / count, 3)}


def all_rounding(record: Record, options: argparse.Namespace) -> None:
    for name, quantize, rounded in (
        ("the checkpoint's, bfloat16 numbers", False, False),
        ("4-bit, dequantized in float32", True, False),
        ("4-bit, dequantized and rounded to bfloat16", True, True),
    ):
        task = {"kind": "rounding", "adapter": str(options.adapter), "quantize": quantize, "rounded": rounded}
        record.write("rounding", name, **child(__file__, task))


def ways(record: Record, options: argparse.Namespace, stage: str = "ways") -> None:
    task = {"kind": "measure", "adapter": str(options.adapter), "pairs": options.pairs}
    for name, found in child(__file__, task | {"llama_cpp": stage == "llama_cpp"}).items():
        record.write(stage, name, **found)


def llama_cpp(record: Record, options: argparse.Namespace) -> None:
    ways(record, options, "llama_cpp")


def ways_table(found: dict[str, list[dict]]) -> str:
    rows = [
        [name, f"{r['margin']['exported']:.3f}", f"{r['margin_change_rms']:.3f}", f"{r['margin_change_share']:.1%}",
         f"{r['margin_change_largest']:.3f}", f"{r['kl']:.5f}", f"{r['other_tokens']:.1%}",
         f"{r['greedy']['equal']} of {r['greedy']['prompts']}", r["megabytes"], "no" if r["why"] else "yes"]
        for name, (r,) in found.items()
    ]  # fmt: skip
    head = ["export", "mean margin", "change, rms", "of the margins' rms", "largest", "KL per token, nats",
            "other likeliest token", "64 greedy tokens equal", "MB", "passes"]  # fmt: skip
    return table(head, rows)


def tables(lines: list[dict]) -> dict[str, str]:
    about, found = latest(lines, "ways")
    made = {"ways": ways_table(found), "machine": machine(about)}
    if any(line["stage"] == "llama_cpp" for line in lines):
        made["llama.cpp"] = ways_table(latest(lines, "llama_cpp")[1])
    (first, *_) = (r for (r,) in found.values())
    margin = f"{first['margin']['adapter']:.3f}, {first['pairs']} pairs"
    _, found = latest(lines, "rounding")
    lost = [[name, f"{r['kept']:.2f}", f"{r['unmoved']:.0%}"] for name, (r,) in found.items()]
    lost = table(["weights before the sum", "of the update kept", "weights unmoved"], lost)
    return made | {"rounding": lost, "adapter": margin}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", type=Path, default=Path("artifacts/cpu/adapter"), help="folder that training saved"
    )
    parser.add_argument("--pairs", type=int, default=16, help="test pairs to score")


if __name__ == "__main__":
    main(
        __file__,
        {"ways": ways, "llama_cpp": llama_cpp, "rounding": all_rounding},
        tables,
        kinds={"measure": measure, "rounding": rounding},
        options=options,
    )
