"""Memory, hours and money of larger models and sets: arithmetic from the memory plan and from gpu.jsonl.

`python benchmarks/scale.py` writes the tables of docs/scale.md; `--price 2.1` with another price of a GPU hour.
"""

import argparse
import tempfile
from pathlib import Path

from harness import HERE, ROOT, Record, table, with_tables
from transformers import LlamaConfig, Qwen2Config

from dpo_tutorial.knobs import Config
from dpo_tutorial.training import footprint, memory_plan

PAGE = ROOT / "docs" / "scale.md"
PRICE = 3.0  # US dollars for an hour of one H100: an assumption, not an offer
SETS = {"UltraFeedback": 61_135, "10 million": 10_000_000}  # pairs
CARDS = (16, 24, 48, 80, 141)  # GB, as they are sold
ROOM = 1.5e9  # bytes for the CUDA context and what the allocator cannot give again
GPUS = (2, 8)

#: The shapes of Qwen2.5 and, for 70B, of Llama 3: (hidden, feed-forward, layers, heads, key-value heads, vocabulary).
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936),
    "1.5B": (1536, 8960, 28, 12, 2, 151936),
    "7B": (3584, 18944, 28, 28, 4, 152064),
    "14B": (5120, 13824, 48, 40, 8, 152064),
    "32B": (5120, 27648, 64, 40, 8, 152064),
    "70B": (8192, 28672, 80, 64, 8, 128256),
}
TIED = ("0.5B", "1.5B")


def config_of(name: str, folder: Path, pairs: int) -> Config:
    """LoRA r=16 on all linear layers, bf16, checkpointing, `pairs` at a time, up to 1,024 tokens."""
    hidden, wide, layers, heads, groups, vocabulary = SHAPES[name]
    kind = LlamaConfig if name == "70B" else Qwen2Config
    kind(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, tie_word_embeddings=name in TIED,
    ).save_pretrained(folder / name)  # fmt: skip
    return Config(model=str(folder / name), dtype="bf16", batch_size=pairs, max_tokens=1024)


def memory_of(name: str, folder: Path, pairs: int) -> dict[str, float]:
    """Bytes on a GPU: of the weights, of what is trained, of all else, of one layer in NF4, and the adapter's size."""
    config = config_of(name, folder, pairs)
    planned, shape = memory_plan.plan(config, answer=768, device="cuda"), footprint.read_shape(config)
    terms = planned.terms
    trained = sum(terms.get(term, 0) for term in ("adapters", "gradients", "optimizer"))
    return {
        "parameters": shape.weights, "weights": terms["weights"], "trained": trained, "adapter": terms["adapters"],
        "rest": planned.total - terms["weights"] - trained,
        "layer": (footprint.weight_bytes(shape, 2) - 2 * shape.others) / shape.layers,
    }  # fmt: skip


def whole(m: dict[str, float]) -> float:
    return m["weights"] + m["trained"] + m["rest"] + ROOM


def sliced(m: dict[str, float], gpus: int) -> float:
    """Weights and what is trained lie in slices; two layers at a time are whole: one at work, one on its way."""
    return (m["weights"] + m["trained"]) / gpus + 2 * m["layer"] + m["rest"] + ROOM


def card(size: float) -> str:
    """The smallest card of which a tenth is left free."""
    return next((f"{gb} GB" for gb in CARDS if size < 0.9e9 * gb), "none")


def memory_table(folder: Path) -> str:
    rows = []
    for name in SHAPES:
        one, eight = (memory_of(name, folder, pairs) for pairs in (1, 8))
        cells = [one["weights"], one["trained"], whole(one), whole(eight), *(sliced(one, n) for n in GPUS)]
        rows.append([name, *(f"{n / 1e9:.1f}" for n in cells), card(whole(one))])
    head = ["model", "base in NF4", "adapter, gradients, Adam", "one GPU, 1 pair at a time", "8 pairs at a time"]
    return table([*head, *(f"each of {n}, in slices" for n in GPUS), "smallest card"], rows)


def measured(lines: list[dict]) -> dict[str, tuple[float, float]]:
    """Model → (pairs, tokens) a second on UltraFeedback's rows: ours or its trial, 8 pairs at a time; the newest."""
    chosen = {}
    for line in lines:
        ours = line["name"] == "training" and line["who"] in ("ours", "ours, attention apart")
        if ours and "pairs_per_second" in line and line["data"].startswith("UltraFeedback"):
            chosen[line["shape"]] = (line["pairs_per_second"], line["tokens_per_second"])
    return chosen


def seconds_a_pair(name: str, parameters: dict[str, float], known: dict[str, tuple[float, float]]) -> float:
    """Measured where it was; on a line between the two by number of weights; above the larger, in proportion to it."""
    (small, fast), (large, slow) = ((parameters[n], 1 / known[n][0]) for n in ("0.5B", "7B"))
    if parameters[name] > large:
        return slow * parameters[name] / large
    return fast + (slow - fast) * (parameters[name] - small) / (large - small)


def money_table(folder: Path, lines: list[dict], price: float) -> str:
    known = measured(lines)
    sizes = {name: memory_of(name, folder, 1) for name in SHAPES}
    parameters = {name: size["parameters"] for name, size in sizes.items()}
    rows = []
    for name in SHAPES:
        seconds = seconds_a_pair(name, parameters, known)
        row = [name, f"{1 / seconds:.2f}", "measured" if name in known else "arithmetic"]
        for pairs in SETS.values():
            hours = seconds * pairs / 3600
            row += [f"{hours:,.1f}" if hours < 100 else f"{hours:,.0f}", f"{hours * price:,.0f}"]
        rows.append([*row, f"{sizes[name]['adapter'] / 1e6:,.0f}"])
    head = ["model", "pairs/s on one H100", "by"]
    sets = [cell for name in SETS for cell in (f"{name}: GPU hours", f"US$ at {price:g} an hour")]
    return table([*head, *sets, "MB of gradients a step"], rows)


def sets_table(lines: list[dict]) -> str:
    pairs_per_second, tokens_per_second = measured(lines)["7B"]
    each = tokens_per_second / pairs_per_second
    rows = [
        [name, f"{n:,}", f"{each * n / 1e9:,.2f}", f"{8 * each * n / 1e9:,.1f}", f"{n // 32:,}"]
        for name, n in SETS.items()
    ]
    return table(["set", "pairs", "billion tokens an epoch", "GB of token ids", "steps of 32 pairs"], rows)


def tables(price: float = PRICE) -> dict[str, str]:
    """The page's tables by their marks."""
    lines = Record(HERE / "gpu.jsonl").lines()
    with tempfile.TemporaryDirectory() as folder:
        found = {"memory": memory_table(Path(folder)), "money": money_table(Path(folder), lines, price)}
    return found | {"sets": sets_table(lines)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", type=float, default=PRICE, help=f"US dollars a GPU hour (default: {PRICE:g})")
    made = tables(parser.parse_args().price)
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
