"""The quickstart as a file, and as a reader runs it: on a tiny model, killed, run again, its adapter loaded anew."""

import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import test_notebooks
import test_prose
import torch
from conftest import code_cells, pair, script
from nbformat.v4 import new_code_cell
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from dpo_tutorial import knobs
from dpo_tutorial.loading import embedded
from dpo_tutorial.machine import hardware
from dpo_tutorial.pairs import encoding, sources
from dpo_tutorial.training import dpo

ROOT = Path(__file__).parents[2]
badges = script("scripts/badges.py")
NOTEBOOK = ROOT / "notebooks" / "00_quickstart.ipynb"
PAIRS, STEPS = 240, 60

#: Before the training: count its steps. At the end: hand out what a test compares.
COUNT = """
from transformers import TrainerCallback
class Count(TrainerCallback):
    steps = 0
    def on_step_end(self, *args, **kwargs):
        Count.steps += 1
trainer.add_callback(Count)
"""
REPORT = """
import json, pathlib
margins = next(iter(judges.values()))
pathlib.Path(ARTIFACTS, "report.json").write_text(json.dumps({
    "output": OUTPUT, "kind": kind, "gpu": os.environ["CUDA_VISIBLE_DEVICES"], "steps": Count.steps,
    "reached": trainer.state.global_step, "losses": [r["loss"] for r in trainer.state.log_history if "loss" in r],
    "trained_on": [row["prompt"][0]["content"] for row in train], "held_out": list(test), "margins": margins.tolist(),
}))
"""


def code():
    return [c for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code"]


@pytest.fixture(scope="module")
def instrumented(tmp_path_factory):
    """The notebook with two cells more."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (place,) = [i for i, c in enumerate(notebook.cells) if c.cell_type == "code" and "trainer.train(" in c.source]
    notebook.cells.insert(place, new_code_cell(COUNT))
    notebook.cells.append(new_code_cell(REPORT))
    path = tmp_path_factory.mktemp("quickstart") / "quickstart.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory):
    """A folder laid out like UltraFeedback, with a pair nobody preferred and one that is too long."""
    folder = tmp_path_factory.mktemp("pairs") / "data"
    folder.mkdir()
    rows = [pair(f"Question {i}?", f"It is {i}.", f"Great question! {i} is important!") for i in range(PAIRS)]
    rows += [pair("A tie?", "Yes.", "No.", score_chosen=3.0), pair("Long?", "Yes. " * 300, "No.")]
    held_out = [pair(f"What about {i}?", f"It is {i}." * (1 + i % 3), f"Great! {i} it is!") for i in range(12)]
    for split, some in (("train_prefs", rows), ("test_prefs", held_out)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return folder.parent


def given(model, pairs, where):
    return {"MODEL": str(model), "DATA": str(pairs), "PAIRS": PAIRS, "ARTIFACTS": str(where)}


def start(notebook, model, pairs, where):
    where.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "papermill", notebook, where / "executed.ipynb", "--no-progress-bar"]
    command += [word for name, value in given(model, pairs, where).items() for word in ("-p", name, value)]
    log = (where / "log.txt").open("w")
    return subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process, where):
    assert process.wait() == 0, (where / "log.txt").read_text()[-2000:]
    return json.loads((where / "report.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(instrumented, tiny_folder, pairs_folder, tmp_path_factory):
    where = tmp_path_factory.mktemp("undisturbed")
    return finish(start(instrumented, tiny_folder, pairs_folder, where), where)


@pytest.fixture(scope="module")
def killed(instrumented, tiny_folder, pairs_folder, tmp_path_factory):
    """The folder of a session whose kernel was killed after its first checkpoint."""
    where = tmp_path_factory.mktemp("killed")
    process = start(instrumented, tiny_folder, pairs_folder, where)
    while not list(where.glob("*/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, (where / "log.txt").read_text()[-2000:]
        time.sleep(0.02)
    for kernel in psutil.Process(process.pid).children(recursive=True):
        kernel.kill()
    assert process.wait() != 0 and not (where / "report.json").exists()
    return where


def adapter(report):
    return load_file(Path(report["output"]) / "adapter_model.safetensors")


def test_it_is_one_page():
    lines = [line for c in code() for line in map(str.strip, c.source.splitlines()) if line and line[0] != "#"]
    assert len(code()) <= 14 and len(lines) <= 92, (len(code()), len(lines))


@pytest.mark.parametrize(
    "rule",
    [
        test_notebooks.test_a_notebook_is_valid_and_its_title_has_its_number,
        test_notebooks.test_exactly_one_code_cell_is_tagged_parameters,
        test_notebooks.test_the_parameters_cell_holds_literal_assignments_only,
        test_notebooks.test_the_bootstrap_cell_fetches_this_repository,
        test_notebooks.test_the_bootstrap_cell_is_the_same_text_as_in_notebook_01,
        test_notebooks.test_the_bootstrap_cell_comes_before_any_other_code,
        test_notebooks.test_every_relative_link_leads_to_a_file,
        test_notebooks.test_a_notebook_carries_only_the_metadata_it_needs,
        test_notebooks.test_a_notebook_is_smaller_than_500_kilobytes,
        test_notebooks.test_a_notebook_names_no_folder_of_a_machine,
        test_notebooks.test_a_notebook_holds_no_hub_token,
        test_notebooks.test_outputs_hold_no_widget_no_error_and_no_stderr,
        test_notebooks.test_outputs_are_those_of_the_source_beside_them,
        test_notebooks.test_every_image_in_the_outputs_has_a_text_that_stands_for_it,
        test_prose.test_every_figure_in_the_prose_is_shown_by_an_output_a_source_line_or_a_benchmark,
    ],
    ids=lambda rule: rule.__name__,
)
def test_what_holds_for_the_others_holds_for_it(rule):
    rule(NOTEBOOK)


def test_readers_find_it_first():
    badge = badges.badge(badges.slug(ROOT), NOTEBOOK.name)
    assert badge in nbformat.read(NOTEBOOK, as_version=4).cells[0].source
    for page in ("README.md", "colab_badge.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert text.index("https://colab.research.google.com/github/") == text.index(badge.rpartition("(")[2][:-1])
    for other in test_notebooks.PATHS:
        assert f"]({NOTEBOOK.name}) → " in nbformat.read(other, as_version=4).cells[0].source


def test_what_it_says_of_its_answers_is_what_its_table_shows():
    (table,) = [o.data["text/html"] for c in code() for o in c.outputs if "same greedy decoding" in str(o.get("data"))]
    rows = [list(map(html.unescape, row)) for row in re.findall(3 * "<td>(.*?)</td>", table, re.DOTALL)]
    ended = [sum(row[column].rstrip().endswith((".", "!", "?")) for row in rows) for column in (1, 2)]
    prose = [c.source for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "markdown"]
    assert any(f"{ended[1]} of {len(rows)} instead of {ended[0]}," in text for text in prose), ended
    (top,) = [text for text in prose if text.startswith("## What you will have")]
    before, after = re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", top)
    assert any(before in row[1] and after in row[2] for row in rows)


def make(*words):
    return subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True)


def test_make_runs_it_with_its_own_knobs_and_refuses_others():
    planned = shlex.split(make("quickstart", "PAIRS=32", "ARTIFACTS=my runs").stdout.splitlines()[-1])
    assert planned[-7:] == [f"my runs/{NOTEBOOK.name}", "-p", "PAIRS", "32", "-r", "ARTIFACTS", "my runs"]
    refused = make("quickstart", "BETA=0.3")
    assert refused.returncode != 0 and "does not know BETA. It knows PROFILE MODEL" in refused.stderr
    assert "one PROFILE, smoke" in make("quickstart", "PROFILE=cpu").stderr
    assert f"{NOTEBOOK.name} -p PROFILE smoke" in make("test").stdout


@pytest.mark.end_to_end
def test_it_trains_on_clear_preferences_that_fit_and_on_one_gpu(undisturbed):
    assert undisturbed["steps"] == undisturbed["reached"] == STEPS
    assert undisturbed["losses"][0] == pytest.approx(0.6931, abs=1e-4), "policy and reference start as one model"
    assert undisturbed["losses"][-1] < 0.65
    assert len(undisturbed["trained_on"]) == PAIRS and not {"A tie?", "Long?"} & set(undisturbed["trained_on"])
    assert undisturbed["gpu"] == os.environ.get("CUDA_VISIBLE_DEVICES", "0")


@pytest.mark.end_to_end
def test_a_killed_session_goes_on_and_ends_as_an_undisturbed_one(
    killed, undisturbed, instrumented, tiny_folder, pairs_folder
):
    resumed = finish(start(instrumented, tiny_folder, pairs_folder, killed), killed)
    assert resumed["steps"] < resumed["reached"] == STEPS
    for name, weights in adapter(undisturbed).items():
        assert torch.equal(adapter(resumed)[name], weights), name
    assert resumed["margins"] == undisturbed["margins"]
    # Trainer logs means over a few steps; of those that the stop fell into, it knows only the ones behind it.
    others = [a == b for a, b in zip(resumed["losses"], undisturbed["losses"], strict=True)]
    assert others.count(False) <= 1 and others[-1]


@pytest.mark.end_to_end
def test_a_finished_training_is_not_repeated(
    undisturbed, instrumented, tiny_folder, pairs_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", undisturbed["gpu"])
    shutil.copytree(Path(undisturbed["output"]).parent, tmp_path / "again")
    names = {}
    for cell in code_cells(instrumented):  # in this process, which has imported everything
        exec(compile(cell.source, NOTEBOOK.name, "exec"), names)
        if "parameters" in cell.metadata.get("tags", []):
            names |= given(tiny_folder, pairs_folder, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert (again["steps"], again["reached"]) == (0, STEPS)
    assert (again["losses"], again["margins"]) == (undisturbed["losses"], undisturbed["margins"])


@pytest.mark.end_to_end
def test_the_adapter_gives_the_same_margins_with_peft_alone(undisturbed, tiny_folder):
    dtype = hardware.torch_dtype(undisturbed["kind"])
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    tokenizer = AutoTokenizer.from_pretrained(undisturbed["output"])
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=nf4, dtype=dtype)
    policy = PeftModel.from_pretrained(base, undisturbed["output"]).eval()

    @torch.no_grad()
    def log_prob(row, side):
        prompt, answer = encoding.encode(tokenizer, row["prompt"], row[side])
        ids = torch.tensor([prompt + answer], device=policy.device)
        mask = torch.tensor([[0] * len(prompt) + [1] * len(answer)], device=policy.device)
        return dpo.sequence_log_prob(policy(ids).logits.float(), ids, mask).item()

    def gaps():
        return torch.tensor([log_prob(row, "chosen") - log_prob(row, "rejected") for row in undisturbed["held_out"]])

    moved = gaps()
    with policy.disable_adapter():
        moved -= gaps()
    expected = torch.tensor(undisturbed["margins"])
    assert expected.abs().max() > 0.1, "an adapter that does nothing would pass"
    assert torch.allclose(0.1 * moved, expected, atol=0.02), (0.1 * moved, expected)


def test_the_hub_is_asked_where_there_is_a_gpu_and_embedded_is_used_where_there_is_none(monkeypatch):
    monkeypatch.setattr(embedded, "ensure_embedded_model", lambda: Path("/cache/model"))
    ours = str(sources.embedded_file("train_prefs").parent)
    monkeypatch.setattr(hardware, "device", lambda: "cpu")
    assert sources.or_hub() == (("/cache/model", None), (ours, None))
    monkeypatch.setattr(hardware, "device", lambda: "cuda")
    assert sources.or_hub() == (knobs.QWEN_SMALL, knobs.ULTRAFEEDBACK)
    assert sources.or_hub("embedded", "my/pairs") == (("/cache/model", None), ("my/pairs", None))
