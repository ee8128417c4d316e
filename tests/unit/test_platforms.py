"""macOS and Windows, faked on Linux: what differs there, and why. Nothing here was run on either."""

import ctypes
import dataclasses
import os
import resource
import subprocess
import sys
from pathlib import PureWindowsPath
from types import SimpleNamespace

import accelerate.utils.imports
import psutil
import pytest
import torch
import transformers.utils.import_utils as hf
from accelerate.state import AcceleratorState, PartialState
from conftest import TEXTS, pair
from datasets import Dataset
from safetensors.torch import load_file

from dpo_tutorial import run_folder
from dpo_tutorial.adapter import lora
from dpo_tutorial.cli import run
from dpo_tutorial.errors import ModelFetchError
from dpo_tutorial.loading import models
from dpo_tutorial.machine import hardware, memory, paths
from dpo_tutorial.pairs import store
from dpo_tutorial.training import save, train

GIB = 2**30


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("system", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_the_kernels_peak_is_in_kib_on_linux_and_in_bytes_on_macos(monkeypatch, system, unit):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda whose: SimpleNamespace(ru_maxrss=3 * GIB // unit))
    assert memory.peak_memory_gib() == memory.children_peak_memory_gib() == 3.0


def windows(monkeypatch):
    """No module `resource`; psutil knows the peak of a process that lives, and nothing of one that has ended."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=GIB, peak_wset=3 * GIB))


def test_a_finished_training_is_saved_on_windows(cfg, pairs, tokenizer, tmp_path, monkeypatch):
    """The record beside the adapter has the peak of memory, and nothing was saved where it could not be asked."""
    workplace = run_folder.Run(cfg)
    trainer = train.build_trainer(cfg, models.load_base(cfg), tokenizer, pairs, None, tmp_path / "trainer")
    windows(monkeypatch)
    save.save_adapter(cfg, workplace, trainer, tokenizer, 1.0)
    assert save.read_training_record(workplace.adapter)["peak_memory_gib"] == 3.0


def test_a_run_on_windows_ends_with_its_summary_and_without_the_line_about_memory(cfg, monkeypatch, capsys):
    windows(monkeypatch)
    summary = run._summary(run_folder.Run(cfg), {"05_train_dpo": 1.0})
    said = capsys.readouterr().out
    assert summary["peak_memory_gib"] is None and "minutes" in said and "memory " not in said


@pytest.mark.parametrize("missing", ["libc.so.6", "mallopt"])
def test_another_c_library_than_glibc_is_left_alone(monkeypatch, missing):
    """macOS, Windows and musl have no libc.so.6; what bears that name elsewhere need not know these calls."""

    def load(name):
        if missing == "libc.so.6":
            raise OSError(f"{name}: not found")
        return object()

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert memory.tune_allocator() is False
    memory.release_free_memory()


# --- paths --------------------------------------------------------------------------------------------------------


@pytest.fixture
def windows_folders(monkeypatch):
    """Project, cache and home as Windows has them."""
    home = PureWindowsPath(r"C:\Users\Jörg Müller")
    monkeypatch.setattr(paths, "project_root", lambda: home / "dpo-tutorial")
    monkeypatch.setattr(paths, "cache_dir", lambda: home / "AppData" / "Local" / "dpo-tutorial" / "Cache")
    monkeypatch.setattr(paths, "Path", SimpleNamespace(home=lambda: home))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (r"saved in C:\Users\Jörg Müller\dpo-tutorial\artifacts\cpu", r"saved in .\artifacts\cpu"),
        (r"No such file: 'C:\\Users\\Jörg Müller\\dpo-tutorial\\a.jsonl'", r"No such file: '.\\a.jsonl'"),  # a repr
        ("file:///C:/Users/Jörg Müller/Downloads", "file:///~/Downloads"),
        (r"c:\users\jörg müller\x", r"~\x"),
        (r"C:\Users\Jörg Müller\AppData\Local\dpo-tutorial\Cache", "<cache>"),
        (r"C:\Users\Jörg Müller-2\x and D:\Users", r"C:\Users\Jörg Müller-2\x and D:\Users"),
    ],
)
def test_paths_of_windows_are_taken_out_of_what_is_shown(windows_folders, text, shown):
    assert paths.without_paths(text) == shown


@pytest.mark.parametrize("where", [r"C:\models\llama", r"C:models", r"models\llama", r".\llama", r"\\server\models"])
def test_a_windows_folder_that_is_missing_is_not_looked_for_on_the_hub(cfg, where):
    with pytest.raises(ModelFetchError, match="does not exist"):
        models.load_tokenizer(dataclasses.replace(cfg, model=where))


def test_a_run_in_a_folder_with_spaces_and_letters_of_all_kinds(cfg, tiny_folder, tmp_path, monkeypatch):
    """Prepared, trained two steps, saved, and loaded again: model, data and results in such a folder."""
    place = tmp_path / "Größe – tést dir" / "日本 [1]"
    place.mkdir(parents=True)
    model, rows = place / "tiny llama", place / "pärs.jsonl"
    model.symlink_to(tiny_folder, target_is_directory=True)
    many = [pair(f"{prompt} ({i})", chosen, rejected) for i in range(5) for prompt, chosen, rejected in TEXTS]
    Dataset.from_list(many).to_json(rows, force_ascii=False)
    monkeypatch.chdir(place)
    cfg = dataclasses.replace(cfg, model=str(model), data=str(rows), artifacts="Ergebnisse – é")
    workplace, tokenizer = run_folder.Run(cfg), models.load_tokenizer(cfg)
    splits = store.ensure_data(workplace, tokenizer).splits
    trainer = train.train(cfg, workplace, models.load_base(cfg), tokenizer, splits["train"], splits["val"])
    assert trainer.state.global_step == 2
    policy = lora.load_policy(cfg, workplace.adapter)
    saved = load_file(workplace.adapter / "adapter_model.safetensors")
    name = next(iter(saved))
    assert torch.equal(policy.state_dict()[name.replace(".weight", ".default.weight")], saved[name])
    assert store.ensure_data(workplace, tokenizer).splits["train"].num_rows == splits["train"].num_rows  # read back


def test_a_redirected_output_on_windows_cannot_stop_a_command():
    """There a pipe or a file is written in an old code page; the arrow of the verdict is not in it."""
    command = "from dpo_tutorial.errors import exit_code; raise SystemExit(exit_code(print, 'opens well: 62% → 71%'))"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "cp1252"}
    )
    assert (done.returncode, done.stdout) == (0, "opens well: 62% ? 71%\n"), done.stderr


# --- one device ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["mps", "xpu"])
def other_accelerator(request):
    """A torch that has found Apple's or Intel's GPU. This one was built without: whatever is sent there fails."""
    asked = (hf.is_torch_mps_available, hf.is_torch_xpu_available, accelerate.utils.imports.is_xpu_available)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.param == "mps":
            monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
            monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
            monkeypatch.setattr(torch.mps, "empty_cache", lambda: None)
        else:
            monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
            monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
            monkeypatch.setattr(torch.xpu, "current_device", lambda: 0)
            monkeypatch.setattr(torch.xpu, "empty_cache", lambda: None)
        monkeypatch.setattr(PartialState, "_shared_state", {})  # as in a new process
        monkeypatch.setattr(AcceleratorState, "_shared_state", {})
        for function in asked:
            function.cache_clear()
        yield request.param
    for function in asked:  # what they found holds for this test only
        function.cache_clear()


def test_an_accelerator_that_is_not_cuda_is_left_alone(cfg, pairs, tokenizer, other_accelerator):
    """Loaded, trained and loaded again on one device; libraries that chose one themselves would choose another."""
    assert hardware.processes().device.type == "cpu"
    workplace = run_folder.Run(cfg)
    trainer = train.train(cfg, workplace, models.load_base(cfg), tokenizer, pairs, pairs.select(range(2)))
    policy = lora.load_policy(cfg, workplace.adapter)
    where = {p.device.type for model in (trainer.model, policy) for p in model.parameters()}
    assert where == {trainer.args.device.type} == {"cpu"}
