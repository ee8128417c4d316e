"""The validator: what the template makes of a row, and that any rows at all are kept or dropped once, in any order."""

from __future__ import annotations

import copy
import json
import time
from collections import Counter

import pytest
from conftest import CHATML, TEXTS, pair
from hypothesis import example, given
from hypothesis import strategies as st
from test_data import GOOD, ROW_CASES, assistant, conversation, row_changes, system, user

from dpo_tutorial.pairs import row_checks

WIDE = 10_000  # tokens: nothing is too long
TURN = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + END }}{% endfor %}"
OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def kept_of(rows, found, tokenizer):
    return [row_checks.prepared_row(tokenizer, rows[index]) for index in found.kept]


def prepared(rows, tokenizer, *limits):
    return kept_of(rows, row_checks.audit_split(rows, tokenizer, *limits), tokenizer)


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def ending(text):
    return TURN.replace("END", repr(text)) + OPENING


# --- template ----

#: What a template does wrong, and the reason its rows get. The prompts below have a user turn only.
BROKEN_TEMPLATES = {
    "writes no EOS": (ending("\n"), "template eos"),
    "writes two EOS": (ending("<|im_end|><|im_end|>\n"), "template eos"),
    "writes a word after EOS": (ending("<|im_end|>\nover"), "template eos"),
    "leaves the opening of the turn to the answer": (CHATML.partition("{% if add")[0], "template mask"),
    "leaves an opening in plain text to the answer": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>\n' }}{% endfor %}",
        "template mask",
    ),
    "puts another special token before EOS": (ending("<|endoftext|><|im_end|>\n"), "template mask"),
    "changes the prompt once an answer follows": ("{{ messages | length }} turns: " + CHATML, "template border"),
    "refuses": ("{{ raise_exception('only poems') }}", "template refuses"),
}


@pytest.mark.parametrize("what", BROKEN_TEMPLATES)
def test_every_row_of_a_template_that_is_wrong_is_dropped_by_name_and_up_to_three_are_shown_decoded(tokenizer, what):
    template, reason = BROKEN_TEMPLATES[what]
    found = row_checks.audit_split([pair(*texts) for texts in TEXTS], with_template(tokenizer, template), WIDE)
    assert found.dropped == {reason: 4} and not found.kept
    assert len(found.decoded[reason]) == len(found.examples[reason]) == 3


def test_an_excerpt_shows_the_border_of_prompt_and_answer_and_all_that_the_mask_covers(tokenizer):
    wrong = with_template(tokenizer, ending("<|im_end|><|im_end|>\n"))
    (shown,) = row_checks.audit_split([pair("Add 2 and 3.", "5.", "6.")], wrong, WIDE).decoded["template eos"]
    before, _, after = shown.partition("¦")
    assert before.endswith("<|im_start|>assistant\n") and after == "5.<|im_end|><|im_end|>\n"


def test_the_excerpts_of_a_border_and_of_a_refusal_say_what_happened(tokenizer):
    for what, words in (
        ("changes the prompt once an answer follows", "'1 turns: <|im_start|>user\\nAdd 2 and 3.<|im_end|>"),
        ("refuses", "only poems"),
    ):
        template, reason = BROKEN_TEMPLATES[what]
        (shown,) = row_checks.audit_split(
            [pair("Add 2 and 3.", "5.", "6.")], with_template(tokenizer, template), WIDE
        ).decoded[reason]
        assert words in shown


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        ending("<|im_end|>"),
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] | trim + '<|im_end|>' }}{% endif %}{% endfor %}",
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] + '\n' }}"
        "{% else %}{{ 'A: <think>\n\n</think>\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}",
    ],
    ids=["line break after EOS", "nothing after EOS", "no opening of the answer", "the template thinks first"],
)
def test_the_rows_of_a_template_that_is_right_are_kept(tokenizer, template):
    rows = [pair(*texts) for texts in TEXTS] + [pair("Space?", "  yes \n", "no")]
    assert len(row_checks.audit_split(rows, with_template(tokenizer, template), WIDE).kept) == 5


#: A text that spells a special token, in each place that a row has for one.
SPELLED = {
    "question": conversation([user("How <|im_end|>?")]),
    "earlier answer": conversation([user("a"), assistant("b<|im_start|>"), user("c")]),
    "system turn": conversation([system("<|endoftext|>"), user("c")]),
    "chosen": conversation([user("How?")], chosen="With <|im_end|> in it."),
    "rejected": conversation([user("How?")], rejected="With <|im_start|> in it."),
    "a prompt that was templated before": conversation([user("<|im_start|>user\nHow?<|im_end|>\n")]),
}


@pytest.mark.parametrize("row", SPELLED.values(), ids=SPELLED)
def test_a_text_that_spells_a_special_token_is_dropped_by_its_name_and_spares_the_others(tokenizer, row):
    found = row_checks.audit_split([GOOD, row], tokenizer, WIDE)
    assert found.dropped == {"control token": 1} and len(found.kept) == 1
    assert found.decoded["control token"][0].startswith(("<|im_end|> in ", "<|im_start|> in ", "<|endoftext|> in "))


def test_added_words_that_are_not_special_and_the_unknown_token_are_text(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<think>", "</think>"])
    other.unk_token = "<unk>"
    assert len(row_checks.audit_split([pair("Why?", "<think>a</think> b", "<unk>")], other, WIDE).kept) == 1


@pytest.mark.parametrize("words", ["Why", "wor", "[x](y).*"])
def test_a_special_token_that_looks_like_a_word_or_a_pattern_is_found_as_it_is_written(tokenizer, words):
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": [words]})
    rows = [pair("Why?", "in a word", "no"), pair("Who?", "a [x](y).* b", "no"), pair("How?", "yes", "no")]
    found = row_checks.audit_split(rows, other, WIDE)
    assert [rows[i]["prompt"] for i in found.kept] == [r["prompt"] for r in rows if words not in json.dumps(r)]


# --- length ----


def test_a_row_that_cannot_fit_is_dropped_without_being_tokenized_or_searched(tokenizer, monkeypatch):
    rows = [GOOD, pair("Long?", "word " * 2_400_000, "no"), pair("long " * 2_400_000, "yes", "no")]
    asked = []
    encode = row_checks.encoding.encode
    monkeypatch.setattr(row_checks.encoding, "encode", lambda *a: asked.append(a) or encode(*a))
    start = time.process_time()
    found = row_checks.audit_split(rows, tokenizer, 128)
    assert time.process_time() - start < 0.5  # the two would take seconds
    assert found.dropped == {"too long": 2} and len(asked) == 2, "both answers of the row that fits"
    assert row_checks.prompt_digest([user("Long?")]) in found.prompts, "still held out from later splits"


def test_a_row_of_the_longest_tokens_is_counted_by_its_tokens(tokenizer):
    word = max(tokenizer.get_vocab(), key=lambda token: (token.isalpha() and token.isascii(), len(token)))
    row = pair("a", word * 40, "no")
    made = row_checks.prepared_row(tokenizer, row)
    tokens = made["prompt_tokens"] + made["chosen_tokens"]
    assert row_checks.audit_split([row], tokenizer, tokens).kept == [0]
    assert row_checks.audit_split([row], tokenizer, tokens - 1).dropped == {"too long": 1}


def test_a_row_that_was_read_badly_is_named_by_its_place(tokenizer):
    bad = {"problem": "unreadable line", "place": "my pairs of last week.jsonl, line 7"}
    found = row_checks.audit_split([GOOD, bad, {"place": "x, line 8"}], tokenizer, WIDE)
    assert found.examples == {"unreadable line": [bad["place"]], "missing column": ["x, line 8"]}
    assert found.dropped == {"unreadable line": 1, "missing column": 1}


def test_a_conversation_that_the_template_refuses_spares_the_others(tokenizer):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    rows = [GOOD, conversation([system("Be brief."), user("How?")])]
    found = row_checks.audit_split(rows, with_template(tokenizer, strict), WIDE)
    assert found.dropped == {"template refuses": 1} and len(found.kept) == 1


# --- duplicates ----


def test_which_of_two_duplicates_stays_does_not_depend_on_their_order(tokenizer):
    rows = [pair("Same?", f"yes {i}", "no", prompt_id=str(i)) for i in range(6)]
    kept = [prepared(order, tokenizer, WIDE) for order in (rows, rows[::-1], rows[3:] + rows[:3])]
    assert kept[0] == kept[1] == kept[2] and len(kept[0]) == 1


def test_an_exact_copy_is_a_duplicate(tokenizer):
    found = row_checks.audit_split([GOOD, GOOD, GOOD], tokenizer, WIDE)
    assert len(found.kept) == 1 and found.dropped == {"duplicate prompt": 2}


@pytest.mark.parametrize("order", [1, -1])
def test_a_twin_that_is_dropped_for_another_reason_does_not_take_the_prompt_with_it(tokenizer, order):
    long = pair("Same?", "word " * 200, "no", prompt_id="long")
    rows = [long, pair("same?", "yes", "no", prompt_id="short")][::order]
    found = row_checks.audit_split(rows, tokenizer, 128)
    assert [rows[i]["prompt_id"] for i in found.kept] == ["short"] and found.dropped == {"too long": 1}


# --- any rows ----

_prompts = st.sampled_from(["How?", "HOW? ", "Why?", "Who?"])  # few, so that they meet
_sound = st.builds(pair, _prompts, st.sampled_from(["yes", "maybe", "sure"]), st.sampled_from(["no", "never"]))
_tokens = st.builds(pair, _prompts, st.sampled_from(["word " * 60, "a<|im_end|>b", "c<|im_start|>d"]), st.just("no"))
_bad = st.sampled_from([row for rows in ROW_CASES.values() for row in rows])
_odd = st.builds(lambda base, changes: base | changes, st.sampled_from([GOOD, {}]), row_changes)
_others = st.lists(_tokens | _bad | _odd | st.none(), max_size=6)
_rows = st.tuples(st.lists(_sound, max_size=5), _others).map(lambda parts: parts[0] + parts[1]).flatmap(st.permutations)
_held_out = st.sets(st.sampled_from([row_checks.prompt_digest([user(text)]) for text in ("How?", "Why?")]))


def as_text(rows):
    return Counter(json.dumps(row) for row in rows)


@given(rows=_rows, held_out=_held_out)
@example(rows=[GOOD, None, {}, GOOD | {"prompt_id": "\ud800"}], held_out=set())
def test_any_rows_are_kept_or_dropped_once_and_nothing_raises(tokenizer, rows, held_out):
    found = row_checks.audit_split(rows, tokenizer, 96, held_out)
    assert found.rows == len(rows) == len(found.kept) + sum(found.dropped.values())
    assert list(found.dropped) == [reason for reason in row_checks.REASONS if found.dropped.get(reason)]
    assert {r: len(ids) for r, ids in found.examples.items()} == {r: min(n, 3) for r, n in found.dropped.items()}
    assert set(found.decoded) == {r for r in found.dropped if r.startswith("template") or r == "control token"}
    json.dumps([found.examples, found.decoded], ensure_ascii=False).encode()  # can be written
    keys = [row_checks.prompt_digest(row["prompt"]) for row in kept_of(rows, found, tokenizer)]
    assert len(set(keys)) == len(keys) and not set(keys) & held_out and set(keys) <= found.prompts


@given(rows=_rows, held_out=_held_out, shuffle=st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_neither_what_is_kept_nor_what_is_counted(tokenizer, rows, held_out, shuffle):
    found, mixed = row_checks.audit_split(rows, tokenizer, 96, held_out), list(rows)
    shuffle.shuffle(mixed)
    other = row_checks.audit_split(mixed, tokenizer, 96, held_out)
    assert as_text(kept_of(mixed, other, tokenizer)) == as_text(kept_of(rows, found, tokenizer))
    assert other.dropped == found.dropped and other.prompts == found.prompts


@given(rows=_rows)
def test_each_prompt_that_has_a_sound_row_keeps_one(tokenizer, rows):
    alone = [row for one in rows for row in prepared([one], tokenizer, 96)]
    kept = prepared(rows, tokenizer, 96)
    once, again = ({row_checks.prompt_key(row["prompt"]) for row in rows} for rows in (alone, kept))
    assert once == again
    assert not as_text(kept) - as_text(alone), "a kept row is one that stands alone"


def test_the_answer_that_is_kept_is_the_one_that_was_given(tokenizer):
    (kept,) = prepared([conversation([user("a"), assistant("b"), user("c")])], tokenizer, WIDE)
    assert [m["content"] for m in kept["prompt"]] == ["a", "b", "c"]
    assert kept["chosen"] == [assistant("Good answer.")] and kept["rejected"] == [assistant("Bad answer.")]
