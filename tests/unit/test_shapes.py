"""What a row may look like: each layout of the page becomes what stands there, each near miss gets a reason."""

import json
import re
from pathlib import Path

import pytest
from conftest import TEXTS, pair
from hypothesis import example, given
from hypothesis import strategies as st

from dpo_tutorial.errors import ConfigError
from dpo_tutorial.pairs import row_checks, shapes, sources, splits

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
#: (row, layout in words, what it becomes) of each layout that the page shows.
SHOWN = re.findall(r"```json\n(.*?)```\n\n(.*?):\n\n```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def said(made: dict) -> str:
    """A pair as the page writes it: what the sides share, the two answers, the scores where there are any."""
    turns = [f"{m['role']}: {m['content']!r}" for m in made["chosen"][:-1]]
    turns += [f"{side}: {made[side][-1]['content']!r}" for side in ("chosen", "rejected")]
    scores = [f"{score:g}" for score in (made["score_chosen"], made["score_rejected"]) if score is not None]
    return "\n".join(turns + ["scores: " + ", ".join(scores)] * bool(scores)) + "\n"


@pytest.mark.parametrize(("row", "layout", "becomes"), SHOWN, ids=[words for _, words, _ in SHOWN])
def test_each_layout_that_the_page_shows_becomes_what_stands_there_and_is_fit_to_train_on(row, layout, becomes):
    made, words = shapes.to_pair(json.loads(row))
    assert words == layout and said(made) == becomes
    assert row_checks.row_problem(made) is None
    assert made["prompt"] == next(m["content"] for m in made["chosen"] if m["role"] == "user")


def test_the_page_shows_every_layout_once():
    assert len({layout for _, layout, _ in SHOWN}) == len(SHOWN) >= 12


def test_the_page_lists_the_names_that_count_in_their_order():
    page = PAGE.read_text(encoding="utf-8")
    pairs, prompts, systems, scores = re.search(
        r"A pair is named (.*?)\. The prompt is named (.*?); a system turn (.*?)\. Scores are named (.*?)\. ", page
    ).groups()
    assert tuple(re.findall(r"`(\w+)` and `(\w+)`", pairs)) == shapes.ANSWERS
    assert tuple(re.findall(r"`(\w+)`", prompts)) == shapes.PROMPTS
    assert tuple(re.findall(r"`(\w+)`", systems)) == shapes.SYSTEMS
    assert (*re.findall(r"`([\w-]+)` and `([\w-]+)`", scores), ("margin",)) == shapes.SCORES
    assert scores.endswith("or there is one `margin`")
    table = re.findall(r"^\| (\w+) \| (`.*`) \|$", page, re.MULTILINE)
    assert {split: tuple(re.findall(r"`(\w+)`", names)) for split, names in table} == splits.SPLIT_NAMES


def test_a_pair_is_brought_to_itself():
    row = pair(*TEXTS[0])
    made, _ = shapes.to_pair(row)
    assert made == row and shapes.to_pair(made)[0] == made


def test_the_repositorys_own_rows_are_brought_to_themselves():
    for name in sources.EMBEDDED_SPLITS:
        for row in sources.embedded_rows(name):
            made, _ = shapes.to_pair(row)
            assert row_checks.extract(made) == row_checks.extract(row)
            assert made["score_chosen"] == row["score_chosen"] and made["prompt_id"] == row["prompt_id"]


# --- near misses ----

TEXT = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
ASK, GOOD, BAD = ({"role": r, "content": t} for r, t in (("user", "Why?"), ("assistant", "So."), ("assistant", "No.")))
SYSTEM = {"role": "system", "content": "Be brief."}
LISTS = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}

NEAR_MISSES = [
    (TEXT | {"prompt": None}, "missing column", "prompt is absent or null"),
    (TEXT | {"chosen": None}, "missing column", "chosen is absent or null"),
    ({"prompt": "Why?", "chosen": "So."}, "missing column", "rejected"),
    ({"prompt": "Why?", "answer": "So."}, "missing column", "chosen"),
    ({"chosen": "So.", "rejected": "No."}, "missing column", "no prompt"),
    ({"task": "Why is it?", "chosen": "I am.", "rejected": "I do."}, "missing column", "task may be it"),
    ({"input": {"text": "Why?"}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}, "missing column", "input"),
    (TEXT | {"chosen": 5}, "wrong type", "one is text and one is not"),
    (TEXT | {"chosen": True, "rejected": False}, "wrong type", "chosen is true or false"),
    (TEXT | {"chosen": 5, "rejected": 6}, "wrong type", "chosen is a number"),
    (TEXT | {"chosen": ["So."], "rejected": ["No."]}, "wrong type", "chosen is a list of text"),
    (TEXT | {"rejected": [BAD]}, "wrong type", "one is text and one is not"),
    (TEXT | {"prompt": 7}, "wrong type", "prompt is a number"),
    (TEXT | {"system": 7}, "wrong type", "system"),
    (LISTS | {"prompt": [ASK | {"content": 7}]}, "wrong type", "content a number"),
    (LISTS | {"chosen": [{"content": "So."}]}, "wrong type", "role is null"),
    ({"instruction": "Add.", "input": 7, "chosen": "So.", "rejected": "No."}, "wrong type", "input is a number"),
    ([TEXT], "wrong type", "a list of an object with prompt, chosen, rejected"),
    ("a line", "wrong type", "text"),
    (None, "wrong type", "null"),
    (TEXT | {"chosen-rating": "N/A", "rejected-rating": 3}, "wrong type", "chosen-rating is text"),
    (TEXT | {"score_chosen": None, "score_rejected": 3}, "missing column", "score_chosen is null"),
    (TEXT | {"score_chosen": 3}, "missing column", "score_rejected"),
    (
        LISTS | {"chosen": [ASK, GOOD], "rejected": [ASK, BAD], "prompt": [SYSTEM, ASK]},
        "prompts differ",
        "prompt holds",
    ),
    (TEXT | {"chosen": json.dumps([ASK, GOOD]), "rejected": str([ASK, BAD])}, "wrong type", "spells out messages"),
    (TEXT | {"margin": True}, "wrong type", "margin is true or false"),
    (TEXT | {"margin": float("nan")}, "wrong type", "margin"),
    (TEXT | {"margin": 10**400}, "wrong type", "margin"),
    (LISTS | {"chosen": [CALL, {"role": "tool", "content": "5"}, GOOD]}, "tool call", "chosen"),
    (LISTS | {"prompt": [ASK, {"role": "tool", "content": "5"}]}, "tool call", "prompt"),
    (LISTS | {"rejected": [BAD | {"function_call": {"name": "f"}}]}, "tool call", "rejected"),
    (LISTS | {"conversations": 1, "prompt": [{"from": "observation", "value": "5"}]}, "tool call", "prompt"),
    (LISTS | {"prompt": [ASK | {"content": [{"type": "image", "image": "x"}]}]}, "tool call", "no text"),
    (LISTS | {"prompt": [ASK | {"content": [{"type": "image_url", "text": "x"}]}]}, "tool call", "no text"),
]


@pytest.mark.parametrize(("row", "reason", "words"), NEAR_MISSES, ids=[f"{r}: {w}" for _, r, w in NEAR_MISSES])
def test_a_near_miss_has_a_reason_and_says_what_was_found(row, reason, words):
    with pytest.raises(shapes.NotAPair) as caught:
        shapes.to_pair(row)
    assert caught.value.reason == reason in row_checks.REASONS and words in caught.value.detail


#: Brought to a pair by shape, and then dropped by what is in it.
DROPPED = [
    (TEXT | {"prompt": ""}, "empty turn"),
    (TEXT | {"rejected": " "}, "empty answer"),
    (TEXT | {"margin": 0}, "tied scores"),
    (TEXT | {"margin": -1.5}, "inverted scores"),
    (LISTS | {"prompt": [ASK, GOOD]}, "roles out of order"),
    ({"chosen": [ASK, GOOD], "rejected": [ASK | {"content": "Who?"}, BAD]}, "prompts differ"),
    ({"chosen": "The sky is", "rejected": "The sky is blue"}, "empty answer"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}, "prompts differ"),
    (LISTS | {"prompt": [{"role": "human", "content": "Why?"}]}, "bad role"),
    (LISTS | {side: [turn | {"role": "model"}] for side, turn in (("chosen", GOOD), ("rejected", BAD))}, "bad role"),
    (LISTS | {"chosen": [GOOD, ASK, BAD]}, "prompts differ"),
]


@pytest.mark.parametrize(("row", "reason"), DROPPED, ids=[reason for _, reason in DROPPED])
def test_what_is_a_pair_by_shape_is_judged_by_what_it_holds(row, reason):
    assert row_checks.row_problem(shapes.to_pair(row)[0]) == reason


# --- where the answers begin ----


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),
        ("Add 1 and 2: 3", "Add 1 and 2: 30", "Add 1 and 2:"),
        ("Q: Why?\nA: So.", "Q: Why?\nA: No.", "Q: Why?\nA:"),
        ("問：天は？答：青", "問：天は？答：緑", "問：天は？答："),
        ("Say:\n\nyes", "Say:\n\nno", "Say:\n\n"),
    ],
)
def test_a_prompt_within_both_texts_ends_where_a_word_ends_and_nothing_is_lost(chosen, rejected, prompt):
    made, _ = shapes.to_pair({"chosen": chosen, "rejected": rejected})
    assert made["prompt"] == prompt
    assert [prompt + made[side][-1]["content"] for side in ("chosen", "rejected")] == [chosen, rejected]


@pytest.mark.parametrize("prompt", ["\n\nHuman: Why?\n\nAssistant:", "\n\nHuman: Why?", "Human: Why?\n\nAssistant: "])
def test_turns_written_as_human_and_assistant_are_found_in_a_prompt_too(prompt):
    made, _ = shapes.to_pair({"prompt": prompt, "chosen": "So.\n\n", "rejected": " No."})
    assert made["chosen"] == [ASK, GOOD | {"content": "So.\n\n"}]
    assert made["rejected"][-1]["content"].strip() == "No." and made["prompt"] == "Why?"


@pytest.mark.parametrize("more", [{"messages": [ASK, GOOD]}, {"prompt": [ASK]}, {"prompt": "Why?"}, {}])
def test_whole_conversations_are_taken_whole_whatever_stands_beside_them(more):
    made, _ = shapes.to_pair(more | {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]})
    assert (made["chosen"], made["rejected"]) == ([ASK, GOOD], [ASK, BAD])


def test_a_prompt_that_begins_with_the_word_human_is_text():
    prompt = "Human: a word of five letters. Which tongue does it come from?"
    assert shapes.to_pair(TEXT | {"prompt": prompt})[0]["prompt"] == prompt


ODD = [" a ", "\n", "<b>1</b>", "2024-01-01", "007", "é", "e\u0301", "a\u202eb", "\ufeffx", "a\r\nb", "🙂"]


@pytest.mark.parametrize("text", ODD)
def test_a_text_stays_as_it_is(text):
    for row in (
        TEXT | {"prompt": text, "chosen": text + "1", "rejected": text + "2"},
        {"prompt": [ASK | {"content": text}], "chosen": [GOOD | {"content": text + "1"}], "rejected": [BAD]},
        {"conversations": [{"from": "human", "value": text}], "chosen": {"from": "gpt", "value": text + "1"}}
        | {"rejected": {"from": "gpt", "value": text + "2"}},
        {"chosen": f"\n\nHuman: {text}\n\nAssistant: {text}1", "rejected": f"\n\nHuman: {text}\n\nAssistant: 2"},
        {"prompt": [ASK | {"content": [{"type": "text", "text": part} for part in (text[:1], text[1:])]}]}
        | {"chosen": [GOOD | {"content": text + "1"}], "rejected": [BAD]},
    ):  # fmt: skip
        made, _ = shapes.to_pair(row)
        assert made["prompt"] == text and made["chosen"][-1]["content"] == text + "1"


# --- by hand ----


def test_a_map_by_hand_says_where_the_pair_lies_and_overrules_the_rows_own_names():
    by_hand = shapes.columns("prompt=task, chosen = a,rejected=b,system=s,score_chosen=x,score_rejected=y,prompt_id=n,")
    row = {"task": "Why?", "a": "So.", "b": "No.", "s": "Be brief.", "x": 2, "y": 1, "n": 7, "chosen": "not me"}
    made, _ = shapes.to_pair(row, by_hand)
    assert said(made) == "system: 'Be brief.'\nuser: 'Why?'\nchosen: 'So.'\nrejected: 'No.'\nscores: 2, 1\n"
    assert made["prompt_id"] == "7"
    with pytest.raises(shapes.NotAPair, match="missing column"):
        shapes.to_pair(TEXT, {"chosen": "nowhere"})


def test_an_empty_map_is_no_map():
    assert shapes.columns("") == {} == shapes.columns(" , ")


@pytest.mark.parametrize("text", ["prompt", "prompt=", "=question", "answer=good", "chosen=a,chosen=b", "chosen:good"])
def test_a_map_that_is_none_is_an_error_that_lists_the_names(text):
    with pytest.raises(ConfigError) as caught:
        shapes.columns(text)
    assert repr(text) in caught.value.cause and "score_rejected" in caught.value.fix


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"task": "Why?", "better": "So.", "worse": "No."}, 'DATA_COLUMNS="prompt=task,chosen=better,rejected=worse"'),
        ({"question": "Why?", "preferred": "So.", "dispreferred": 1}, "chosen=preferred,rejected=dispreferred"),
        ({"a": [ASK], "b": {"x": 1}, "c": None}, "a (a list of an object with role, content), b (an object with x), c"),
        ({"a": 1}, 'DATA_COLUMNS="prompt=…,chosen=…,rejected=…"'),
        ([], "an empty list, not an object"),
        ({}, "nothing in it"),
    ],
)
def test_a_row_that_is_no_pair_is_described_with_the_map_that_would_do(row, words):
    assert words in shapes.describe(row)


# --- columns of a table that other rows fill ----


@pytest.mark.parametrize(
    "empty",
    [dict.fromkeys(names) for names in shapes.ANSWERS[1:] + shapes.SCORES] + [dict.fromkeys(shapes.PROMPTS[1:])],
)
def test_a_column_that_is_null_is_as_good_as_absent(empty):
    assert shapes.to_pair(empty | TEXT) == shapes.to_pair(TEXT)
    other = {"preferred": "So.", "dispreferred": "No.", "prompt": "Why?"}
    assert shapes.to_pair({"chosen": None, "rejected": None} | other)[0] == shapes.to_pair(TEXT)[0]


def test_answers_of_several_turns_follow_a_prompt():
    again = [GOOD, ASK | {"content": "And?"}]
    made, _ = shapes.to_pair(TEXT | {"chosen": [*again, GOOD], "rejected": [*again, BAD]})
    assert made["chosen"] == [ASK, *again, GOOD] and made["rejected"] == [ASK, *again, BAD]


# --- anything ----

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
_words = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "Why?", "So.", "", "\n\nHuman: a"])
_part = st.fixed_dictionaries({}, optional={"type": st.sampled_from(["text", "image", 3]), "text": _words | _json})
_turn = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("role", "from"), _words | _json)
    | dict.fromkeys(("content", "value"), _words | st.lists(_part, max_size=2) | _json) | {"tool_calls": _json},
)  # fmt: skip
_side = _words | _turn | st.lists(_turn | _json, max_size=3) | _json
_names = [*shapes.PROMPTS, *shapes.SYSTEMS, "id", "prompt_id", *(n for p in shapes.ANSWERS + shapes.SCORES for n in p)]
_wild = st.dictionaries(st.sampled_from(_names), _side, max_size=6)
_near = st.fixed_dictionaries(
    {"chosen": _side, "rejected": _side}, optional={"prompt": _side, "system": _side, "margin": _side}
)
_DEEP = json.loads("[" * 400 + "]" * 400)


@given(row=_near | _wild | _json)
@example(row=TEXT | {"chosen": _DEEP, "rejected": _DEEP})
@example(row={"prompt": _DEEP, "chosen": "a", "rejected": "b"})
@example(row=LISTS | {"prompt": [{"role": ["user"], "content": [["a"]]}]})
def test_whatever_json_comes_it_is_a_pair_or_has_a_reason(row):
    assert shapes.describe(row)
    before = json.dumps(row)
    try:
        made, layout = shapes.to_pair(row)
    except shapes.NotAPair as error:
        assert error.reason in row_checks.REASONS and error.detail
    else:
        assert layout and row_checks.row_problem(made) in {None, *row_checks.REASONS} - {"missing column", "wrong type"}
        assert set(made) == {"prompt_id", *row_checks.COLUMNS}
        for m in made["chosen"] + made["rejected"]:
            assert set(m) == {"role", "content"} and all(isinstance(text, str) for text in m.values())
        assert [type(made[name]) for name in ("prompt_id", "prompt")] == [str, str]
        assert {type(made[name]) for name in ("score_chosen", "score_rejected")} in ({float}, {type(None)})
    assert json.dumps(row) == before


@pytest.mark.parametrize(
    ("more", "alone"),
    [
        ({}, set()),
        ({"history": [["Hi.", "Hello."]], "source": "web"}, {"history", "source"}),
        ({"question": "Another?"}, {"question"}),
        ({"system": "Be brief.", "score_chosen": 2, "score_rejected": 1, "id": 7}, set()),
    ],
)
def test_a_column_that_is_not_read_is_named(more, alone):
    row = {"prompt": "Why?", "chosen": "Because.", "rejected": "Why not."} | more
    assert shapes.to_pair(row) and shapes.left_alone(row) == alone
    assert shapes.left_alone({"good": "a", "ask": "b"} | row, {"chosen": "good", "prompt": "ask"}) == alone
