"""What computes an export again: plain transformers, or llama.cpp itself where it can be imported."""

import importlib.util
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..errors import ModelUnsuitableError, first_line
from ..knobs import Config
from ..loading import models
from ..machine import hardware


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel, ids: list[int]) -> Tensor:
    """`[length, vocabulary]` in float32 on the CPU; row t predicts token t + 1."""
    return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float().cpu()


class Transformers:
    """A merged folder, or a GGUF file: its weights dequantized, so that llama.cpp's own arithmetic is not seen."""

    def __init__(self, path: Path, config: Config) -> None:
        gguf = path.suffix == ".gguf"
        folder: Path = path.parent if gguf else path
        where: dict = {"trust_remote_code": False} | ({"gguf_file": path.name} if gguf else {})
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **where)
        where |= {"dtype": hardware.torch_dtype(config.dtype), "device_map": {"": models.placement()}}
        self.model = AutoModelForCausalLM.from_pretrained(folder, **where).eval()
        self.engine, self.bos, eos = "transformers", [], self.model.generation_config.eos_token_id
        if gguf:
            from gguf import GGUFReader

            self.engine = "transformers' GGUF reader, not llama.cpp"
            fields = {name.removeprefix("tokenizer."): field for name, field in GGUFReader(path).fields.items()}
            self.tokenizer.chat_template = fields["chat_template"].contents()
            eos = fields["ggml.eos_token_id"].contents()
            if "ggml.add_bos_token" in fields and fields["ggml.add_bos_token"].contents():
                self.bos = [fields["ggml.bos_token_id"].contents()]
        self.eos = frozenset(eos if isinstance(eos, list) else [eos])
        self.turn_end = eos if gguf else self.tokenizer.eos_token_id

    def ids(self, messages: list[dict], answering: bool = False) -> list[int]:
        """Token ids of a conversation by the export's own template; `answering` opens the assistant's next turn."""
        how = dict(add_generation_prompt=answering, tokenize=True, return_dict=False)
        ids = self.tokenizer.apply_chat_template(messages, **how)
        return ids if ids[:1] == self.bos else self.bos + ids  # llama.cpp's rule: never two

    def logits(self, ids: list[int]) -> Tensor:
        return logits_of(self.model, ids)


class LlamaCpp:
    """A GGUF file, computed by llama.cpp on the CPU: its kernels, its tokenizer, and the template in the file."""

    def __init__(self, path: Path, config: Config) -> None:
        import llama_cpp
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        self.engine = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
        how = dict(logits_all=True, n_gpu_layers=0, n_threads=torch.get_num_threads(), verbose=False)
        self.model = llama_cpp.Llama(str(path), n_ctx=2 * config.max_tokens, **how)  # a wrong template may write more
        vocab = llama_cpp.llama_model_get_vocab(self.model.model)
        self.eos = frozenset(i for i in range(self.model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i))
        bos, eos = self.model.token_bos(), self.model.token_eos()
        self.turn_end = eos
        text = {i: self.model.detokenize([i], special=True).decode() if i >= 0 else "" for i in (bos, eos)}
        self.bos = text[bos] if llama_cpp.llama_vocab_get_add_bos(vocab) else ""  # what its tokenizer puts before
        words = self.model.metadata["tokenizer.chat_template"], text[eos], text[bos]
        self.opened, self.closed = (Jinja2ChatFormatter(*words, way) for way in (True, False))

    def ids(self, messages: list[dict], answering: bool = False) -> list[int]:
        text = (self.opened if answering else self.closed)(messages=messages).prompt
        return self.model.tokenize(text.removeprefix(self.bos).encode(), add_bos=True, special=True)

    def logits(self, ids: list[int]) -> Tensor:
        self.model.reset()
        self.model.eval(ids)
        return torch.from_numpy(self.model.scores[: len(ids)].copy())


#: An export, opened; its answers end at the tokens `eos`, and `turn_end` is the one that its tokenizer names.
Exported = Transformers | LlamaCpp


def opened(path: Path, config: Config) -> Exported:
    """A merged folder or a GGUF file. llama.cpp computes the latter where `llama_cpp` is installed.

    Raises:
        ModelUnsuitableError: what is to open it cannot read it.
        torch.OutOfMemoryError: it does not fit on the GPU.
    """
    try:
        by_llama_cpp = path.suffix == ".gguf" and importlib.util.find_spec("llama_cpp")
        return LlamaCpp(path, config) if by_llama_cpp else Transformers(path, config)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        fix = "Export the merged folder instead." if path.suffix == ".gguf" else "Export it again."
        raise ModelUnsuitableError(f"{path.name} cannot be opened: {first_line(error)}", fix) from error
