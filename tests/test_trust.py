"""Trust: nothing runs code from a download, no shell is built from a value, no token and no private name is kept."""

import ast
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
from conftest import TEXTS, code_cells, pair
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from test_notebooks import each, outputs
from test_repository import planned

from dpo_tutorial import badges, config, data, models
from dpo_tutorial.errors import ArtifactError, DataError, ModelCorruptError, ModelUnsuitableError

ROOT = Path(__file__).parents[1]


def source(path):
    """The Python of a file; of a notebook its code cells, a magic as the call that IPython makes of it."""
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    return "\n".join(c.source for c in code_cells(path))


def files(*folders):
    return [p for f in folders for p in sorted((ROOT / f).rglob("*")) if p.suffix in (".py", ".ipynb")]


SHIPPED = files("src", "scripts", "benchmarks", "notebooks")
every_shipped_file = pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.name}")


def calls(text):
    """(what is called, the call) for every call in a source text."""
    return [(ast.unparse(n.func), n) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]


def test_the_search_covers_package_scripts_benchmarks_and_notebooks():
    assert {"models.py", "blind_check.py", "effect.py", "06_compare.ipynb"} <= {p.name for p in SHIPPED}


# --- nothing that runs code from a download ----

PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
MUST_BE = {"trust_remote_code": False, "allow_pickle": False, "use_safetensors": True, "weights_only": True}
LOADERS = {"torch.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "eval", "exec"}


def unsafe(text):
    """What in this source could execute code that came with weights or data."""
    found = {name for name, _ in calls(text) if name in LOADERS or name.endswith("read_pickle")}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.keyword) and node.arg in MUST_BE:
            if not (isinstance(node.value, ast.Constant) and node.value.value is MUST_BE[node.arg]):
                found.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MUST_BE:
            found.add(node.value)  # as a key of a dict
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names} & PICKLES
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} & PICKLES
            found |= {f"{node.module}.{a.name}" for a in node.names} & LOADERS
    return found


@pytest.mark.parametrize(
    "text",
    [
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=anything)",
        "AutoModel.from_pretrained(x, use_safetensors=False)",
        "AutoModel.from_pretrained(x, weights_only=False)",
        "import torch\ntorch.load(x)",
        "from torch import load",
        "import pickle",
        "from pickle import loads",
        "pandas.read_pickle(x)",
        "f(**{'trust_remote_code': True})",
        "numpy.load(x, allow_pickle=True)",
        "yaml.load(x)",
        "eval(x)",
    ],
)
def test_the_search_for_unsafe_loading_finds_it(text):
    assert unsafe(text)


@every_shipped_file
def test_no_file_loads_anything_that_can_run_code(path):
    assert unsafe(source(path)) == set()


def lax(text):
    """Calls that load a model or tokenizer and leave to its default what must be said, or a hub id without commit."""
    found = []
    for name, call in calls(text):
        last, given = name.rpartition(".")[2], {k.arg for k in call.keywords}
        if last not in ("from_pretrained", "load_dataset", "snapshot_download", "hf_hub_download"):
            continue
        wanted = {"trust_remote_code"} if name.startswith("Auto") else set()
        if name.startswith("AutoModel") and "gguf" not in ast.unparse(call):  # a GGUF file is no pickle
            wanted.add("use_safetensors")
        local = {"data_files", "state_dict"} & given or any(ast.unparse(a).startswith("str(") for a in call.args)
        if not wanted <= given or not (local or "revision" in given):
            found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize(
    "text",
    [
        "AutoTokenizer.from_pretrained(x, revision=r)",
        "AutoModelForCausalLM.from_pretrained(x, revision=r, trust_remote_code=False)",
        "AutoTokenizer.from_pretrained('a/b', trust_remote_code=False)",
        "load_dataset('a/b')",
        "huggingface_hub.snapshot_download('a/b')",
    ],
)
def test_the_search_for_lax_loading_finds_it(text):
    assert lax(text)


#: What the quickstart loads again is the folder that it has just saved; shown as the plain lines a reader takes along.
OWN = [
    "AutoPeftModelForCausalLM.from_pretrained(OUTPUT, quantization_config=nf4, dtype=dtype, device_map=device)",
    "AutoTokenizer.from_pretrained(OUTPUT)",
]


@every_shipped_file
def test_every_loader_says_no_to_remote_code_and_names_a_commit_or_a_local_path(path):
    assert lax(source(path)) == (OWN if path.name.startswith("00_") else [])


def test_datasets_has_no_switch_that_would_run_a_script():
    assert "trust_remote_code" not in datasets.load_dataset.__code__.co_varnames, "pass False to it in data.py"


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
    assert "pickle" in error.value.mend and not sprung.exists()


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
    assert "never run" in error.value.mend and "trust_remote_code" not in str(error.value)
    assert not sprung.exists()


def test_missing_weights_are_refused_not_filled_with_random_numbers(checkpoint):
    cfg, folder, _ = checkpoint
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelCorruptError, match="layers.0.self_attn.q_proj.weight"):
        models.load_base(cfg)


def test_an_adapter_in_a_pickle_is_refused(cfg, tmp_path):
    get_peft_model(models.load_base(cfg), models.lora_config(cfg)).save_pretrained(tmp_path)
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="no adapter"):
        models.load_policy(cfg, tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_script_in_a_dataset_folder_is_not_run(cfg, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "pairs.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    with pytest.raises(DataError, match="could not be read"):
        data.load_preferences(dataclasses.replace(cfg, data=str(folder)))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", [n for n, values in config.PROFILES.items() if "model" in values])
def test_a_hub_profile_names_full_commits_not_branches(name):
    for what in ("model_revision", "data_revision"):
        assert re.fullmatch("[0-9a-f]{40}", config.PROFILES[name][what])


# --- no shell is built from a value ----

SHELLS = {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn",
    "asyncio.create_subprocess_shell", "get_ipython",
}  # fmt: skip


def shells(text):
    """Calls that hand a text to a shell, or to `subprocess` as one string."""
    found = []
    for name, call in calls(text):
        strings = name.startswith("subprocess.") and call.args and isinstance(call.args[0], (ast.JoinedStr, ast.BinOp))
        text_given = call.args and isinstance(call.args[0], ast.Constant) and name.startswith("subprocess.")
        if name in SHELLS or strings or text_given or any(k.arg in ("shell", "executable") for k in call.keywords):
            found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize(
    "text",
    [
        "os.system(x)",
        "subprocess.run(f'pip install {x}')",
        "subprocess.run('ls ' + x)",
        "subprocess.run('ls')",
        "subprocess.run(command, shell=True)",
        "subprocess.getoutput(x)",
        "get_ipython().system(x)",
    ],
)
def test_the_search_for_shells_finds_one(text):
    assert shells(text)


@every_shipped_file
def test_no_file_starts_a_shell_and_a_notebook_only_that_of_the_bootstrap_cell(path):
    known = ["get_ipython()"] if path.suffix == ".ipynb" else []
    assert shells(source(path)) == known


@pytest.mark.parametrize("value", ["my pairs.jsonl", "o'clock.jsonl", "'; id; '", "$(id)", "$(shell id)", "`id`"])
def test_make_hands_any_value_on_as_one_word(value):
    shown = planned("run", f"DATA={value}")
    (line,) = [line for line in shown.splitlines() if "dpo_tutorial.run" in line]
    assert shlex.split(line.partition("dpo_tutorial.run")[2]) == ["-p", "DATA", value]


def test_make_badges_hands_any_name_on_as_one_word():
    (line,) = [line for line in planned("badges", "REPO=me/dpo; id").splitlines() if "dpo_tutorial.badges" in line]
    assert shlex.split(line)[-1] == "me/dpo; id"


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.name)
def test_a_workflow_hands_inputs_to_the_shell_through_the_environment(path):
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
    assert [step["run"] for job in jobs for step in job["steps"] if "${{" in step.get("run", "")] == []


# --- the token ----

TOKENS = {
    "HF_TOKEN": "hf_sentinelOfTheEnvironment",
    "HUGGING_FACE_HUB_TOKEN": "hf_sentinelOfTheOldName",
    "JUDGE_API_KEY": "sk-sentinel-of-the-judge",
}
STORED = "hf_sentinelInTheTokenFile"
SOMEONE = "sentineluser"

PIPELINE = """
import os, sys
from pathlib import Path
import huggingface_hub
from dpo_tutorial import evaluate, run, train

assert huggingface_hub.get_token() == os.environ["HF_TOKEN"], "the token is at hand, so it could leak"
folder, notebook, *given = map(str, sys.argv[1:])
given = dict(zip(given[::2], given[1::2]))
flags = [word for pair in given.items() for word in ("-p", *pair)]
assert train.main(flags) == 0
adapter = f"{folder}/artifacts/smoke/adapter"
assert evaluate.main(["--adapter", adapter, "--out", f"{folder}/report", "-p", "MAX_NEW_TOKENS", "4"]) == 0
run.run_all(given, [Path(notebook)])
run.clean_notebook(Path(f"{folder}/artifacts/smoke/executed") / Path(notebook).name, Path(folder) / "clean.ipynb")
assert train.main(["-p", "MODEL", "nobody/nothing", "-p", "ARTIFACTS", given["ARTIFACTS"]]) == 1
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


def test_no_token_is_printed(pipeline):
    _, said = pipeline
    assert "adapter saved in" in said and "wrote" in said and "nobody/nothing could not be loaded" in said
    for token in (*TOKENS.values(), STORED):
        assert token not in said


def reads_of_the_environment(text):
    """Uses of `os.environ` other than one variable by its name: a copy of all of them would hold the token."""
    tree = ast.parse(text)
    named = {
        id(n.value)
        for n in ast.walk(tree)
        if isinstance(n, ast.Subscript) or isinstance(n, ast.Attribute) and n.attr in ("get", "update", "setdefault")
    }
    loops = (n.iter for n in ast.walk(tree) if isinstance(n, ast.For))  # one that strikes values out of a text
    named |= {id(n.func.value) for n in loops if ast.unparse(n) == "os.environ.items()"}
    return [
        n.lineno
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and ast.unparse(n) == "os.environ" and id(n) not in named
    ]


@pytest.mark.parametrize(
    "text",
    ["dict(os.environ)", "os.environ.copy()", "{**os.environ}", "json.dumps(os.environ)", "dict(os.environ.items())"],
)
def test_the_search_for_a_copied_environment_finds_it(text):
    assert reads_of_the_environment(text)


@pytest.mark.parametrize("path", files("src", "notebooks"), ids=lambda p: p.name)
def test_nothing_copies_the_environment_or_asks_for_a_token_or_a_name(path):
    text = source(path)
    assert reads_of_the_environment(text) == []
    asked = "HF_TOKEN|HUGGING_FACE_HUB_TOKEN|get_token|HfFolder|whoami|notebook_login|getpass|getuser|getlogin"
    assert not re.findall(rf"\b(?:{asked}|gethostname|uname|platform\.node)\b", text)


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


@pytest.mark.parametrize(
    "text",
    [
        *(f"saved in /{folder}/ana/dpo/adapter" for folder in FOLDERS),
        *(f"<td>/{folder}/.cache/x</td>" for folder in FOLDERS),
        'File "/usr/lib/python3.11/ast.py", line 1',
        "'/tmp/ipykernel_7/1.py'",
        "/content/drive/MyDrive",
        "C:\\Users\\ana",
        "C:\\\\Users",
        "file:///x",
        "hf_abcdefghij",
        "Authorization: Bearer abc",
        "https://ana:secret@hub",
        "ana@laptop:~$",
    ],
)
def test_the_search_for_private_things_finds_them(text):
    assert private(text)


@pytest.mark.parametrize("text", ["and/or", "</td>", "./artifacts/cpu", "~/x", "<cache>/model", "https://hf.co/root/x"])
def test_the_search_for_private_things_leaves_ordinary_text_alone(text):
    assert private(text) == []


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


@each
def test_a_notebook_installs_only_by_the_bootstrap_cell(path):
    """No `!pip install` of a parameter: one cell runs pip, before any parameter is set, and only with fixed words."""
    text = source(path)
    run = [call for name, call in calls(text) if name.startswith(("subprocess.", "get_ipython", "os.system"))]
    (magic,) = [[ast.literal_eval(a) for a in call.args] for call in run if call.args]
    assert magic == ["pip", f'install -q {{kept}} "dpo-tutorial @ git+https://github.com/{badges.slug(ROOT)}"']
    assert text.index("run_line_magic") < text.index("PROFILE")


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


# --- the fault table ----

DOCS = ROOT / "docs"
#: What DESIGN calls the traps of the field, by a word of its row.
TRAPS = [
    "GradScaler", "EOS appended again", "merge at the border", "`ref_model`", "another base", "stacked", "higher* beta",
    "chosen reward falls", "pick the longer", "keyword argument", "torch or numpy", "progress bars",
    "merging into 4-bit", "training was killed", "No space left", "Another process is using", "`STRICT`", "hub is down",
    "doctor",
]  # fmt: skip


def fault_rows():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| you see")]


def defined(path, name):
    """Whether a Python file defines this function, class or constant, or a notebook has this heading."""
    if path.suffix == ".ipynb":
        cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"]
        return any(re.match(rf"#+ {re.escape(name)}$", line) for text in cells for line in text.splitlines())
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    name = name.strip("`")
    return any(
        getattr(n, "name", None) == name or isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == name for n in tree
    )


@pytest.mark.parametrize("words", TRAPS)
def test_each_trap_has_one_row_in_the_fault_table(words):
    assert len([row for row in fault_rows() if words in row]) == 1


@pytest.mark.parametrize("row", fault_rows(), ids=lambda row: row[2:40].strip())
def test_a_fault_has_symptom_cause_and_mend_and_leads_to_what_handles_it(row):
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
    assert len(cells) == 4 and all(cells[:3])
    links = re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", cells[3])
    assert links or "doctor" in row
    for name, target in links:
        assert (DOCS / target).is_file() and defined(DOCS / target, name), f"{name} in {target}"


def test_the_search_for_a_definition_can_fail():
    assert not defined(ROOT / "src/dpo_tutorial/models.py", "`no_such_function`")
    assert not defined(ROOT / "notebooks/05_train_dpo.ipynb", "No such heading")


@every_shipped_file
def test_nothing_merges_an_adapter_into_its_base(path):
    assert not {name.rpartition(".")[2] for name, _ in calls(source(path))} & {"merge_and_unload", "merge_adapter"}
