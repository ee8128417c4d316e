"""What computes an export again: plain transformers, or llama.cpp itself where it can be imported."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..errors import ModelUnsuitableError, first_line
from ..knobs import Config
from ..machine import hardware

Messages = list[dict[str, str]]


class Exported(ABC):
    """An export, opened."""

    engine: str
    eos: frozenset[int]  # tokens at which its answers end

    @abstractmethod
    def ids(self, messages: Messages, answering: bool = False) -> list[int]:
        """Token ids of a conversation by the export's own template; `answering` opens the assistant's next turn."""

    @abstractmethod
    def logits(self, ids: list[int]) -> Tensor:
        """`[length, vocabulary]` in float32 on the CPU; row t predicts token t + 1."""

    def encode(self, prompt: Messages, answer: Messages) -> tuple[list[int], list[int]]:
        """As `encoding.encode`, which refuses a template that is wrong: here that is to be measured."""
        before = self.ids(prompt, True)
        return before, self.ids(prompt + answer)[len(before) :]


def opened(path: Path, config: Config) -> Exported:
    """A merged folder or a GGUF file. llama.cpp computes the latter where `llama_cpp` is installed.

    Raises:
        ModelUnsuitableError: what is to open it cannot read it.
    """
    try:
        if path.suffix == ".gguf" and importlib.util.find_spec("llama_cpp"):
            return LlamaCpp(path, config)
        return Transformers(path, config)
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ModelUnsuitableError(
            f"{path.name} cannot be scored again: {first_line(error)}", "Export the merged folder instead."
        ) from error


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel, ids: list[int]) -> Tensor:
    """`[length, vocabulary]` in float32 on the CPU; row t predicts token t + 1."""
    return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float().cpu()


class Transformers(Exported):
    """A merged folder or a GGUF file, computed in `config.dtype`.

    Of a GGUF file transformers dequantizes the weights. So the gate sees what the file holds (weights, vocabulary,
    template, EOS), not what llama.cpp's kernels make of it.
    """

    def __init__(self, path: Path, config: Config) -> None:
        gguf = path.suffix == ".gguf"
        folder, where = (path.parent, {"gguf_file": path.name}) if gguf else (path, {})
        dtype = hardware.torch_dtype(config.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **where)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=dtype, **where)
        self.model = model.to(hardware.device()).eval()
        self.engine, self.bos = "transformers", []
        if not gguf:
            eos = self.model.generation_config.eos_token_id
            self.eos = frozenset(eos if isinstance(eos, list) else [eos])
            return
        from gguf import GGUFReader

        self.engine = "transformers' GGUF reader, not llama.cpp"
        fields = {name.removeprefix("tokenizer."): field for name, field in GGUFReader(path).fields.items()}
        self.tokenizer.chat_template = fields["chat_template"].contents()
        self.eos = frozenset([fields["ggml.eos_token_id"].contents()])
        if "ggml.add_bos_token" in fields and fields["ggml.add_bos_token"].contents():
            self.bos = [fields["ggml.bos_token_id"].contents()]

    def ids(self, messages: Messages, answering: bool = False) -> list[int]:
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=answering, tokenize=True, return_dict=False
        )
        return ids if ids[:1] == self.bos else self.bos + ids  # llama.cpp's rule: never two

    def logits(self, ids: list[int]) -> Tensor:
        return logits_of(self.model, ids)


class LlamaCpp(Exported):
    """A GGUF file, computed by llama.cpp on the CPU: its kernels, its tokenizer, and the template in the file."""

    def __init__(self, path: Path, config: Config) -> None:
        import llama_cpp
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        self.engine = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
        room = 2 * config.max_tokens  # another tokenizer or template may need more than ours
        self.model = llama_cpp.Llama(
            str(path), n_ctx=room, logits_all=True, n_gpu_layers=0, n_threads=torch.get_num_threads(), verbose=False
        )
        vocab = llama_cpp.llama_model_get_vocab(self.model.model)
        self.eos = frozenset(i for i in range(self.model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i))
        bos, eos = self.model.token_bos(), self.model.token_eos()
        text = {i: self.model.detokenize([i], special=True).decode() if i >= 0 else "" for i in (bos, eos)}
        self.bos = text[bos] if llama_cpp.llama_vocab_get_add_bos(vocab) else ""  # what its tokenizer puts before
        template = self.model.metadata["tokenizer.chat_template"]
        self.written = {
            answering: Jinja2ChatFormatter(template, text[eos], text[bos], add_generation_prompt=answering)
            for answering in (True, False)
        }

    def ids(self, messages: Messages, answering: bool = False) -> list[int]:
        text = self.written[answering](messages=messages).prompt
        return self.model.tokenize(text.removeprefix(self.bos).encode(), add_bos=True, special=True)

    def logits(self, ids: list[int]) -> Tensor:
        self.model.reset()
        self.model.eval(ids)
        return torch.from_numpy(self.model.scores[: len(ids)].copy())
