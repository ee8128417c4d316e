"""`dpo-tutorial export --adapter DIR --to merged|gguf|ollama`: written, then scored again, then named."""

import dataclasses
import tempfile
from pathlib import Path

from ..adapter import lora
from ..comparing.report import markdown_table
from ..errors import ArtifactError, ConfigError
from ..knobs import Config
from ..loading import embedded, models
from ..pairs import prepare
from ..run_folder import Run, json_text
from . import convert, engines, gate, merge


def export(
    config: Config, adapter: str | Path, to: str, out: Path, *,
    into: str = "4bit", store: str = "fp16", kind: str = "q8_0", pairs: int = 16,
) -> dict:  # fmt: skip
    """Export the trained model into a folder, which appears whole or not at all, with what the gate found in it.

    Args:
        to: "merged", "gguf" or "ollama" (a GGUF file and its Modelfile).
        into, store: as `merge.merged`. A GGUF file is made from what they give.
        kind: as `convert.to_gguf`.
        pairs: test pairs that the gate scores. Greedily it compares `gate.PROMPTS` test prompts, however few these are.

    Returns:
        As `gate.measure`; also written as `GATE.json`, and as words in the folder's README.

    Raises:
        ArtifactError: `out` holds anything but an earlier export.
        ConfigError: `pairs` is less than 1.
        ArtifactError, ConfigError, ModelUnsuitableError: as `merge.merged`, `convert.to_gguf`, `convert.modelfile`.
    """
    if pairs < 1:
        raise ConfigError(f"--pairs {pairs} leaves the check of the export nothing to score.", "Give 1 or more.")
    if out.exists() and not (out / "GATE.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise ArtifactError(f"{out} holds other files, which an export would replace.", "Give --out a new folder.")
    tokenizer = models.load_tokenizer(config)
    if to != "merged":  # what is missing is said before minutes of work
        convert.check_installed(kind)
    if to == "ollama":
        convert.modelfile(tokenizer, "")
    test = prepare.prepare(config, tokenizer).splits["test"]
    some = test.select(range(min(pairs, len(test))))
    model = gate.trained(config, lora.load_policy(config, adapter), tokenizer, some, test["prompt"][: gate.PROMPTS])
    return write(config, adapter, model, to, out, into=into, store=store, kind=kind)


def write(
    config: Config, adapter: str | Path, model: gate.Trained, to, out: Path, *, into, store, kind, opened=engines.opened
) -> dict:  # fmt: skip
    """As `export`, for what the trained model was scored on already; `opened` opens the export for the gate."""
    with Run.replacing(out) as folder, tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        whole = folder if to == "merged" else Path(aside)
        merge.save(merge.merged(config, adapter, into, store), model.tokenizer, whole)
        file = folder if to == "merged" else convert.to_gguf(whole, folder / f"model-{kind}.gguf", kind)
        if to == "ollama":
            (folder / "Modelfile").write_text(convert.modelfile(model.tokenizer, file.name), encoding="utf-8")
        found = gate.measure(model, opened(file, config))
        note(folder, adapter, found, to=to, into=into, store=store, kind=None if to == "merged" else kind)
    return found


def note(folder: Path, adapter: str | Path, found: dict, **about: str | None) -> None:
    """Write into an export what the gate found and how it was made: `GATE.json`, and the same in words, `README.md`."""
    whose = {"adapter_sha256": embedded.sha256(Path(adapter) / "adapter_model.safetensors")}
    (folder / "GATE.json").write_text(json_text(about | whose | found), encoding="utf-8")
    (folder / "README.md").write_text(_card(found, about), encoding="utf-8")


def _card(found: dict, about: dict) -> str:
    name = "# NOT the trained model" if found["why"] else "# The trained model"
    made = ", ".join(f"{key} {value}" for key, value in about.items() if value)
    rows = gate.rows(found)
    table = markdown_table(list(rows[0]), [list(row.values()) for row in rows])
    return "\n".join([name, "", *found["why"], f"Exported by dpo-tutorial: {made}.", "", table, ""])


def main(adapter: str, to: str, out: str, parameters: dict[str, str], **how) -> int:
    """Exit code: 0; 1 where what was exported is not the trained model."""
    config = dataclasses.replace(merge.config_of(adapter, parameters, "fp32"), batch_size=1)
    there = Path(out or Path(adapter).parent / to)
    found = export(config, adapter, to, there, **how)
    for row in gate.rows(found):
        print(" | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    print(f"wrote {there}" + (", which is NOT the trained model" if found["why"] else ""))
    return bool(found["why"])
