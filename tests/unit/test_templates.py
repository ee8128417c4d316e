"""What a template leaves open: the token that ends a turn, thinking, the date. TRL, our cut and generation agree."""

import copy
import dataclasses
import datetime
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import CHATML, TEXTS, conversations, pair
from datasets import Dataset
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from dpo_tutorial.cli import doctor
from dpo_tutorial.comparing import generation
from dpo_tutorial.loading import models, templates
from dpo_tutorial.pairs import encoding, row_checks

OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
#: Written for these tests: each has the property that its families have, and no more.
TEMPLATES = {
    "chatml": CHATML,
    "gemma": "{% for m in messages %}{{ '<turn>' + m['role'] + '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}",
    "phi": "{% for m in messages %}{{ '<turn>' + m['role'] + '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% else %}{{ eos_token }}{% endif %}",
    "mistral": "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    "thinking": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    "dated": "{% set day = '%d %b %Y' %}{% if date_string is not defined %}"
    "{% set date_string = strftime_now(day) %}{% endif %}{{ 'Today: ' + date_string + '\n' }}" + CHATML,
}
ENDS = {"gemma": "<end_of_turn>", "phi": "<end_of_turn>", "mistral": "<|endoftext|>"}
ASK, ANSWER = [{"role": "user", "content": "Why?"}], [{"role": "assistant", "content": "So."}]


def family(tokenizer, name, **changes):
    """A tokenizer with one of `TEMPLATES`, whose EOS ends a document, not a turn."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    made.add_tokens(AddedToken("<end_of_turn>", special=changes.pop("special", True)))
    made.eos_token, made.chat_template = changes.pop("eos_token", "<|endoftext|>"), TEMPLATES[name]
    return made


@pytest.fixture(params=TEMPLATES)
def settled(request, tokenizer):
    made = family(tokenizer, request.param)
    templates.settle(made)
    return request.param, made


def test_the_token_behind_an_answer_is_eos_and_is_trained(settled):
    name, tokenizer = settled
    assert tokenizer.eos_token == ENDS.get(name, "<|im_end|>")
    _, after = encoding.encode(tokenizer, ASK, ANSWER)
    assert after.count(tokenizer.eos_token_id) == 1
    found = row_checks.audit_split([pair(*texts) for texts in TEXTS], tokenizer, 10_000)
    assert len(found.kept) == 4 and not found.dropped


def test_settling_twice_changes_nothing_and_survives_saving(settled, tmp_path):
    _, tokenizer = settled
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    templates.settle(again)
    assert (again.chat_template, again.eos_token) == (tokenizer.chat_template, tokenizer.eos_token)
    assert templates.template_options(again) == templates.template_options(tokenizer)


def test_the_ids_that_trl_trains_on_are_the_ids_that_we_cut(settled, tiny_folder, tmp_path):
    _, tokenizer = settled
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None, save_strategy="no")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    rows = conversations()
    trainer = DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    for made, row in zip(trainer.train_dataset, rows, strict=True):
        for side in ("chosen", "rejected"):
            ours = encoding.encode(tokenizer, row["prompt"], row[side])
            assert ours == (made["prompt_ids"], made[f"{side}_ids"])


def test_only_what_a_template_leaves_open_is_written_into_it(tokenizer):
    plain = copy.deepcopy(tokenizer)
    templates.settle(plain)
    assert plain.chat_template == CHATML and templates.template_options(plain) == {"turn_end": "<|im_end|>"}


def test_a_template_that_thinks_is_told_not_to_in_training_and_generation_unless_the_caller_says_so(tokenizer):
    thinking = family(tokenizer, "thinking")
    templates.settle(thinking)
    before, after = encoding.encode(thinking, ASK, ANSWER)
    assert thinking.decode(before).endswith("assistant\n<think>\n\n</think>\n\n")
    assert thinking.decode(after) == "So.<|im_end|>\n"
    asked = thinking.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert asked.endswith("assistant\n")
    assert templates.template_options(thinking) == {"turn_end": "<|im_end|>", "enable_thinking": False}


def test_tomorrows_tokens_are_todays(tokenizer, monkeypatch):
    dated = family(tokenizer, "dated")
    templates.settle(dated)
    text = dated.apply_chat_template(ASK, tokenize=False)
    assert text.startswith("Today: 26 Jul 2024\n") and f"{datetime.date.today():%Y}" not in text.partition("\n")[0]
    assert templates.template_options(dated)["date"] == "2024-07-26"
    assert dated.apply_chat_template(ASK, tokenize=False, date_string="now").startswith("Today: now\n")


@pytest.mark.parametrize("code", ["Y", "y", "m", "d", "B", "b", "A", "a", "j", "H", "I", "M", "S", "p"])
def test_each_part_of_a_date_is_the_fixed_days(tokenizer, code):
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('<%" + code + ">') }}"
    templates.settle(dated)
    assert dated.apply_chat_template(ASK, tokenize=False) == f"{templates.DATE:<%{code}>}"


def test_a_first_line_break_and_indent_of_a_template_stay(tokenizer):
    odd = copy.deepcopy(tokenizer)
    odd.chat_template = "\n  {% if enable_thinking %}x{% endif %}y"
    before = odd.apply_chat_template(ASK, tokenize=False)
    templates.settle(odd)
    assert odd.apply_chat_template(ASK, tokenize=False) == before


def test_an_end_of_turn_that_is_an_added_word_but_not_special_counts(tokenizer):
    made = family(tokenizer, "gemma", special=False)
    templates.settle(made)
    assert made.eos_token == "<end_of_turn>"


def test_a_tokenizer_without_eos_takes_the_end_of_its_turns(tokenizer):
    made = family(tokenizer, "gemma", eos_token=None)
    templates.settle(made)
    assert made.eos_token == "<end_of_turn>"


def test_a_template_that_takes_one_round_only_names_its_end_too(tokenizer):
    made = family(tokenizer, "gemma")
    made.chat_template = "{% if messages | length > 2 %}{{ raise_exception('one') }}{% endif %}" + made.chat_template
    assert templates.turn_end(made) == "<end_of_turn>"


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m['content'] }}{% endfor %}", "{{ bos_token }}A"])
def test_a_template_that_names_no_end_leaves_eos(tokenizer, template):
    made = family(tokenizer, "gemma")
    made.chat_template = template
    assert templates.turn_end(made) == "<|endoftext|>"


def test_the_default_of_several_named_templates_is_settled(tokenizer):
    made = family(tokenizer, "gemma")
    made.chat_template = {"default": TEMPLATES["thinking"], "tool_use": "{{ 'tools' }}"}
    templates.settle(made)
    assert made.eos_token == "<|im_end|>" and encoding.encode(made, ASK, ANSWER)[1]


def checkpoint(folder, tiny_folder, tokenizer):
    for path in tiny_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | {"vocab_size": len(tokenizer)}))
    tokenizer.save_pretrained(folder)
    return folder


def test_loading_settles_and_the_doctor_shows_it(cfg, tokenizer, tiny_folder, tmp_path):
    for name, words in (("gemma", "one <end_of_turn> per answer"), ("thinking", "enable_thinking=False")):
        (tmp_path / name).mkdir()
        folder = checkpoint(tmp_path / name, tiny_folder, family(tokenizer, name))
        changed = dataclasses.replace(cfg, model=str(folder))
        assert models.load_tokenizer(changed).eos_token == ENDS.get(name, "<|im_end|>")
        assert words in doctor.template(changed)


def test_generation_stops_at_the_end_of_a_turn_and_at_the_checkpoints_own_end(cfg, tokenizer):
    made = family(tokenizer, "chatml")
    templates.settle(made)
    turn, text = made.eos_token_id, made.pad_token_id

    class Writes:
        """Writes one token and one end, after which `generate` pads."""

        device = "cpu"

        def __init__(self, end, own):
            self.end, self.generation_config = end, SimpleNamespace(eos_token_id=own)

        def eval(self):
            pass

        def generate(self, input_ids, eos_token_id, **_):
            assert set(eos_token_id) == {turn, text}
            return torch.cat([input_ids, torch.tensor([[50, self.end, text, text]])], dim=1)

    for end in (turn, text):
        for own in (text, [text, turn]):
            (answer,) = generation.generate(cfg, Writes(end, own), made, [ASK])
            assert answer["finished"] and answer["tokens"] == 1
