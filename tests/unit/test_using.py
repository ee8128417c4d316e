"""Merge, export, the gate, and chat, on a tiny model; some exports are spoiled on purpose."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from conftest import trained_run

from dpo_tutorial.adapter import lora
from dpo_tutorial.cli import main as cli
from dpo_tutorial.errors import ArtifactError, ConfigError, ModelUnsuitableError
from dpo_tutorial.loading import models
from dpo_tutorial.pairs import store
from dpo_tutorial.training import card, scoring
from dpo_tutorial.using import chat, convert, engines, export, gate, merge

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tiny_folder, tokenizer, tmp_path_factory):
    """An adapter as 05 saves it, of two steps at a rate that moves it well away from its base."""
    return trained_run(tiny_folder, tokenizer, tmp_path_factory.mktemp("trained"), max_steps=6, learning_rate=5e-2)


@pytest.fixture(scope="module")
def policy(trained):
    return lora.load_policy(trained.config, trained.adapter)


def words(command, trained, *more):
    return [command, "--adapter", str(trained.adapter), *map(str, more)]


def logits(model):
    return engines.logits_of(model, list(range(3, 40)))


# --- merging ----


def test_the_merged_model_is_the_adapter_on_its_4_bit_base(trained, policy):
    merged = merge.merged(trained.config, trained.adapter, store="fp32")
    assert torch.allclose(logits(merged), logits(policy), atol=1e-4)
    with policy.disable_adapter():
        assert (logits(merged) - logits(policy)).abs().max() > 0.1, "training moved it"
    assert not any("lora_" in name for name, _ in merged.named_parameters()) and merged.config.use_cache
    assert not hasattr(merged.config, "quantization_config")


def test_other_ways_to_merge_are_further_from_what_was_trained(trained, policy):
    right, wrong = logits(policy), {}
    for into, kept in (("4bit", "fp16"), ("4bit", "bf16"), ("16bit", "fp16")):
        merged = merge.merged(trained.config, trained.adapter, into, kept)
        assert merged.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[kept]
        wrong[into, kept] = (logits(merged.float()) - right).abs().max()
    assert wrong["4bit", "fp16"] < min(wrong["4bit", "bf16"], wrong["16bit", "fp16"])


def test_a_base_that_changed_since_the_training_is_refused(trained, tmp_path):
    other = Path(shutil.copytree(trained.config.model, tmp_path / "tiny-llama"))
    found = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(found | {"rms_norm_eps": 0.5}))
    with pytest.raises(ArtifactError, match="was trained on"):
        merge.config_of(trained.adapter, {"MODEL": str(other)})
    assert merge.config_of(trained.adapter, {}).model == trained.config.model


# --- where an export may go ----


@pytest.mark.parametrize("name", ["notes.txt", "folder", "adapter"])
def test_an_export_does_not_take_the_place_of_other_files(trained, tmp_path, name, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("kept")
    (tmp_path / "notes.txt").write_text("kept")
    out = trained.adapter if name == "adapter" else tmp_path / name
    assert cli.main(words("export", trained, "--to", "merged", "--out", out)) == 1
    assert f"{out} holds other files" in (said := capsys.readouterr().err) and "--out" in said
    assert (tmp_path / "folder" / "mine").read_text() == (tmp_path / "notes.txt").read_text() == "kept"
    assert (trained.adapter / "training.json").is_file()


def test_an_export_needs_a_pair_to_be_checked_on(trained, tmp_path, capsys):
    assert cli.main(words("export", trained, "--to", "merged", "--out", tmp_path / "out", "--pairs", 0)) == 1
    assert "--pairs 0" in capsys.readouterr().err and not (tmp_path / "out").exists()


# --- the gate ----


@pytest.fixture(scope="module")
def merged_folder(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "merged"
    assert cli.main(words("export", trained, "--to", "merged", "--out", out)) == 0
    return out


@pytest.fixture
def spoiled(merged_folder, tmp_path):
    """A copy to harm."""
    folder = tmp_path / "spoiled"
    folder.mkdir()
    for path in merged_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def measured(trained, policy, tokenizer, folder):
    pairs = store.ensure_data(trained, tokenizer).splits["test"]
    opened = engines.opened(folder, trained.config)
    return gate.measure(gate.trained(trained.config, policy, tokenizer, pairs), opened)


def test_a_faithful_export_passes_and_says_what_was_measured(trained, merged_folder):
    found = json.loads((merged_folder / "GATE.json").read_text())
    assert found["why"] == [] and found["engine"] == "transformers" and found["kl"] < 1e-5
    assert found["greedy"]["equal"] == found["greedy"]["prompts"] > 0 and found["other_tokens"] == 0
    assert found["margin"]["exported"] == pytest.approx(found["margin"]["adapter"], rel=1e-2)
    assert (merged_folder / "README.md").read_text().startswith("# The trained model")


def test_the_gate_scores_as_the_tutorial_does(trained, policy, tokenizer, merged_folder):
    pairs = store.ensure_data(trained, tokenizer).splits["test"]
    margins = [r["margin"] for r in scoring.score_pairs(trained.config, policy, tokenizer, pairs)]
    found = measured(trained, policy, tokenizer, merged_folder)
    assert found["margin"]["adapter"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)


def another_scale(folder, trained):
    path = folder / "its-adapter"
    path.mkdir()
    for file in trained.adapter.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": settings["lora_alpha"] / 4}))
    merge.merged(trained.config, path).save_pretrained(folder)


def replacing(name, old, new):
    def spoil(folder, trained):
        path = folder / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return spoil


another_template = replacing("chat_template.jinja", "<|im_start|>' + m['role']", "### ' + m['role']")
LOOP = "{% for m in messages %}"
REFUSAL = "{% if loop.index == 3 %}{{ raise_exception('no third message') }}{% endif %}"
SPOILS = {
    "scale": (another_scale, "margins changed"),
    "template": (another_template, "other token ids"),
    "no system turn": (replacing("chat_template.jinja", LOOP, "{% for m in messages if m['role'] != 'system' %}"),
                       "other token ids"),
    "no third message": (replacing("chat_template.jinja", LOOP, "{% for m in messages[:2] %}"), "other token ids"),
    "raises": (replacing("chat_template.jinja", LOOP, LOOP + REFUSAL), "other token ids"),
    "EOS of generation": (replacing("generation_config.json", '"eos_token_id": 2', '"eos_token_id": 0'), "one EOS"),
    "EOS of the tokenizer": (replacing("tokenizer_config.json", '"eos_token": "<|im_end|>"',
                                       '"eos_token": "<|endoftext|>"'), "one EOS"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "why"), SPOILS.values(), ids=SPOILS)
def test_a_spoiled_export_is_not_the_trained_model(spoil, why, spoiled, trained, policy, tokenizer):
    spoil(spoiled, trained)
    found = measured(trained, policy, tokenizer, spoiled)
    assert any(why in reason for reason in found["why"]), found["why"]
    assert any(str(row["exported"]).startswith("no: ") for row in gate.rows(found))


def test_a_spoiled_export_makes_the_command_exit_with_1(trained, tmp_path, monkeypatch, capsys):
    save, out = merge.save, tmp_path / "merged"

    def spoiling(model, tokenizer, folder):
        save(model, tokenizer, folder)
        another_template(folder, trained)

    monkeypatch.setattr(merge, "save", spoiling)
    assert cli.main(words("export", trained, "--to", "merged", "--out", out)) == 1
    assert "NOT the trained model" in capsys.readouterr().out
    assert "other token ids" in (out / "README.md").read_text()


def test_a_checkpoint_that_names_a_temperature_and_not_that_it_samples_is_exported(trained, tokenizer, tmp_path):
    model = merge.merged(trained.config, trained.adapter)
    model.generation_config.temperature = 0.6
    merge.save(model, tokenizer, tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert not written.get("do_sample") and not written.get("temperature"), "greedy, as it was"


def test_the_command_compares_greedy_answers_to_more_prompts_than_it_scores_pairs(trained, tokenizer, tmp_path):
    assert cli.main(words("export", trained, "--to", "merged", "--out", tmp_path / "merged", "--pairs", 1)) == 0
    found = json.loads((tmp_path / "merged" / "GATE.json").read_text())
    prompts = store.ensure_data(trained, tokenizer).splits["test"]["prompt"][:24]
    assert found["pairs"] == 1 < found["greedy"]["prompts"] == len(prompts) and gate.PROMPTS == 24


def test_a_template_need_not_take_what_the_adapters_own_refuses(trained, policy, tokenizer, merged_folder):
    own = models.AutoTokenizer.from_pretrained(trained.config.model)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    own.chat_template = refusal + tokenizer.chat_template
    pairs = store.ensure_data(trained, tokenizer).splits["test"]
    model = gate.trained(trained.config, policy, own, pairs)
    assert [talk[0]["role"] for talk, _ in model.talks] == ["user"]
    assert gate.measure(model, engines.opened(merged_folder, trained.config))["why"] == []


def test_the_first_token_that_differs_is_named(trained, policy, tokenizer, merged_folder, monkeypatch):
    """The export writes another token from one place of one answer on."""
    pairs = store.ensure_data(trained, tokenizer).splits["test"]
    model = gate.trained(trained.config, policy, tokenizer, pairs)
    opened, at = engines.opened(merged_folder, trained.config), 9
    usual = opened.logits
    prompt, answer = next(asked for asked in model.greedy[1:] if len(asked[1]) > at + 1)
    before, other = opened.ids(prompt, True), answer[at] - 1

    def bumped(ids):
        rows = usual(ids)
        if ids == before + answer:
            rows[len(before) - 1 + at :, other] = rows.max() + 1
        return rows

    monkeypatch.setattr(opened, "logits", bumped)
    found = gate.measure(model, opened)["greedy"]
    after, ours, theirs = map(tokenizer.decode, (answer[1:9], answer[9], other))
    asked = prompt[-1]["content"]
    assert found["differs"] == dict(prompt=asked, token=at, after=after, adapter=ours, exported=theirs)
    assert found["equal"] == len(model.greedy) - 1 == found["prompts"] - 1


def test_accuracy_and_the_largest_change_are_those_of_plain_torch(trained, policy, tokenizer, spoiled):
    another_scale(spoiled, trained)
    found = measured(trained, policy, tokenizer, spoiled)
    plain = models.AutoModelForCausalLM.from_pretrained(spoiled, dtype=torch.float32)

    @torch.no_grad()
    def nats(model, pair, side):
        text = tokenizer.apply_chat_template(pair["prompt"] + pair[side], tokenize=False)
        asked = tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
        ids, start = (tokenizer(t, return_tensors="pt")["input_ids"] for t in (text, asked))
        labels = ids.clone()
        labels[:, : start.shape[1]] = -100
        return -model(input_ids=ids, labels=labels).loss.item() * (ids.shape[1] - start.shape[1])

    margins = {"adapter": [], "exported": []}
    for pair in store.ensure_data(trained, tokenizer).splits["test"]:
        with policy.disable_adapter():
            base = nats(policy, pair, "chosen") - nats(policy, pair, "rejected")
        for who, model in (("adapter", policy), ("exported", plain)):
            margin = nats(model, pair, "chosen") - nats(model, pair, "rejected") - base
            margins[who].append(trained.config.beta * margin)
    changes = [abs(a - b) for a, b in zip(*margins.values(), strict=True)]
    assert found["margin_change_largest"] == pytest.approx(max(changes), rel=1e-3) and max(changes) > 0.01
    assert found["accuracy"] == {who: sum(m > 0 for m in ms) / len(ms) for who, ms in margins.items()}


def test_an_export_that_fails_is_marked_and_the_command_exits_with_1(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gate.LIMITS, "kl", -1.0)
    out = tmp_path / "merged"
    assert cli.main(words("export", trained, "--to", "merged", "--out", out)) == 1
    assert (out / "README.md").read_text().startswith("# NOT the trained model\n\nKL per token is")
    assert "which is NOT the trained model" in capsys.readouterr().out


def test_an_export_that_stops_half_way_leaves_what_was_there(trained, tmp_path, monkeypatch):
    out = tmp_path / "merged"
    out.mkdir()
    (out / "GATE.json").write_text("kept")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "save", full)
    with pytest.raises(ArtifactError, match="No space left"):
        export.export(trained.config, trained.adapter, "merged", out)
    assert [p.name for p in tmp_path.rglob("*")] == ["merged", "GATE.json"]


@pytest.mark.parametrize(
    ("stage", "fails", "passing"),
    [("ways", "16-bit checkpoint", 4), ("llama_cpp", "Q4_K_M", 2)],
    ids=["transformers", "llama.cpp"],
)
def test_the_limits_let_pass_what_keeps_the_model_and_nothing_else(stage, fails, passing):
    lines = [json.loads(line) for line in (ROOT / "benchmarks" / "export.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["stage"] == stage and line["name"] != "machine"]
    found = {line["name"]: line for line in lines}
    passes = {name for name, line in found.items() if not gate.judge(line)}
    assert set(found) - passes == {name for name in found if fails in name} and len(passes) == passing


@pytest.mark.parametrize("name", gate.LIMITS)
def test_what_is_no_number_passes_no_limit(name):
    found = dict.fromkeys(gate.LIMITS, 0.0) | {"prompts_equal": 1, "one_eos": True}
    assert gate.judge(found) == [] and len(gate.judge(found | {name: math.nan})) == 1


def test_the_limits_are_twice_what_q8_0_measured_in_llama_cpp_when_they_were_set():
    lines = map(json.loads, (ROOT / "benchmarks" / "export.jsonl").read_text().splitlines())
    first = next(line for line in lines if line["stage"] == "llama_cpp" and line["name"] == "GGUF Q8_0")
    for name, limit in gate.LIMITS.items():
        assert limit == pytest.approx(2 * first[name], rel=0.03)


# --- GGUF and Ollama ----


def test_without_the_converter_one_sentence_says_what_to_install(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dpo-tutorial\[export\]'"):
        export.export(trained.config, trained.adapter, "gguf", tmp_path / "gguf")
    assert list(tmp_path.iterdir()) == []


def test_without_llama_cpp_q4_k_m_is_refused_before_any_work(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: name == "convert_hf_to_gguf" or None)
    monkeypatch.setattr(convert.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"(?s)llama-quantize.*pip install 'dpo-tutorial\[llama-cpp\]'"):
        export.export(trained.config, trained.adapter, "gguf", tmp_path / "gguf", kind="q4_k_m")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_a_fast_form_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ModelUnsuitableError, match="no tokenizer.json") as caught:
        convert.to_gguf(tmp_path, tmp_path / "model.gguf", "f16")
    assert "--to merged" in caught.value.fix


def test_q4_k_m_is_made_of_f16_by_the_program_on_the_path(merged_folder, tmp_path, monkeypatch):
    """`llama-quantize` stands in for itself: it writes down what it was given."""
    pytest.importorskip("convert_hf_to_gguf", reason="the extra export is not installed")
    tool = tmp_path / "llama-quantize"
    tool.write_text('#!/bin/sh\ntest "$3" = q4_k_m && cp "$1" "$2"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    folder = Path(shutil.copytree(merged_folder, tmp_path / "merged"))
    made = convert.to_gguf(folder, tmp_path / "model-q4_k_m.gguf", "q4_k_m")
    assert made.read_bytes()[:4] == b"GGUF"


@pytest.mark.slow
def test_q4_k_m_is_made_by_llama_cpp(merged_folder, tmp_path, monkeypatch):
    pytest.importorskip("convert_hf_to_gguf", reason="the extra export is not installed")
    pytest.importorskip("llama_cpp", reason="the extra llama-cpp is not installed")
    monkeypatch.setattr(convert.shutil, "which", lambda name: None)
    folder = Path(shutil.copytree(merged_folder, tmp_path / "merged"))
    sizes = [
        convert.to_gguf(folder, tmp_path / f"model-{kind}.gguf", kind).stat().st_size for kind in ("f16", "q4_k_m")
    ]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("before", ["", "<|endoftext|>"])
def test_what_llama_cpp_puts_before_a_text_is_there_once(trained, merged_folder, before):
    """Llama 3's template writes the BOS that its tokenizer adds as well; llama.cpp takes one of the two away."""
    opened = engines.Transformers(merged_folder, trained.config)
    opened.bos = opened.tokenizer.convert_tokens_to_ids(["<|endoftext|>"])
    prompt, answer = CONVERSATIONS[0], [{"role": "assistant", "content": "Ho"}]
    plain = opened.ids(prompt, True), opened.ids(prompt + answer)
    opened.tokenizer.chat_template = before + opened.tokenizer.chat_template
    assert (opened.ids(prompt, True), opened.ids(prompt + answer)) == plain and plain[1].count(opened.bos[0]) == 1


@pytest.mark.slow
def test_llama_cpp_and_transformers_read_the_same_from_a_gguf_file(trained, merged_folder, tmp_path):
    pytest.importorskip("convert_hf_to_gguf", reason="the extra export is not installed")
    pytest.importorskip("llama_cpp", reason="the extra llama-cpp is not installed")
    path = convert.to_gguf(merged_folder, tmp_path / "model-f16.gguf", "f16")
    ours, theirs = engines.Transformers(path, trained.config), engines.opened(path, trained.config)
    assert "llama.cpp" in theirs.engine and "not llama.cpp" in ours.engine and ours.eos <= theirs.eos
    for messages in CONVERSATIONS:
        for answering in (True, False):
            assert (ids := ours.ids(messages, answering)) == theirs.ids(messages, answering)
        assert torch.allclose(ours.logits(ids), theirs.logits(ids), atol=0.05)


def test_a_gguf_file_passes_the_gate(trained, tmp_path):
    pytest.importorskip("convert_hf_to_gguf", reason="the extra export is not installed")
    found = export.export(trained.config, trained.adapter, "ollama", tmp_path / "ollama", kind="f16")
    assert found["why"] == [] and found["prompts_equal"] == 1 and found["one_eos"]
    assert "FROM ./model-f16.gguf" in (tmp_path / "ollama" / "Modelfile").read_text()


@pytest.fixture(scope="module")
def gguf(merged_folder, tmp_path_factory):
    pytest.importorskip("convert_hf_to_gguf", reason="the extra export is not installed")
    return convert.to_gguf(merged_folder, tmp_path_factory.mktemp("gguf") / "model-f16.gguf", "f16")


def template_in_the_file(path):
    old, new = b"<|im_start|>' + m['role']", b"### " + b" " * 8 + b"' + m['role']"
    assert path.read_bytes().count(old) == 1 and len(old) == len(new)
    path.write_bytes(path.read_bytes().replace(old, new))


def eos_in_the_file(path):
    from gguf import GGUFReader

    field = GGUFReader(path, "r+").fields["tokenizer.ggml.eos_token_id"]
    field.parts[field.data[0]][0] = 0


@pytest.mark.parametrize(
    ("spoil", "why"),
    [(lambda path: None, ""), (template_in_the_file, "other token ids"), (eos_in_the_file, "exactly one EOS")],
)
def test_a_spoiled_gguf_file_is_not_the_trained_model(spoil, why, gguf, trained, policy, tokenizer, tmp_path):
    path = Path(shutil.copy(gguf, tmp_path))
    spoil(path)
    found = measured(trained, policy, tokenizer, path)
    assert bool(found["why"]) == bool(why) and why in " ".join(found["why"])


CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Ho"), ("user", "{{ x }}\n<b>"))],
]
DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"


def as_ollama_writes(modelfile, messages):
    """What Ollama makes of our TEMPLATE: the range over the messages, a default system turn put in front."""
    template = modelfile.split('TEMPLATE """')[1].split('"""')[0]
    system = modelfile.split('SYSTEM """')[1].split('"""')[0] if "SYSTEM" in modelfile else None
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    head, body = template.split("{{- range .Messages }}")
    body, tail = body.split("{{ end }}")
    written = [body.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in messages]
    return head.rstrip() + "".join(written) + tail


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("before", ["", DEFAULT])
def test_the_modelfile_writes_what_the_chat_template_writes(tokenizer, tiny_folder, before, messages):
    own = models.AutoTokenizer.from_pretrained(str(tiny_folder))
    own.chat_template = before + tokenizer.chat_template
    made = convert.modelfile(own, "x.gguf")
    right = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert as_ollama_writes(made, messages) == right
    assert 'PARAMETER stop "<|im_end|>"' in made
    assert "PARAMETER repeat_penalty 1\n" in made, "else Ollama's own acts"


@pytest.mark.parametrize(
    "change", [("<|im_start|>", "### "), ("m['content']", "m['content'] | trim | upper"), ("assistant\n", "model\n")]
)
def test_a_template_that_is_not_chatml_is_not_translated(tokenizer, tiny_folder, change):
    own = models.AutoTokenizer.from_pretrained(str(tiny_folder))
    own.chat_template = tokenizer.chat_template.replace(*change)
    with pytest.raises(ModelUnsuitableError, match="not ChatML"):
        convert.modelfile(own, "x.gguf")


@pytest.mark.parametrize(
    ("stderr", "error", "cause"),
    [
        ("Write: 1%|#  | 1/9\rWrite: 4%|# | 4/9\nOSError: [Errno 28] No space left on device", ArtifactError,
         "could not be written (OSError: [Errno 28] No space left on device)"),
        ("OSError: 4 requested and 0 written\nWriting: 47%|####  | 4k/9k", ArtifactError, "4 requested and 0 written"),
        ("Write: 4%|##  | 4/9\nValueError: Model X is not supported", ModelUnsuitableError, "Model X is not supported"),
    ],
)  # fmt: skip
def test_a_converter_that_fails_is_told_by_its_reason_and_not_by_its_progress_bar(stderr, error, cause, tmp_path):
    program = [sys.executable, "-c", f"import sys; sys.exit({stderr!r})"]
    with pytest.raises(error) as caught:
        convert._run(program, tmp_path / "model.gguf")
    assert cause in caught.value.cause and "|" not in caught.value.cause


# --- elsewhere ----


@pytest.mark.end_to_end
@pytest.mark.parametrize("keep", [(), ("k_proj", "v_proj", r"model\.layers\.(0)\.")])
def test_the_lines_of_the_model_card_load_the_adapter_without_this_package(keep, tiny_folder, tokenizer, tmp_path):
    run = trained_run(tiny_folder, tokenizer, tmp_path, max_steps=6, learning_rate=5e-2, keep_16bit=keep)
    code = (run.adapter / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "dpo_tutorial" not in code and str(tiny_folder.parent) not in code
    os.symlink(tiny_folder, tmp_path / tiny_folder.name)
    code = code.replace(', "."  #', f", {str(run.adapter)!r}  #") + (
        "import sys\ntorch.save(model(input_ids=torch.arange(3, 40)[None]).logits[0], 'logits')\n"
        "print(sum('bitsandbytes' in type(m).__module__ for m in base.modules() if type(m).__name__ == 'Linear4bit'))\n"
        "print(tokenizer.eos_token, 'dpo_tutorial' in sys.modules)"
    )
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    policy = lora.load_policy(run.config, run.adapter)
    quantized = sum(isinstance(m, bnb.nn.Linear4bit) for m in policy.modules())  # PEFT's wrappers have the same name
    assert done.stdout.split()[-3:] == [str(quantized), "<|im_end|>", "False"]
    apart = (torch.load(tmp_path / "logits") - logits(policy)).abs().max()
    with policy.disable_adapter():
        assert 10 * apart < (logits(policy) - torch.load(tmp_path / "logits")).abs().max(), apart


def test_the_card_says_what_the_base_and_the_loss_were(cfg):
    changed = dataclasses.replace(cfg, sft_weight=1.0, keep_16bit=("v_proj",), lora_alpha=8, max_tokens=96)
    record = {"base": {"name": "base", "pin": "p", "revision": None, "storage": "NF4"}, "history": {"train": []}}
    record |= {"pairs": {"number": 1, "sha256": "0"}, "config": changed.identity(), "versions": {}}
    text = card.model_card(changed, record | {"hardware": {"cores": 2}})
    for words in ("plus 1 x the NLL of the chosen answers", "NF4; as they were: v_proj", "alpha 8", "96 tokens"):
        assert words in text
    robust = dataclasses.replace(cfg, loss_type="robust")
    assert "label smoothing" not in text and "label smoothing 0.1" in card.method(robust)


# --- chat ----


def test_both_stream_the_greedy_answers_that_generate_gives(trained, policy, tokenizer):
    from dpo_tutorial.comparing import generation

    talk = chat.Chat(trained.config, policy, tokenizer)
    seen, done = zip(*talk.ask("Why is the sky blue?"), strict=True)
    prompt = [{"role": "user", "content": "Why is the sky blue?"}]
    before, after = generation.answers_of_both(trained.config, policy, tokenizer, [prompt])
    assert [seen[-1][who].strip() for who in ("base", "policy")] == [before[0]["text"], after[0]["text"]]
    assert len(seen) > 2 and before != after and done == (False,) * (len(done) - 1) + (True,)
    heat = talk.heat()
    assert "".join(text for text, _ in heat["policy"]).startswith(seen[-1]["policy"])
    assert sum(r for _, r in heat["policy"]) > sum(r for _, r in heat["base"]), "each likes its own answer better"


def test_each_goes_on_in_a_conversation_of_its_own(trained, policy, tokenizer):
    talk = chat.Chat(trained.config, policy, tokenizer)
    *_, (first, _) = talk.ask("Why is the sky blue?")
    list(talk.ask("And at night?"))
    assert first["base"] != first["policy"]
    for who, answer in first.items():
        words = zip(("user", "assistant", "user"), ("Why is the sky blue?", answer, "And at night?"), strict=True)
        turns = [{"role": role, "content": text} for role, text in words]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert talk.last[who][0] == asked


def test_an_answer_ends_at_each_token_that_the_checkpoint_names(trained, policy, tokenizer, monkeypatch):
    talk = chat.Chat(trained.config, policy, tokenizer)
    list(talk.ask("Why is the sky blue?"))
    _, written = talk.last["policy"]
    monkeypatch.setattr(policy.generation_config, "eos_token_id", written[2])  # as Llama 3 ends a text and a turn
    again = chat.Chat(trained.config, policy, tokenizer)
    list(again.ask("Why is the sky blue?"))
    assert again.last["policy"][1] == written[: written.index(written[2]) + 1]


def test_a_merged_folder_answers_as_the_policy_does(trained, policy, tokenizer, merged_folder):
    tokens = {"MAX_NEW_TOKENS": str(trained.config.max_new_tokens)}
    alone = chat.opened("", str(merged_folder), tokens)
    both = chat.Chat(trained.config, policy, tokenizer)
    *_, (said, done) = alone.ask("Why is the sky blue?")
    *_, (beside, _) = both.ask("Why is the sky blue?")
    assert said == {"merged": beside["policy"]} and done and alone.heat() == {}
    with pytest.raises(ArtifactError, match="no merged model"):
        chat.opened("", str(trained.adapter), tokens)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["chat", "--adapter", "a", "--model", "m"], "no --url is given"),
        (["export", "--adapter", "a", "--to", "merged", "--kind", "f16"], "--to merged writes none"),
    ],
)
def test_options_that_would_be_ignored_are_refused(words, cause, capsys):
    assert cli.main(words) == 1 and cause in capsys.readouterr().err


def test_the_environment_sets_the_compute_type_of_an_export(trained, monkeypatch):
    assert merge.config_of(trained.adapter, {}, "fp32").dtype == "fp32"
    monkeypatch.setenv("DPO_TUTORIAL_DTYPE", "bf16")
    assert merge.config_of(trained.adapter, {}, "fp32").dtype == "bf16"


@pytest.mark.parametrize("text", ["\x1b[31mred", "\x9b2J", "a\rb", "\x07", "\u202eright", "\x1b]0;title\x07"])
def test_text_of_a_model_never_controls_the_terminal(text, capsys):
    chat.Columns().show({"base": text, "policy": text + "\nnext"}, True)
    shown = capsys.readouterr().out
    assert "next" in shown and shown.replace("\n", "").isprintable()


def test_columns_show_each_line_once_and_all_of_both_texts(capsys):
    columns, left, right = chat.Columns(), "one two three " * 9, "four"
    for n in range(0, len(left) + 1, 5):
        columns.show({"base": left[:n], "policy": right[:n]}, False)
    columns.show({"base": left, "policy": right}, True)
    head, rule, *lines = capsys.readouterr().out.splitlines()
    assert [name.strip() for name in head.split("|")] == ["base", "policy"] and set(rule) == {"-", " ", "|"}
    assert " ".join(line.split("|")[0].strip() for line in lines) == left.strip()
    assert "".join(line.split("|")[1].strip() for line in lines) == right


QUESTIONS = "/heat\nWhat is the capital of France?\n/heat\n/quit\nnever asked\n"


def test_the_command_answers_over_a_pipe_shows_the_token_rewards_and_ends(trained, monkeypatch, capfd):
    there, here = os.pipe()
    os.write(here, QUESTIONS.encode())
    os.close(here)
    with open(there) as questions:
        monkeypatch.setattr(sys, "stdin", questions)
        assert cli.main(words("chat", trained)) == 0
    said = capfd.readouterr().out
    assert said.count("\n> ") == 4, "nothing is read after /quit"
    assert " | " in said and "policy: reward " in said and "[+" in said and "\x1b" not in said
