"""A knob means the same wherever it is set: make, papermill, a command line, the environment, a notebook's cell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import TEXTS, pair
from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

from dpo_tutorial import config, run_folder
from dpo_tutorial.cli import doctor, run
from dpo_tutorial.cli import main as cli
from dpo_tutorial.errors import ConfigError

ROOT = Path(__file__).parents[2]
NOTEBOOKS = run.notebooks(ROOT / "notebooks")
TWO = {"BETA": "0.3", "LORA_TARGETS": "c_attn, c_proj"}


class Seen(Exception):
    """Raised where a command would begin its work, with the config that it begins with."""


@pytest.fixture
def seen(monkeypatch):
    """What a command made of its words, without doing its work: a function of the command and its words."""

    def stop(config, *rest):
        raise Seen(config)

    monkeypatch.setattr(run_folder, "Run", stop)
    monkeypatch.setattr(doctor, "examine", stop)

    def config_of(word, words):
        with pytest.raises(Seen) as caught:
            cli.main([word, *words])
        return caught.value.args[0]

    return config_of


def words(given):
    return [word for name, value in given.items() for word in ("-p", name, value)]


each_command = pytest.mark.parametrize("word", ["run", "train", "doctor"])
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def assert_two(made):
    assert made.beta == 0.3 and made.lora_targets == ("c_attn", "c_proj")


def assert_refused(said):
    assert "Unknown parameter BTA." in said and "Known parameters: PROFILE, MODEL" in said
    assert all(name in said for name in ("BETA", "LORA_TARGETS", "ADAPTER"))


# --- the command line ----


@each_command
def test_a_command_takes_every_knob(word, seen):
    assert_two(seen(word, words(TWO)))


@each_command
@pytest.mark.parametrize("name", ["BTA", "beta"])
def test_a_command_refuses_an_unknown_name(word, name, seen, capsys):
    assert cli.main([word, "-p", name, "0.3"]) == 1
    assert_refused(capsys.readouterr().err.replace("parameter beta.", "parameter BTA."))


@each_command
@pytest.mark.parametrize(("name", "value"), [("ARTIFACTS", "007"), ("ARTIFACTS", "1e3"), ("DATA", "007")])
def test_a_text_stays_the_text_it_was(word, name, value, seen):
    made = seen(word, ["-p", name, value])
    assert getattr(made, name.lower()) == value


# --- make ----


@pytest.fixture
def made_by_make(tmp_path, seen):
    """The config that `make run NAME=value …` ends in; its Python only writes down what make hands it."""
    python, noted = tmp_path / "bin" / "python", tmp_path / "words.json"
    python.parent.mkdir()
    note = f"import json, sys; open({str(noted)!r}, 'w').write(json.dumps(sys.argv[1:]))"
    python.write_text(f"#!{sys.executable}\n{note}\n")
    python.chmod(0o755)
    (tmp_path / ".installed").touch()

    def handed(*typed):
        command = ["make", "--silent", "run", f"VENV={tmp_path}", *typed]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        module, word, *rest = json.loads(noted.read_text())[1:]
        assert (module, word) == ("dpo_tutorial", "run")
        return rest

    return handed


def test_make_hands_every_knob_on(made_by_make, seen):
    assert_two(seen("run", made_by_make(*(f"{name}={value}" for name, value in TWO.items()))))


def test_make_leaves_the_check_of_names_to_the_command(made_by_make, seen, capsys):
    assert cli.main(["run", *made_by_make("BTA=0.3")]) == 1
    assert_refused(capsys.readouterr().err)


def test_make_keeps_its_own_variables_and_those_of_the_shell_to_itself(made_by_make, monkeypatch):
    monkeypatch.setenv("BETA", "0.3")
    assert made_by_make("PYTHON=python3", "SHELL=/bin/sh") == []


@pytest.mark.parametrize(
    "value", ["007", "my pairs.jsonl", "o'clock; touch here", "$(shell touch here)", "`touch here`"]
)
def test_make_hands_any_value_of_any_knob_on_as_it_is(value, made_by_make):
    assert made_by_make(f"LR_SCHEDULER={value}") == ["-p", "LR_SCHEDULER", value]
    assert not (ROOT / "here").exists()


# --- the environment ----


def test_the_environment_takes_every_knob(monkeypatch):
    for name, value in TWO.items():
        monkeypatch.setenv(f"DPO_TUTORIAL_{name}", value)
    assert_two(config.resolve())
    assert config.resolve(beta=0.2).beta == 0.2, "what is given wins"


def test_the_environment_refuses_an_unknown_name_and_knows_its_other_variables(monkeypatch):
    monkeypatch.setenv("DPO_TUTORIAL_HEADLESS", "1")
    assert config.resolve()
    monkeypatch.setenv("DPO_TUTORIAL_BTA", "a secret")
    with pytest.raises(ConfigError) as caught:
        config.resolve()
    assert_refused(str(caught.value).replace("DPO_TUTORIAL_BTA", "BTA"))
    assert "DPO_TUTORIAL_BTA" in caught.value.cause
    assert "DPO_TUTORIAL_CACHE" in caught.value.fix and "a secret" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("ARTIFACTS", "007"), ("DATA", "1e3")])
def test_a_text_in_the_environment_stays_the_text_it_was(name, value, monkeypatch):
    monkeypatch.setenv(f"DPO_TUTORIAL_{name}", value)
    assert getattr(config.resolve(), name.lower()) == value


# --- a notebook's cells ----


def head(path):
    """The cells of parameters and config, as source."""
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    (first,) = [n for n, source in enumerate(cells) if source.lstrip("# ").startswith("Empty or None")]
    return cells[first], cells[first + 1]


def config_of_cells(path, between=""):
    """What the notebook's two cells make, with a line that papermill or a reader puts between them."""
    names = {"In": [], "Out": {}, "_": "", "_ALSO_NONE": 1}
    for source in (head(path)[0], between, head(path)[1]):
        exec(compile(source, path.name, "exec"), names)
    return names


@each_notebook
def test_a_notebook_takes_every_knob_listed_in_its_cell_or_not(path):
    for targets in ('"c_attn,c_proj"', '["c_attn", "c_proj"]', '("c_attn", "c_proj")'):
        assert_two(config_of_cells(path, f"BETA, LORA_TARGETS = 0.3, {targets}")["cfg"])
    assert config_of_cells(path, "FRESH = 'False'")["cfg"].fresh is False, "as papermill is handed it"


@each_notebook
def test_the_cells_as_they_are_leave_everything_to_the_environment_and_the_profile(path, monkeypatch):
    monkeypatch.setenv("DPO_TUTORIAL_FRESH", "true")
    made = config_of_cells(path)["cfg"]
    assert made.fresh is True and made == config.resolve()


@each_notebook
@pytest.mark.parametrize("line", ["BTA = 0.3", "beta = '0.3'"])
def test_a_notebook_refuses_a_stray_name(path, line):
    with pytest.raises(ConfigError) as caught:
        config_of_cells(path, line)
    assert_refused(str(caught.value).replace("parameter beta.", "parameter BTA."))


def test_a_notebook_read_to_its_end_can_make_its_config_again():
    names = config_of_cells(NOTEBOOKS[2])
    later = "import numpy as np\nA, B, beta, data = np.ones(3), np.ones(3), 0.1, 'x'\nROWS, P = [('a', 1)], [40, 60]"
    exec(later + "\nBETA = 0.3", names)
    exec(head(NOTEBOOKS[2])[1], names)
    assert names["cfg"].beta == 0.3
    names["BTA"] = 0.2
    with pytest.raises(ConfigError, match="BTA"):
        exec(head(NOTEBOOKS[2])[1], names)


# --- papermill ----


@pytest.fixture
def shortened(tmp_path):
    """Notebook 05 as far as its config, which it then prints; in a folder of its own, like the run that starts it."""
    notebook = nbformat.read(NOTEBOOKS[4], as_version=4)
    parameters, made = head(NOTEBOOKS[4])
    shown = "print(cfg.beta, cfg.lora_targets, cfg.ld_alpha, cfg.save_steps, cfg.artifacts)"
    notebook.cells = [c for c in notebook.cells if c.source in (parameters, made)]
    notebook.cells.append(nbformat.v4.new_code_cell(shown))
    nbformat.write(notebook, tmp_path / "05_train_dpo.ipynb")
    return tmp_path / "05_train_dpo.ipynb"


def by_papermill(notebook, *more):
    command = [sys.executable, "-m", "papermill", notebook.name, "out.ipynb", "-p", "PROFILE", "cpu", *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, cwd=notebook.parent, env=environment, capture_output=True, text=True)


def printed(path):
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.text for o in cells[-1].outputs)


@pytest.mark.end_to_end
def test_papermill_reaches_knobs_that_the_cell_does_not_list(shortened):
    done = by_papermill(
        shortened, *words(TWO), "-p", "SAVE_STEPS", "7", "-p", "LD_ALPHA", "0.5", "-r", "ARTIFACTS", "007"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert printed(shortened.parent / "out.ipynb") == "0.3 ('c_attn', 'c_proj') 0.5 7 007\n"


@pytest.mark.end_to_end
def test_a_run_hands_every_notebook_what_was_typed(shortened, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("TOKENIZERS_PARALLELISM", "DPO_TUTORIAL_HEADLESS", "GLIBC_TUNABLES"):
        monkeypatch.setenv(name, "1")  # so that what the run sets is taken back
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    run.run_all(TWO | {"PROFILE": "smoke", "ARTIFACTS": "007", "SAVE_STEPS": "7", "BATCH_SIZE": ""}, [shortened])
    executed = tmp_path / "007" / "smoke" / "executed" / shortened.name
    assert printed(executed) == "0.3 ('c_attn', 'c_proj') 1.0 7 007\n"
    assert "unknown parameter" not in "".join(capfd.readouterr()), "papermill's warning would be false"


@pytest.mark.end_to_end
def test_a_text_that_papermill_has_read_as_a_number_is_refused(shortened):
    done = by_papermill(shortened, "-p", "ARTIFACTS", "1e3")
    assert (
        done.returncode == 1 and "ARTIFACTS=1000.0 is not of type str" in done.stderr and "-r in place" in done.stderr
    )


# --- what needs them ----


@pytest.mark.parametrize(("kind", "targets"), [("phi3", "qkv_proj,gate_up_proj"), ("gpt2", "c_attn,c_proj")])
def test_architectures_with_other_layer_names_can_be_trained(kind, targets, tokenizer, tmp_path):
    ids = {"vocab_size": len(tokenizer), "eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, **ids))
    else:
        size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = Phi3ForCausalLM(Phi3Config(**size, max_position_embeddings=256, **ids))
    model.save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    rows = [pair(f"{t[0]} {i}", *t[1:]) for i in range(6) for t in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    given = {"PROFILE": "smoke", "MODEL": str(tmp_path / kind), "DATA": str(tmp_path / "rows.jsonl")}
    given |= {"ARTIFACTS": str(tmp_path), "MAX_TOKENS": "128", "LORA_TARGETS": targets}
    assert cli.main(["train", *words(given)]) == 0
    saved = json.loads((tmp_path / "smoke" / "adapter" / "adapter_config.json").read_text())
    assert set(saved["target_modules"]) == set(targets.split(","))
