"""Folders that are no checkpoint to train: each is named in one sentence, by the loader and by the doctor."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import tiny_config
from test_families import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from dpo_tutorial.adapter import lora
from dpo_tutorial.cli import doctor
from dpo_tutorial.errors import ConfigError, TutorialError
from dpo_tutorial.loading import models

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')


def gguf(folder):
    (folder / "config.json").unlink()
    (folder / "weights.gguf").write_bytes(b"GGUF")


def quantized(**claim):
    return lambda folder: edit(folder / "config.json", quantization_config=claim)


def shard_missing(folder):
    there = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(there))


def pointer(name):
    return lambda folder: (folder / name).write_text(POINTER)


def beyond(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens("<one more>")
    tokenizer.save_pretrained(folder)


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FOLDERS = {
    "an adapter": (adapter, "is the folder of an adapter, trained on someone/base"),
    "GGUF": (gguf, "is a GGUF file"),
    "nothing": (lambda folder: (folder / "config.json").unlink(), "without config.json"),
    "8 bits": (quantized(quant_method="bitsandbytes", load_in_8bit=True), "by bitsandbytes in 8 bits"),
    "FP4": (quantized(**NF4 | {"bnb_4bit_quant_type": "fp4"}), "by bitsandbytes in 4 bits (FP4)"),
    "NF4 that is not": (quantized(**NF4), "says NF4 by bitsandbytes, but its weights are not"),
    "compressed tensors": (quantized(quant_method="compressed-tensors"), "by compressed-tensors"),
    "GPTQ": (quantized(quant_method="gptq", bits=4), "by gptq"),
    "AWQ": (quantized(quant_method="awq", bits=4), "by awq"),
    "FP8": (quantized(quant_method="fp8"), "by fp8"),
    "a shard missing": (shard_missing, "lacks 1 of its 2 files of weights: model-00002-of-00002.safetensors"),
    "LFS weights": (pointer("model.safetensors"), "model.safetensors of MODEL="),
    "LFS tokenizer": (pointer("tokenizer.json"), "is a Git LFS pointer"),
    "LFS config": (pointer("config.json"), "is a Git LFS pointer"),
    "ids beyond": (beyond, "'<one more>' is beyond"),
    "Mamba": (lambda f: edit(f / "config.json", model_type="mamba"), "is a mamba"),
    "few positions": (lambda f: edit(f / "config.json", max_position_embeddings=64), "more than the 64 positions"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_named_before_weights_are_read_and_by_the_doctor(name, tiny_folder, tmp_path, monkeypatch):
    change, words = FOLDERS[name]
    shutil.copytree(tiny_folder, tmp_path / "model")
    change(tmp_path / "model")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    cfg = tiny_config(tmp_path / "model", tmp_path)
    with pytest.raises(TutorialError) as caught:
        models.load_tokenizer(cfg)
    assert words in caught.value.cause and "hf auth login" not in str(caught.value)
    said = [finding for finding in doctor.examine(cfg, [doctor.model, doctor.template]) if finding.status == "fail"]
    assert any(words in finding.found and finding.fix for finding in said)


def test_a_gguf_file_is_named(cfg, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(TutorialError, match="is a GGUF file"):
        models.load_tokenizer(dataclasses.replace(cfg, model=str(tmp_path / "m.gguf")))


def test_a_special_token_beyond_that_no_template_writes_does_no_harm(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path / "model")
    assert models.load_tokenizer(tiny_config(tmp_path / "model", tmp_path))


@pytest.fixture
def stored_in_nf4(tiny_folder, tmp_path):
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=how, dtype=torch.float32)
    model.save_pretrained(tmp_path / "nf4")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "nf4")
    return tiny_config(tmp_path / "nf4", tmp_path)


def test_a_checkpoint_in_nf4_loads_and_computes_in_the_type_asked_for(stored_in_nf4):
    assert models.load_tokenizer(stored_in_nf4)
    layer = models.load_base(stored_in_nf4).model.layers[0].self_attn.q_proj
    assert layer.weight.quant_type == "nf4" and layer.compute_dtype == torch.float32
    plain = models.load_base(stored_in_nf4, quantize=False).model.layers[0].self_attn.q_proj
    assert type(plain) is torch.nn.Linear and plain.weight.dtype == torch.float32


# --- layers for an adapter ----


@pytest.mark.parametrize(
    ("kind", "targets", "words"),
    [
        ("llama", "lm_head", "lm_head, the LM head"),
        ("mamba2", "out_proj", "out_proj, which in"),
        ("mixtral", "w1", "does not have: w1"),
        ("qwen2_moe", "gate_proj", "gate_proj, which in"),
    ],
)
def test_a_layer_that_cannot_carry_an_adapter_is_refused_and_by_the_doctor(kind, targets, words, tokenizer, tmp_path):
    model = tiny(kind, tokenizer, **{"num_heads": 8} if kind == "mamba2" else {})
    model.save_pretrained(tmp_path)
    cfg = dataclasses.replace(tiny_config(tmp_path, tmp_path), lora_targets=(targets,))
    with pytest.raises(ConfigError) as caught:
        lora.check_lora_targets(model, cfg)
    assert words in caught.value.cause and targets not in caught.value.fix.split("of ")[1].split(",")
    (said,) = doctor.examine(cfg, [doctor.model])
    assert said.status == "fail" and words in said.found


# --- what a model draws ----


def test_nothing_is_drawn_in_training(tokenizer, tmp_path):
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer), attention_dropout=0.5)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = models.load_base(tiny_config(tmp_path, tmp_path)).train()
    ids = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        assert torch.equal(base(ids).logits, base(ids).logits)
    assert base.config.attention_dropout == 0


def test_every_dropout_is_off(tokenizer, tmp_path):
    drops = dict(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    tiny("gpt2", tokenizer, **drops).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = models.load_base(tiny_config(tmp_path, tmp_path))
    assert not [m.p for m in base.modules() if isinstance(m, torch.nn.Dropout) and m.p]
