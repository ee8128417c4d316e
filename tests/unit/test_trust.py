"""Trust: nothing runs code from a download, no shell is built from a value, no token and no private name is kept."""

import dataclasses
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import nbformat
import pytest
import torch
import yaml
from conftest import TEXTS, pair
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from test_notebooks import each, outputs
from test_repository import planned

from dpo_tutorial import knobs
from dpo_tutorial.adapter import lora
from dpo_tutorial.errors import ArtifactError, DataError, ModelCorruptError, ModelUnsuitableError
from dpo_tutorial.loading import models
from dpo_tutorial.pairs import sources

ROOT = Path(__file__).parents[2]


# --- nothing that runs code from a download ----


def test_datasets_has_no_switch_that_would_run_a_script():
    assert "trust_remote_code" not in datasets.load_dataset.__code__.co_varnames, "pass False to it in pairs/sources.py"


class Trap:
    """Unpickled, it makes a file: whoever reads it as a pickle has run its code."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.fixture
def checkpoint(cfg, tiny_folder, tmp_path):
    """(a config, its own copy of the tiny checkpoint, a path that a trap would make)."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return dataclasses.replace(cfg, model=str(folder)), folder, tmp_path / "sprung"


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("honest", [True, False])
def test_weights_in_a_pickle_are_refused_and_not_read(checkpoint, honest):
    cfg, folder, sprung = checkpoint
    weights = load_file(folder / "model.safetensors") if honest else Trap(sprung)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelUnsuitableError, match="no weights in safetensors format") as error:
        models.load_base(cfg)
    assert "pickle" in error.value.fix and not sprung.exists()


def test_a_config_that_points_at_a_pickle_is_refused(checkpoint):
    cfg, folder, sprung = checkpoint
    torch.save(Trap(sprung), folder / "pytorch_model.bin")
    edit(folder / "config.json", transformers_weights="pytorch_model.bin")
    with pytest.raises(ModelUnsuitableError, match="safetensors"):
        models.load_base(cfg)
    assert not sprung.exists()


@pytest.mark.parametrize("load", [models.load_base, models.load_tokenizer])
def test_code_that_comes_with_a_checkpoint_is_refused_and_not_run(checkpoint, load):
    cfg, folder, sprung = checkpoint
    (folder / "theirs.py").write_text(f"open({str(sprung)!r}, 'w')")
    names = {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M", "AutoTokenizer": ["theirs.T", None]}
    edit(folder / "config.json", model_type="theirs", auto_map=names)
    edit(folder / "tokenizer_config.json", tokenizer_class="Theirs", auto_map=names)
    with pytest.raises(ModelUnsuitableError, match="custom code") as error:
        load(cfg)
    assert "never run" in error.value.fix and "trust_remote_code" not in str(error.value)
    assert not sprung.exists()


def test_missing_weights_are_refused_not_filled_with_random_numbers(checkpoint):
    cfg, folder, _ = checkpoint
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelCorruptError, match="layers.0.self_attn.q_proj.weight"):
        models.load_base(cfg)


def test_an_adapter_in_a_pickle_is_refused(cfg, tmp_path):
    get_peft_model(models.load_base(cfg), lora.lora_config(cfg)).save_pretrained(tmp_path)
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="no adapter"):
        lora.load_policy(cfg, tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_script_in_a_dataset_folder_is_not_run(cfg, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "pairs.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    with pytest.raises(DataError, match="holds no file of rows"):
        sources.load_preferences(dataclasses.replace(cfg, data=str(folder)))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", [n for n, values in knobs.PROFILES.items() if "model" in values])
def test_a_hub_profile_names_full_commits_not_branches(name):
    for what in ("model_revision", "data_revision"):
        assert re.fullmatch("[0-9a-f]{40}", knobs.PROFILES[name][what])


# --- no shell is built from a value ----


@pytest.mark.parametrize("value", ["my pairs.jsonl", "o'clock.jsonl", "'; id; '", "$(id)", "$(shell id)", "`id`"])
def test_make_hands_any_value_on_as_one_word(value):
    shown = planned("run", f"DATA={value}")
    (line,) = [line for line in shown.splitlines() if "dpo_tutorial run" in line]
    assert shlex.split(line.partition("dpo_tutorial run")[2]) == ["-p", "DATA", value]


def test_make_badges_hands_any_name_on_as_one_word():
    (line,) = [line for line in planned("badges", "REPO=me/dpo; id").splitlines() if "scripts/badges.py" in line]
    assert shlex.split(line)[-1] == "me/dpo; id"


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.name)
def test_a_workflow_hands_inputs_to_the_shell_through_the_environment(path):
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
    assert [step["run"] for job in jobs for step in job["steps"] if "${{" in step.get("run", "")] == []


# --- the token ----

TOKENS = {
    "HF_TOKEN": "hf_sentinelOfTheEnvironment",
    "HUGGING_FACE_HUB_TOKEN": "hf_sentinelOfTheOldName",
}
STORED = "hf_sentinelInTheTokenFile"
SOMEONE = "sentineluser"

PIPELINE = """
import os, sys
from pathlib import Path
import huggingface_hub
from dpo_tutorial.cli import main as cli, run

sys.path.insert(0, "scripts")
from refresh_notebooks import clean_notebook

assert huggingface_hub.get_token() == os.environ["HF_TOKEN"], "the token is at hand, so it could leak"
folder, notebook, *given = map(str, sys.argv[1:])
given = dict(zip(given[::2], given[1::2]))
flags = [word for pair in given.items() for word in ("-p", *pair)]
assert cli.main(["train", *flags]) == 0
adapter = f"{folder}/artifacts/smoke/adapter"
assert cli.main(["compare", "--adapter", adapter, "--out", f"{folder}/report", "-p", "MAX_NEW_TOKENS", "4"]) == 0
run.run_all(given, [Path(notebook)])
clean_notebook(Path(f"{folder}/artifacts/smoke/executed") / Path(notebook).name, Path(folder) / "clean.ipynb")
assert cli.main(["train", "-p", "MODEL", "nobody/nothing", "-p", "ARTIFACTS", given["ARTIFACTS"]]) == 1
"""


@pytest.fixture(scope="module")
def pipeline(tiny_folder, tmp_path_factory):
    """What training, report and a notebook leave behind where tokens are at hand: (folder, what was printed)."""
    folder, home = tmp_path_factory.mktemp("pipeline"), tmp_path_factory.mktemp("home") / SOMEONE
    (home / "hub").mkdir(parents=True)
    (home / "hub" / "token").write_text(STORED)
    rows = [pair(f"{t[0]} {i}", *t[1:]) for i in range(6) for t in TEXTS]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    given = {
        "PROFILE": "smoke", "MODEL": tiny_folder, "DATA": folder / "rows.jsonl", "ARTIFACTS": folder / "artifacts",
        "MAX_TOKENS": 128, "LORA_R": 4,
    }  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))} | TOKENS
    environment |= {"HOME": str(home), "HF_HOME": str(home / "hub"), "HF_HUB_OFFLINE": "1", "USER": SOMEONE}
    environment |= {"LOGNAME": SOMEONE, "PYTHONPATH": str(ROOT / "src")}
    words = [str(word) for item in given.items() for word in item]
    command = [sys.executable, "-c", PIPELINE, str(folder), str(ROOT / "notebooks" / "01_setup.ipynb"), *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout + done.stderr


def holding(folder, text):
    return [p.name for p in folder.rglob("*") if p.is_file() and text.encode() in p.read_bytes()]


@pytest.mark.end_to_end
def test_no_token_is_in_any_file_that_the_pipeline_leaves(pipeline):
    folder, _ = pipeline
    made = {p.name for p in folder.rglob("*") if p.is_file()}
    assert {
        "training.json", "adapter_model.safetensors", "README.md", "progress.jsonl", "data_report.json",
        "comparison.json", "records.json", "report.html", "manifest.json", "summary.json", "01_setup.ipynb",
    } <= made  # fmt: skip
    assert "training.json" in holding(folder, "tiny-llama"), "the search finds what is there"
    for token in (*TOKENS.values(), STORED):
        assert holding(folder, token) == []


@pytest.mark.end_to_end
def test_no_token_is_printed(pipeline):
    _, said = pipeline
    assert "adapter saved in" in said and "wrote" in said and "nobody/nothing could not be loaded" in said
    for token in (*TOKENS.values(), STORED):
        assert token not in said


# --- what a notebook shows ----

FOLDERS = [
    "home", "root", "Users", "tmp", "work", "content", "mnt", "media", "opt", "var", "usr", "private", "srv",
    "workspace",
]  # fmt: skip
PRIVATE = {
    "folder": rf"(?<![\w.~</-])/(?:{'|'.join(FOLDERS)})/\S+",
    "Windows folder": r"\b[A-Za-z]:\\{1,2}\w",
    "file address": r"file://",
    "hub token": r"\bhf_[A-Za-z0-9]{8,}",
    "key": r"\b(?:sk-|gh[pousr]_|github_pat_|AKIA)[A-Za-z0-9_-]{12,}|\bBearer\s+\w",
    "login": r"\w://[^\s/:@]+:[^\s/@]+@|\b[\w.-]+@[\w.-]+:[~/]",
}


def private(text):
    return [(what, m) for what, pattern in PRIVATE.items() for m in re.findall(pattern, text)]


def shown(notebook):
    """Everything in outputs and metadata but the pixels: text, HTML, tracebacks."""
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    parts = [notebook.metadata, *(c.metadata for c in notebook.cells)]
    for output in (o for c in cells for o in c.outputs):
        parts += [output.get("text"), output.get("metadata"), output.get("evalue"), *output.get("traceback", [])]
        parts += [value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    return "\n".join(str(p) for p in parts if p)


@each
def test_a_notebook_shows_no_folder_no_token_and_no_login(path):
    assert outputs(path), "a committed notebook has outputs"
    assert private(shown(nbformat.read(path, as_version=4))) == []


@pytest.mark.end_to_end
def test_a_notebook_executed_now_and_cleaned_shows_no_private_thing(pipeline):
    folder, _ = pipeline
    notebook = nbformat.read(folder / "clean.ipynb", as_version=4)
    text = shown(notebook)
    assert "bitsandbytes" in text, "it has outputs"
    ours = text.replace(str(folder), "").replace(str(ROOT), "ROOT")
    assert SOMEONE not in text and "ROOT" not in ours
    assert [x for x in private(text) if "pytest" not in x[1]] == [], "the test's own MODEL and DATA are shown"
    for token in (*TOKENS.values(), STORED):
        assert token not in text


# --- the pins ----


def test_ci_asks_whether_a_pin_has_a_known_vulnerability():
    """Strict, because an audit that could look up nothing otherwise says that it found nothing."""
    job = yaml.safe_load((ROOT / ".github/workflows/cpu.yml").read_text(encoding="utf-8"))["jobs"]["test"]
    command = "pip-audit --strict --no-deps --disable-pip -r requirements.txt -r docs/requirements.txt"
    assert [step for step in job["steps"] if command in step.get("run", "").replace('"', "")]
    assert command in (ROOT / "SECURITY.md").read_text(encoding="utf-8")
