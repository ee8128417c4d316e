"""Print the proportions of the project: lines, modules, notebooks and the library calls in them (`make shape`)."""

import ast
import re
import statistics
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
LONG = 250

#: What each notebook shows of the libraries, as a reader would paste it.
CALLS = {
    "01": ["torch.cuda.get_device_properties(", "set_seed(", "show.config_table("],
    "02": ["BitsAndBytesConfig(", "AutoTokenizer.from_pretrained(", "AutoModelForCausalLM.from_pretrained("],
    "03": ["LoraConfig(", "get_peft_model(", ".gradient_checkpointing_enable(", ".disable_adapter("],
    "04": ["load_dataset(", ".apply_chat_template(", ".map(", ".filter(", ".shuffle(", ".select("],
    "05": ["logsigmoid(", "DPOConfig(", "DPOTrainer(", ".train(", ".save_pretrained("],
    "06": ["PeftModel.from_pretrained(", ".generate(", ".log_softmax(", ".merge_and_unload("],
}


def lines(text: str) -> int:
    """Lines that are neither blank nor a comment."""
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in text.splitlines())


def calls_into_the_package(sources: list[str]) -> int:
    """Calls of a name that an import from dpo_tutorial bound, or of something in it."""
    tree = ast.parse("\n".join(re.sub(r"^\s*%.*", "", source, flags=re.MULTILINE) for source in sources))
    ours, found = set(), 0
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpo_tutorial"):
            ours |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            while isinstance(called, ast.Attribute):
                called = called.value
            found += isinstance(called, ast.Name) and called.id in ours
    return found


def head(cells: list) -> int:
    """Lines of code before the first lesson: up to the config, and whatever follows without a word between."""
    last = max(
        i for i, c in enumerate(cells) if "from_notebook(" in c.source or "parameters" in c.metadata.get("tags", [])
    )
    while cells[last + 1].cell_type == "code":
        last += 1
    return sum(lines(c.source) for c in cells[: last + 1] if c.cell_type == "code")


def main() -> None:
    for name in ("src/dpo_tutorial", "tests", "benchmarks", "scripts"):
        sizes = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in sorted((ROOT / name).rglob("*.py"))}
        print(f"{name}: {sum(sizes.values()):,} lines in {len(sizes)} modules")
        for path in [p for p in sizes if sizes[p] > LONG]:
            print(f"  over {LONG}: {path.relative_to(ROOT / name)} {sizes[path]}")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        code = [c.source for c in cells if c.cell_type == "code"]
        sizes = [lines(source) for source in code]
        wanted = CALLS.get(path.name[:2], [])
        missing = [call for call in wanted if not any(call in source for source in code)]
        print(
            f"{path.name}: {len(cells)} cells, {len(code)} of code, median {statistics.median(sizes):g} lines, "
            f"largest {max(sizes)}; head {head(cells)}; library calls {len(wanted) - len(missing)} of {len(wanted)}"
            + (f" (missing: {', '.join(missing)})" if missing else "")
            + f"; {calls_into_the_package(code)} calls into the package"
        )


if __name__ == "__main__":
    main()
