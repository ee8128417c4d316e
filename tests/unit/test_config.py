"""`resolve()`: precedence, reasons, and errors that list what is known."""

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpo_tutorial import config, knobs
from dpo_tutorial.adapter import lora
from dpo_tutorial.errors import ConfigError, SessionError
from dpo_tutorial.loading import models
from dpo_tutorial.machine import hardware, memory, session
from dpo_tutorial.training import train

ROOT = Path(__file__).parents[2]
HARDWARE = hardware.hardware  # the real one: tests see a machine without a GPU
NO_GPU = {"cuda": False, "cpu_bf16": None, "cores": 2, "memory_gib": 24.0, "cpu": "x"}


def gpu(capability, memory):
    return NO_GPU | {"cuda": True, "capability": capability, "gpu": "card", "gpu_memory_gib": memory}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(hardware, "hardware", lambda: dict(NO_GPU))


def test_a_parameter_beats_the_environment_which_beats_the_hardware(monkeypatch):
    assert config.resolve().profile == "cpu"
    monkeypatch.setenv("DPO_TUTORIAL_PROFILE", "smoke")
    assert config.resolve(profile="").profile == "smoke"
    assert config.resolve(PROFILE="t4").profile == "t4"


def test_every_choice_is_printed_with_its_reason(monkeypatch, capsys):
    monkeypatch.setenv("DPO_TUTORIAL_SEED", "7")
    resolved = config.resolve()
    said = capsys.readouterr().out
    assert resolved.seed == 7
    assert "no CUDA device found" in said and "DPO_TUTORIAL_SEED" in said and "fp32" in said


@pytest.mark.parametrize(
    ("facts", "profile", "dtype"),
    [
        (gpu([7, 5], 15.0), "t4", "fp16"),
        (gpu([8, 9], 22.0), "gpu24", "bf16"),
        (gpu([9, 0], 79.0), "gpu80", "bf16"),
        (NO_GPU, "cpu", "fp32"),
        (NO_GPU | {"cpu_bf16": "AVX512-BF16 and AMX-BF16"}, "cpu", "bf16"),
    ],
)
def test_profile_and_dtype_follow_the_hardware(monkeypatch, facts, profile, dtype):
    monkeypatch.setattr(hardware, "hardware", lambda: facts)
    resolved = config.resolve()
    assert (resolved.profile, resolved.dtype) == (profile, dtype)


@pytest.mark.parametrize(("capability", "told"), [([7, 5], True), ([8, 9], False)])
def test_bfloat16_is_remarked_on_where_a_gpu_emulates_it(monkeypatch, capability, told):
    monkeypatch.setattr(hardware, "hardware", lambda: gpu(capability, 15.0))
    assert any("emulated" in reason for reason in config.resolve(dtype="bf16").reasons) is told


@pytest.mark.parametrize(
    "bad",
    [
        {"beta": 0}, {"beta": "high"}, {"max_train": 0}, {"max_train": 1.5}, {"dtype": "fp8"}, {"max_tokens": 3},
        {"loss_type": "sigmoyd"}, {"ld_alpha": 1.5}, {"label_smoothing": 0.5}, {"strict": "perhaps"},
        {"learning_rate": "nan"}, {"learning_rate": -1}, {"epochs": -1}, {"lora_alpha": -3}, {"lora_dropout": 2},
        {"seed": -5}, {"seed": 2**32}, {"max_new_tokens": 0}, {"max_steps": 0}, {"max_grad_norm": -1}, {"beta": "inf"},
        {"lr_scheduler": "zigzag"}, {"warmup_ratio": -1}, {"save_steps": 0}, {"max_train": "inf"},
        {"lora_targets": "q_proj,"}, {"lora_targets": ()}, {"lora_targets": 5}, {"model": ["a", "b"]},
        {"data": 7}, {"artifacts": 1000.0}, {"model": True}, {"max_train": True}, {"beta": True},
        {"sft_weight": -0.1}, {"sft_weight": "inf"}, {"instructions": 0}, {"keep_16bit": 5},
    ],
)  # fmt: skip
def test_a_value_out_of_range_names_the_parameter_and_the_range(bad):
    with pytest.raises(ConfigError, match=next(iter(bad)).upper()):
        config.resolve(**bad)


def test_strings_from_papermill_become_the_right_types():
    resolved = config.resolve(beta="0.3", max_train="12", gradient_checkpointing="true", lora_targets="q_proj,v_proj")
    assert resolved.beta == 0.3 and resolved.max_train == 12 and resolved.gradient_checkpointing is True
    assert resolved.lora_targets == ("q_proj", "v_proj")
    assert config.resolve(lora_targets=["q_proj"]).lora_targets == ("q_proj",)
    keep = r"model\.layers\.(0|1),down_proj"
    assert config.resolve(keep_16bit=keep).keep_16bit == (r"model\.layers\.(0|1)", "down_proj")
    assert config.resolve(keep_16bit=()).keep_16bit == ()


@pytest.mark.parametrize(("given", "strict"), [(None, False), ("", False), ("true", True), (True, True), ("0", False)])
def test_strict_is_a_switch_that_is_off_unless_turned_on(given, strict):
    assert config.resolve(strict=given).strict is strict


def test_a_revision_is_read_after_the_at_sign_and_never_carried_to_another_model():
    resolved = config.resolve(profile="t4", model="someone/model@abc123", data="someone/pairs")
    assert (resolved.model, resolved.model_revision) == ("someone/model", "abc123")
    assert (resolved.data, resolved.data_revision) == ("someone/pairs", None)


@pytest.mark.parametrize("keep", ["k_proj,", "a,,b"])
def test_an_empty_name_among_the_kept_layers_would_keep_all_and_is_refused(keep):
    with pytest.raises(ConfigError, match="KEEP_16BIT"):
        config.resolve(keep_16bit=keep)


def test_fp16_without_cuda_is_refused_before_a_model_is_loaded():
    with pytest.raises(ConfigError, match="fp16 needs a CUDA GPU"):
        config.resolve(profile="cpu", dtype="fp16")


def test_an_id_that_a_profile_pins_keeps_its_commit_in_every_profile():
    name, commit = knobs.ULTRAFEEDBACK
    assert config.resolve(profile="cpu", data=name).data_revision == commit
    assert config.resolve(profile="t4", data=name).data_revision == commit
    assert config.resolve(profile="cpu", data=f"{name}@main").data_revision == "main"
    assert config.resolve(profile="cpu", data=name, data_revision="abc123").data_revision == "abc123"


def test_layers_chosen_for_the_embedded_model_are_not_kept_of_another():
    kept = config.resolve(profile="cpu").keep_16bit
    assert kept and config.resolve(profile="cpu", model="embedded").keep_16bit == kept
    other = config.resolve(profile="cpu", model="someone/model")
    assert other.keep_16bit == () and any("embedded model" in reason for reason in other.reasons)
    assert config.resolve(profile="cpu", model="someone/model", keep_16bit="v_proj").keep_16bit == ("v_proj",)
    recorded = {"model": "someone/model", "keep_16bit": ["down_proj"]}
    assert config.resolve(recorded, profile="cpu", model="moved/model").keep_16bit == ("down_proj",)


def test_a_path_that_exists_is_taken_whole_though_there_is_an_at_sign_in_it(tmp_path):
    path = tmp_path / "me@work" / "rows@home.jsonl"
    path.parent.mkdir()
    path.touch()
    resolved = config.resolve(profile="cpu", model=str(path.parent), data=str(path))
    assert (resolved.model, resolved.model_revision) == (str(path.parent), None)
    assert (resolved.data, resolved.data_revision) == (str(path), None)


def test_a_training_resumes_whatever_these_knobs_say_and_no_others():
    every = {field.name for field in dataclasses.fields(knobs.Config)}
    assert every - set(knobs.Config().training_identity()) == {
        "model", "model_revision", "data", "data_revision",  # what they hold counts, not what they are called
        "gradient_checkpointing", "compare_prompts", "instructions", "max_new_tokens", "adapter", "train_if_missing",
        "artifacts", "save_steps", "fresh", "strict", "reasons", "report_to", "watch_prompts",
    }  # fmt: skip


@pytest.mark.parametrize("profile", knobs.PROFILES)
@pytest.mark.parametrize("dtype", hardware.DTYPES)
def test_every_profile_builds_the_real_library_configs(profile, dtype, tmp_path):
    resolved = dataclasses.replace(config.resolve(profile=profile), dtype=dtype)
    arguments = train.dpo_config(resolved, tmp_path)
    assert arguments.beta == resolved.beta and arguments.loss_type[0] == "sigmoid"
    assert (arguments.bf16, arguments.fp16) == (dtype == "bf16", dtype == "fp16")
    assert lora.lora_config(resolved).target_modules == "all-linear"
    assert models.quantization_config(resolved).bnb_4bit_quant_type == "nf4"


@pytest.mark.parametrize("asked", [{}, {"sft_weight": 0.5}], ids=["of the profile", "asked for"])
def test_sft_has_no_second_sft_term(asked, tmp_path, capsys):
    resolved = config.resolve(profile="cpu", loss_type="sft", **asked)
    assert train.dpo_config(resolved, tmp_path).loss_type == ["sft"]
    assert "sft_weight = 0: the loss is SFT already" in capsys.readouterr().out


def test_seeds_repeat_python_numpy_and_torch():
    import random

    import numpy
    import torch

    def draw():
        hardware.seed_everything(3)
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def pretend(monkeypatch, held, installed):
    """A session that holds pyarrow `held` while pip has put `installed` on the disk."""
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(__version__=held))
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed if name == "pyarrow" else real(name))


def test_a_session_that_holds_what_pip_replaced_is_stopped(monkeypatch):
    pretend(monkeypatch, "18.1.0", "26.0.1")
    with pytest.raises(SessionError, match=r"pyarrow 26\.0\.1 \(this session still holds 18\.1\.0\)\.\n.*Restart"):
        session.check_session()


@pytest.mark.parametrize("start", [["-m", "dpo_tutorial", "doctor"], ["-c", "import dpo_tutorial"]])
def test_a_file_that_hides_a_package_is_named_before_it_is_imported(start, tmp_path):
    (tmp_path / "datasets.py").write_text("")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, *start], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and f"{tmp_path / 'datasets.py'} would be imported in place of" in done.stderr
    assert ("Traceback" in done.stderr) == (start[0] == "-c")


def test_a_folder_of_data_called_datasets_hides_no_package(tmp_path, monkeypatch):
    (tmp_path / "datasets").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    session.check_session()


def test_the_command_can_be_started_by_the_path_of_its_folder(tmp_path):
    command = [sys.executable, str(ROOT / "src" / "dpo_tutorial"), "train", "-p", "BTA", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Unknown parameter BTA" in done.stderr and "Traceback" not in done.stderr


def test_it_is_stopped_where_it_imports_the_package_before_anything_else_can_fail():
    code = "import sys, types; sys.modules['pyarrow'] = types.SimpleNamespace(__version__='0.1'); import dpo_tutorial"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "this session still holds 0.1" in done.stderr


@pytest.mark.parametrize(("held", "there"), [("2.11.0+cu128", "2.11.0"), ("1.0", "1.0.0"), ("dev", "1.0"), (None, "1")])
def test_a_session_whose_packages_are_those_on_the_disk_goes_on(monkeypatch, held, there):
    pretend(monkeypatch, held, there)
    session.check_session()


@pytest.mark.parametrize(
    ("flags", "dtype", "reason"),
    [
        ({"avx512_bf16": True, "amx_bf16": True}, "bf16", "AVX512-BF16 and AMX-BF16"),
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16", "no AMX: if it is slow, try DTYPE=fp32"),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "fp32", "neither"),
        ({"architecture": "arm64", "neon": True, "bf16": True}, "fp32", "neither"),  # Graviton, Apple
    ],
)
def test_a_cpu_computes_in_bfloat16_if_it_has_instructions_for_it(monkeypatch, flags, dtype, reason):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    chosen, why = hardware.pick_dtype({"cuda": False, "cpu_bf16": hardware.cpu_bf16()})
    assert chosen == dtype and reason in why


def test_the_compute_type_is_not_timed_so_load_on_the_machine_cannot_change_it(monkeypatch):
    for clock in ("perf_counter", "perf_counter_ns", "monotonic", "process_time", "time"):
        monkeypatch.setattr(time, clock, lambda: pytest.fail("the clock was read"))
    assert hardware.pick_dtype(HARDWARE())[0] in hardware.DTYPES


@pytest.mark.parametrize(
    ("device", "words"),
    [("cuda", "2.0 GiB allocated by torch on the GPU, since the"), ("cpu", "2.0 GiB of main memory")],
)
def test_a_peak_says_of_what_it_is_one(device, words, monkeypatch):
    monkeypatch.setattr(hardware, "device", lambda: device)
    monkeypatch.setattr(memory, "peak_memory_gib", lambda: 2.0)
    assert memory.peak_memory_in_words().startswith(words)


def test_the_peak_of_child_processes_sees_a_large_one():
    before = memory.children_peak_memory_gib()
    size = int((before + 0.2) * 2**30)
    subprocess.run([sys.executable, "-c", f"b'x' * {size}"], check=True)
    assert memory.children_peak_memory_gib() >= before + 0.19
