"""Every error a user can meet, set off once: each with a cause that names what was found and a fix to act on."""

import dataclasses
import errno
import json
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest
import torch
from conftest import TEXTS, pair
from datasets import DatasetDict
from nbclient.exceptions import DeadKernelError
from peft import get_peft_model

from dpo_tutorial import config, errors, run_folder
from dpo_tutorial.adapter import lora
from dpo_tutorial.cli import main as cli
from dpo_tutorial.cli import run
from dpo_tutorial.loading import embedded, models
from dpo_tutorial.machine import session
from dpo_tutorial.pairs import encoding, prepare, sources, splits, store
from dpo_tutorial.training import save, train

# --- what a user sees: each is set off once, names what was found, and says what to do ----

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
SOUND = [pair(f"{t[0]} {i}", *t[1:]) for i in range(6) for t in TEXTS]


def written(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


class Case:
    """Where an error is set off: the tiny config, its own checkpoint folder, and a run folder to harm."""

    def __init__(self, cfg, tokenizer, tiny_folder, tmp_path, monkeypatch):
        self.tokenizer, self.tmp, self.patch = tokenizer, tmp_path, monkeypatch
        self.model = tmp_path / "its-checkpoint"
        self.model.mkdir()
        for path in tiny_folder.iterdir():
            (self.model / path.name).write_bytes(path.read_bytes())
        self.cfg = dataclasses.replace(cfg, model=str(self.model))

    def changed(self, **values):
        return dataclasses.replace(self.cfg, **values)

    def edit(self, name, **values):
        path = self.model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def rows(self, *rows):
        return written(self.tmp, rows)

    def adapter(self):
        policy = get_peft_model(models.load_base(self.cfg), lora.lora_config(self.cfg))
        policy.peft_config["default"].base_model_name_or_path = self.model.name
        policy.save_pretrained(self.tmp / "its-adapter", save_embedding_layers=False)  # else it asks the hub
        return self.tmp / "its-adapter"


def without_eos(case):
    case.edit("tokenizer_config.json", eos_token=None)
    (case.model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    models.load_tokenizer(case.cfg)


def replaced_by_pip(case):
    case.patch.setitem(sys.modules, "pyarrow", SimpleNamespace(__version__="18.1.0"))
    session.check_session()


def too_large_for_the_gpu(case):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    case.patch.setattr(models.AutoModelForCausalLM, "from_pretrained", full)
    models.load_base(case.cfg)


def cut_short(case):
    path = case.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    models.load_base(case.cfg)


def of_another_kind(case):
    case.edit("config.json", model_type="vit")
    models.load_base(case.cfg)


def of_an_unknown_kind(case):
    case.edit("config.json", model_type="nosuch")
    models.load_base(case.cfg)


def of_other_shapes(case):
    case.edit("config.json", intermediate_size=64)
    models.load_base(case.cfg, quantize=False)


def damaged_tokenizer(case):
    (case.model / "tokenizer.json").write_text("{")
    models.load_tokenizer(case.cfg)


def adapter_cut_short(case):
    path = case.adapter() / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    lora.load_policy(case.cfg, path.parent)


def adapter_of_another_rank(case):
    path = case.adapter() / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))
    lora.load_policy(case.cfg, path.parent)


def adapter_with_a_damaged_config(case):
    path = case.adapter() / "adapter_config.json"
    path.write_text("{")
    lora.load_policy(case.cfg, path.parent)


def adapter_on_an_adapter(case):
    policy = get_peft_model(models.load_base(case.cfg), lora.lora_config(case.cfg))
    lora.check_lora_targets(policy, case.cfg)


def adapter_cell_run_twice(case):
    base, pairs = models.load_base(case.cfg), prepared_pairs(case)
    for _ in range(2):
        train.build_trainer(case.cfg, base, case.tokenizer, pairs, None, case.tmp / "trainer")


def prepared_pairs(case):
    return prepare.prepare(case.changed(data=case.rows(*SOUND)), case.tokenizer).splits["train"]


def gguf_without_a_template(case):
    class Bare:
        chat_template = None

    case.patch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: Bare())
    embedded.convert_gguf(case.tmp / embedded.GGUF_NAME, case.tmp / "model")


def prepared_data_cut_short(case):
    there = run_folder.Run(case.changed(data=case.rows(*SOUND)))
    store.ensure_data(there, case.tokenizer)
    (store.data_dir(there) / "train.jsonl").write_text("{")
    store.ensure_data(there, case.tokenizer)


def a_folder_that_cannot_be_written(case):
    (case.tmp / "file").write_text("")
    run_folder.Run(case.changed(artifacts=str(case.tmp / "file")))


def a_notebook_that_ends_with(error, case):
    def ends(*_, **__):
        raise error

    case.patch.setattr(run.papermill, "execute_notebook", ends)
    run._execute(case.tmp / "05_train_dpo.ipynb", case.tmp / "executed.ipynb", {})


def a_kernel_that_dies(case):
    a_notebook_that_ends_with(DeadKernelError("Kernel died"), case)


def a_kernel_that_starts_nothing(case):
    folder = case.tmp / "kernels" / "python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps({"argv": ["no-such-python"], "display_name": "", "language": ""}))
    case.patch.setenv("JUPYTER_PATH", str(case.tmp))
    case.patch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")], metadata={"kernelspec": KERNEL})
    nbformat.write(notebook, case.tmp / "05_train_dpo.ipynb")
    run._execute(case.tmp / "05_train_dpo.ipynb", case.tmp / "executed.ipynb", {})


def a_kernel_without_a_program(case):
    a_notebook_that_ends_with(RuntimeError("Kernel died before replying to kernel_info"), case)


def a_full_disk_in_a_run(case):
    a_notebook_that_ends_with(OSError(errno.ENOSPC, "No space left on device"), case)


def a_template_that_refuses(case):
    case.tokenizer = models.AutoTokenizer.from_pretrained(str(case.model))
    case.tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    encoding.encode(case.tokenizer, [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "ho"}])


def another_cut(case):
    pairs = prepared_pairs(case)
    (case.tmp / save.PAIRS_FILE).write_text("\n".join(save.pair_digests(pairs)))
    save.check_held_out(case.tmp, pairs)


def no_adapter_to_judge(case):
    save.read_training_record(case.tmp / "nowhere")


def a_training_record_of_something_else(case):
    folder = case.adapter()
    for name in ("training.json", save.PAIRS_FILE):
        (folder / name).write_text("{}")
    save.read_training_record(folder)


#: (set off by, its class, what the cause names, what the fix names)
SEEN = [
    (lambda c: config.resolve(profile="tpu"), errors.ConfigError, "'tpu'", "smoke, cpu, t4"),
    (lambda c: config.resolve(bta=1), errors.ConfigError, "BTA", "BETA"),
    (lambda c: config.resolve(data=7), errors.ConfigError, "DATA=7", "quotes"),
    (lambda c: config.resolve(beta="high"), errors.ConfigError, "BETA='high'", "float"),
    (lambda c: config.resolve(beta=0), errors.ConfigError, "BETA=0.0", "BETA"),
    (lambda c: config.resolve(loss_type="kto"), errors.ConfigError, "LOSS_TYPE='kto'", "sigmoid, sigmoid_norm, ipo"),
    (replaced_by_pip, errors.SessionError, "this session still holds 18.1.0", "Restart"),
    (lambda c: models.source(c.changed(model=str(c.tmp))), errors.ModelFetchError, "config.json", "MODEL"),
    (lambda c: models.source(c.changed(model=c.rows({}))), errors.ModelFetchError, "a file, not a folder", "MODEL"),
    (
        lambda c: models.source(c.changed(model="./my-model")),
        errors.ModelFetchError,
        r"MODEL=./my-model does not exist",
        "folder",
    ),
    (without_eos, errors.ModelUnsuitableError, "its-checkpoint has no EOS", "tokenizer.eos_token"),
    (damaged_tokenizer, errors.ModelUnsuitableError, "its-checkpoint could not be loaded", "tokenizer"),
    (too_large_for_the_gpu, errors.ModelUnsuitableError, "its-checkpoint does not fit", "PROFILE"),
    (cut_short, errors.ModelUnsuitableError, "its-checkpoint could not be loaded", "whole checkpoint"),
    (of_another_kind, errors.ModelUnsuitableError, "ViTConfig", "causal language model"),
    (of_an_unknown_kind, errors.ModelUnsuitableError, "nosuch", "transformers"),
    (of_other_shapes, errors.ModelUnsuitableError, "its-checkpoint could not be loaded", "whole checkpoint"),
    (adapter_on_an_adapter, errors.ModelUnsuitableError, "already carries an adapter", "models.load_base"),
    (adapter_cell_run_twice, errors.ModelUnsuitableError, "already carries an adapter", "policy.unload()"),
    (lambda c: lora.load_policy(c.cfg, c.tmp), errors.ArtifactError, "no adapter", "05_train_dpo"),
    (adapter_cut_short, errors.ArtifactError, "its-adapter could not be read", "ADAPTER"),
    (adapter_of_another_rank, errors.ArtifactError, "its-adapter could not be read", "05_train_dpo"),
    (adapter_with_a_damaged_config, errors.ArtifactError, "its-adapter could not be read", "05_train_dpo"),
    (a_training_record_of_something_else, errors.ArtifactError, "training.json", "ADAPTER"),
    (no_adapter_to_judge, errors.ArtifactError, "nowhere", "--adapter"),
    (another_cut, errors.ArtifactError, "test pairs", "training.json"),
    (prepared_data_cut_short, errors.ArtifactError, "train.jsonl", "Delete"),
    (a_folder_that_cannot_be_written, errors.ArtifactError, "file/cpu", "ARTIFACTS"),
    (lambda c: run_folder.Run(c.cfg).read_json("votes.json"), errors.ArtifactError, "votes.json", "notebook"),
    (gguf_without_a_template, errors.ModelCorruptError, "no chat template", embedded.REQUIREMENT),
    (lambda c: sources.load_preferences(c.changed(data="none.jsonl")), errors.DataError, "none.jsonl", "existing file"),
    (a_template_that_refuses, errors.DataError, "no system turn", "template"),
    (
        lambda c: sources.load_preferences(c.changed(data=c.rows({"question": 1}))),
        errors.DataError, "question", "DATA_COLUMNS",
    ),
    (
        lambda c: sources.load_preferences(c.changed(data=c.rows(*[pair(*t) for t in TEXTS]))),
        errors.DataError, "4 rows of 4 prompts are too few", "12 prompts",
    ),
    (lambda c: splits.choose_splits(DatasetDict(), 0), errors.DataError, "No training split", "train_prefs"),
    (a_kernel_that_dies, errors.NotebookError, "05_train_dpo.ipynb", "MAX_TOKENS"),
    (a_kernel_that_starts_nothing, errors.NotebookError, "no-such-python", "ipykernel install"),
    (a_kernel_without_a_program, errors.NotebookError, "Kernel died before replying", "kernelspec list"),
    (a_full_disk_in_a_run, errors.ArtifactError, "executed.ipynb could not be written", "ARTIFACTS"),
    (lambda c: run.notebooks(c.tmp), errors.ArtifactError, "No numbered notebook", "checkout"),
    (lambda c: config.named([("BTA", "1")]), errors.ConfigError, "BTA", "BETA"),
]  # fmt: skip


@pytest.mark.parametrize(("act", "kind", "cause", "fix"), SEEN, ids=[f"{s[0].__name__}: {s[2]}" for s in SEEN])
def test_the_cause_names_what_was_found_and_the_fix_what_to_do(
    act, kind, cause, fix, cfg, tokenizer, tiny_folder, tmp_path, monkeypatch
):
    with pytest.raises(kind) as caught:
        act(Case(cfg, tokenizer, tiny_folder, tmp_path, monkeypatch))
    error = caught.value
    assert type(error) is kind and cause in error.cause and fix in error.fix
    assert error.fix[0].isupper() and error.fix.rstrip().endswith((".", "?"))
    assert str(error) == f"{error.cause}\n  Fix: {error.fix}"


# --- commands and notebooks ----


def test_a_notebook_shows_the_message_alone():
    code = "from dpo_tutorial.errors import ConfigError as E; raise E('This is wrong.', 'Do that.')"
    done = subprocess.run([sys.executable, "-m", "IPython", "-c", code], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert "ConfigError: This is wrong.\n  Fix: Do that." in said and "Traceback" not in said
    assert done.returncode == 1


@pytest.mark.parametrize("word", ["train", "run"])
def test_a_command_says_cause_and_fix_and_exits_with_1(word, capsys):
    assert cli.main([word, "-p", "BTA", "1"]) == 1
    said = capsys.readouterr().err
    assert "ConfigError: Unknown parameter BTA." in said and "Fix: " in said and "Traceback" not in said


def test_training_exits_with_0_when_the_adapter_is_there(cfg, tmp_path):
    rows = written(tmp_path, SOUND)
    given = {"PROFILE": "smoke", "MODEL": cfg.model, "DATA": rows, "ARTIFACTS": str(tmp_path), "MAX_TOKENS": "128"}
    assert cli.main(["train", *(word for item in given.items() for word in ("-p", *item))]) == 0
    assert save.read_training_record(tmp_path / "smoke" / "adapter")


@pytest.mark.end_to_end
def test_training_under_accelerate_launch_fails_where_it_should():
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--quiet"]
    done = subprocess.run([*launch, "-m", "dpo_tutorial", "train", "-p", "BTA", "1"], capture_output=True, text=True)
    assert done.returncode == 1 and "ConfigError: Unknown parameter BTA." in done.stderr


def test_a_module_run_by_its_path_says_how_to_run_it():
    done = subprocess.run([sys.executable, cli.__file__, "doctor"], capture_output=True, text=True)
    assert done.returncode == 1 and "python -m dpo_tutorial" in done.stderr and "Traceback" not in done.stderr


def test_a_gpu_that_is_too_small_is_two_lines_and_every_other_error_of_torch_stays(capsys):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 28.00 GiB.\nSee documentation.")

    def bug():
        raise RuntimeError("shapes differ")

    assert errors.exit_code(full) == 1
    said = capsys.readouterr().err
    assert said.startswith("\nCUDA out of memory. Tried to allocate 28.00 GiB.\n  Fix: ") and "DTYPE fp16" in said
    with pytest.raises(RuntimeError, match="shapes differ"):
        errors.exit_code(bug)


def test_an_interrupted_command_ends_in_a_word_and_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert errors.exit_code(interrupted) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"
