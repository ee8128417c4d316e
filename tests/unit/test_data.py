"""Preference data: reading a source, choosing splits, one reason per dropped row, and the repository's own pairs."""

from __future__ import annotations

import copy
import dataclasses
import errno
import hashlib
import itertools
import json
import re
from collections import Counter
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from conftest import TEXTS, pair
from datasets import Dataset, DatasetDict
from hypothesis import example, given
from hypothesis import strategies as st

from dpo_tutorial.errors import DataError
from dpo_tutorial.loading import templates
from dpo_tutorial.pairs import encoding, house_style, prepare, row_checks, sources, splits


@pytest.fixture(scope="module", autouse=True)
def own_datasets_cache(tmp_path_factory):
    """Keep what `datasets` builds from these files out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets-cache")))
        yield


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def conversation(turns, chosen="Good answer.", rejected="Bad answer.", **changes):
    """A row whose two sides share `turns` and differ in the last answer."""
    sides = {"chosen": [*turns, assistant(chosen)], "rejected": [*turns, assistant(rejected)]}
    return pair("x", "", "") | sides | changes


def numbered(word, n):
    """`n` sound rows; rows of different words share no prompt."""
    return [pair(f"{word} question {i}?", f"{word} yes {i}.", f"{word} no {i}.") for i in range(n)]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def source(folder, **splits):
    """A folder that `load_preferences` reads: one JSONL per split; a split that is not given is sound."""
    rows = {"train": numbered("train", 4), "val": numbered("val", 3), "test": numbered("test", 3)} | splits
    for ours, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        write_jsonl(folder / f"{name}.jsonl", rows[ours])
    return str(folder)


@pytest.fixture
def prepared(cfg, tokenizer, tmp_path):
    """Prepare the given splits, with the given changes of the config."""
    made = itertools.count()

    def prepared_from(changes=None, **splits):
        folder = source(tmp_path / f"source-{next(made)}", **splits)
        return prepare.prepare(
            dataclasses.replace(cfg, data=folder, **({"max_tokens": 512} | (changes or {}))), tokenizer
        )

    return prepared_from


def questions(split):
    return [prompt[-1]["content"] for prompt in split["prompt"]]


def without(row, *columns):
    return {name: value for name, value in row.items() if name not in columns}


# --- one row ------------------------------------------------------------------------------------------------------

GOOD = pair(*TEXTS[0])
ROW_CASES = {
    "missing column": [
        *(without(GOOD, column) for column in row_checks.COLUMNS),
        *(GOOD | {column: None} for column in row_checks.COLUMNS),
        {},
    ],
    "wrong type": [
        GOOD | {"chosen": "a text"},
        GOOD | {"chosen": {"role": "user", "content": "hi"}},
        GOOD | {"rejected": ["a text", "another"]},
        GOOD | {"chosen": [user("hi"), None]},
        GOOD | {"chosen": [user("hi"), {"role": "assistant"}]},
        GOOD | {"chosen": [user("hi"), {"role": "assistant", "content": None}]},
        GOOD | {"chosen": [user("hi"), {"role": None, "content": "ho"}]},
        GOOD | {"chosen": [user(3), assistant("ho")]},
        GOOD | {"score_chosen": "8.0"},
        GOOD | {"prompt": [user("hi")]},
        GOOD | {"score_rejected": True},
        GOOD | {"score_chosen": float("nan")},
    ],
    "empty conversation": [GOOD | {"chosen": []}, GOOD | {"rejected": []}],
    "unreadable line": [
        GOOD | {"problem": "unreadable line"},
        {"problem": "unreadable line", "place": "a.jsonl, line 3"},
    ],
    "tool call": [
        conversation([{"role": "tool", "content": "hi"}]),
        conversation([{"role": "function", "content": "hi"}]),
        conversation([user("hi"), assistant("") | {"tool_calls": [{"function": {"name": "f"}}]}, user("and?")]),
        GOOD | {"chosen": [user("hi"), assistant(None) | {"tool_calls": [{"function": {"name": "f"}}]}]},
        GOOD | {"rejected": [user("hi"), assistant("ho") | {"function_call": {"name": "f"}}]},
    ],
    "empty turn": [
        conversation([user("")]),
        conversation([user(" \n")]),
        conversation([system(""), user("hi")]),
        conversation([user("hi"), assistant("\t"), user("still there?")]),
    ],
    "bad role": [conversation([{"role": "human", "content": "hi"}])],
    "roles out of order": [
        conversation([]),
        conversation([system("Be brief.")]),
        conversation([assistant("hi")]),
        conversation([user("hi"), user("still there?")]),
        conversation([user("hi"), assistant("ho")]),
        conversation([user("hi"), system("Be brief.")]),
        conversation([system("Be brief."), system("Be kind."), user("hi")]),
    ],
    "last turn not assistant": [
        GOOD | {"chosen": GOOD["chosen"] + [user("thanks")]},
        GOOD | {"rejected": GOOD["rejected"][:1]},
    ],
    "empty answer": [conversation([user("hi")], chosen=""), conversation([user("hi")], rejected=" \n\t")],
    "invalid text": [
        conversation([user("hi")], chosen="nul \x00"),
        conversation([user("bell \x07")]),
        conversation([system("lone surrogate \ud800"), user("hi")]),
        conversation([user("hi")], rejected="replacement \ufffd"),
        conversation([user("hi")], rejected="delete \x7f"),
        conversation([user("hi")], rejected="a C1 control, as in text decoded as Latin-1: it\x92s"),
        conversation([user("hi")], chosen="noncharacter \ufffe"),
        conversation([user("hi")], chosen="noncharacter \U0010ffff"),
        GOOD | {"prompt_id": "lone surrogate \ud800"},
    ],
    "prompts differ": [
        GOOD | {"rejected": [user("another question"), GOOD["rejected"][1]]},
        GOOD | {"chosen": [system("Be brief."), *GOOD["chosen"]]},
    ],
    "chosen equals rejected": [
        conversation([user("hi")], chosen="same", rejected="same"),
        conversation([user("hi")], chosen="same", rejected=" same\n"),
    ],
    "tied scores": [GOOD | {"score_chosen": 5, "score_rejected": 5.0}],
    "inverted scores": [GOOD | {"score_chosen": 3.0, "score_rejected": 8.0}],
}
#: Reasons that need more than the row: the splits that produce each, and the split it is counted in.
SET_CASES = {
    "duplicate prompt": ("train", dict(train=[*numbered("train", 3), pair("TRAIN  question 1?", "a", "b")])),
    "prompt in test": ("train", dict(train=[*numbered("train", 3), numbered("test", 3)[0]])),
    "too long": ("train", dict(train=[*numbered("train", 3), pair("Say a lot.", "word " * 600, "no")])),
}


@pytest.mark.parametrize(
    ("reason", "row"),
    [pytest.param(r, row, id=f"{r}-{i}") for r, rows in ROW_CASES.items() for i, row in enumerate(rows)],
)
def test_a_broken_row_gets_its_reason(reason, row):
    assert row_checks.row_problem(row) == reason


@pytest.mark.parametrize("reason", SET_CASES)
def test_a_row_that_clashes_with_the_set_gets_its_reason(prepared, reason):
    split, splits = SET_CASES[reason]
    report = prepared(**splits).report
    assert report[split]["dropped"] == {reason: 1}
    assert all(not report[other]["dropped"] for other in report if other != split)


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        GOOD | {"score_chosen": 8, "score_rejected": 3},
        conversation([system("Be brief."), user("hi")]),
        conversation([user("a"), assistant("b"), user("c")]),
        conversation([user("hi")], chosen="tab\tand line\nand é 漢 🙂\x85\u200d\u2028", rejected="no"),
        conversation([user("hi") | {"name": None}]),
        without(GOOD, "prompt_id"),
        without(GOOD, "score_chosen", "score_rejected"),
        GOOD | {"score_chosen": None, "score_rejected": None},
        GOOD | {"problem": "", "place": "pairs.jsonl, line 7"},
        GOOD | {"problem": "Prove that 2 + 2 = 4."},
        conversation([user("hi") | {"tool_calls": None}]),
    ],
)
def test_a_sound_row_has_no_problem(row):
    assert row_checks.row_problem(row) is None


_role = st.sampled_from(["user", "assistant", "system", "tool"]) | st.none() | st.integers()
_text = st.text(st.characters(), max_size=6) | st.sampled_from(["hi", "", " ", "\x00"])  # characters(): surrogates too
_message = st.fixed_dictionaries({}, optional={"role": _role, "content": _text | st.none() | st.floats()})
_user_turn, _answer = st.builds(user, _text), st.builds(assistant, _text)
_side = (
    st.tuples(_user_turn, _answer).map(list)
    | st.lists(_message | _user_turn | _answer | st.none() | st.text(max_size=3), max_size=4)
    | st.none()
    | st.text(max_size=3)
    | st.integers()
    | _message
)
_score = st.floats() | st.integers() | st.none() | st.booleans() | st.text(max_size=3)
row_changes = st.fixed_dictionaries(
    {},
    optional={"prompt": _text | st.none() | st.integers(), "prompt_id": _text | st.none() | st.integers()}
    | {"chosen": _side, "rejected": _side, "score_chosen": _score, "score_rejected": _score},
)


@given(base=st.sampled_from([GOOD, {}]), changes=row_changes)
@example(base=GOOD, changes={"score_chosen": 10**400})
@example(base=GOOD, changes={"score_chosen": float("nan"), "score_rejected": float("nan")})
def test_any_row_is_sound_or_has_a_known_reason(base, changes):
    row = base | changes
    before = copy.deepcopy(row)
    problem = row_checks.row_problem(row)
    assert problem is None or problem in row_checks.REASONS
    assert repr(row) == repr(before)  # repr: NaN is not equal to itself
    if problem is None:  # then the row can be trained on
        parts = row_checks.extract(row)
        assert parts["prompt"] and parts["chosen"] != parts["rejected"]
        assert isinstance(parts["prompt_id"], str)


def test_extract_puts_every_turn_before_the_last_answer_into_the_prompt():
    turns = [system("Be brief."), user("a"), assistant("b"), user("c")]
    row = conversation([turn | {"name": None} for turn in turns], "good", "bad")  # `datasets` adds such keys
    assert row_checks.extract(row) == {
        "prompt_id": "x",
        "prompt": turns,
        "chosen": [assistant("good")],
        "rejected": [assistant("bad")],
    }


def test_prompt_key_ignores_case_and_space_and_nothing_else():
    key = row_checks.prompt_key([user("How  do\nI Boil an egg? ")])
    assert key == row_checks.prompt_key([user("how do i boil an egg?")])
    assert key != row_checks.prompt_key([user("how do i boil an egg")])
    assert key != row_checks.prompt_key([system("how do i boil an egg?")])


# --- tokens -------------------------------------------------------------------------------------------------------

PROMPTS = {
    "one turn": [user("How do I boil an egg?")],
    "several turns": [user("Hi"), assistant("Hello."), user("Add 2 and 3.")],
    "system turn": [system("Be brief."), user("Why is the sky blue?")],
    "no word the tokenizer saw": [user("漢字 🙂 é")],
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_encode_cuts_the_templated_conversation_at_the_start_of_the_answer(tokenizer, prompt):
    answer = [assistant("Put it into water.")]
    before, after = encoding.encode(tokenizer, prompt, answer)
    whole = tokenizer.apply_chat_template(prompt + answer, tokenize=True, return_dict=False)
    assert before + after == whole
    assert tokenizer.decode(before).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(after) == "Put it into water.<|im_end|>\n"


# --- splits -------------------------------------------------------------------------------------------------------


def splits_of(**sizes):
    return DatasetDict({name: Dataset.from_list(numbered(name, n)) for name, n in sizes.items()})


def sizes(found):
    return {name: len(split) for name, split in found.items()}


@pytest.mark.parametrize(("ours", "name"), [(ours, n) for ours, names in splits.SPLIT_NAMES.items() for n in names])
def test_splits_are_found_by_each_usual_name(ours, name):
    names = {"train": "train", "val": "validation", "test": "test"} | {ours: name}
    raw = splits_of(**dict(zip(names.values(), (5, 4, 3), strict=True)))
    found, said = splits.choose_splits(raw, seed=1)
    assert {ours: split["prompt"] for ours, split in found.items()} == {n: raw[names[n]]["prompt"] for n in names}
    assert said == [f"{ours}: split '{name}', {len(raw[name])} rows" for ours, name in names.items()]


def test_a_preference_split_wins_over_a_split_of_the_plain_name():
    found, _ = splits.choose_splits(splits_of(train=3, train_prefs=4, test=5, test_prefs=6, validation=2), seed=1)
    assert sizes(found) == {"train": 4, "val": 2, "test": 6}


def test_missing_splits_are_cut_from_train_and_said():
    raw = splits_of(train=100)
    found, said = splits.choose_splits(raw, seed=7)
    assert sizes(found) == {"train": 81, "val": 10, "test": 9}
    assert sorted(itertools.chain(*(split["prompt"] for split in found.values()))) == sorted(raw["train"]["prompt"])
    assert "val: no such split, so 10 of 100 prompts, 10 rows cut from train with seed 7" in said
    assert "test: no such split, so 9 of 90 prompts, 9 rows cut from train with seed 7" in said


def prompts(found):
    return {name: set(split["prompt"]) for name, split in found.items()}


def test_the_cut_depends_on_the_seed_and_the_prompts_and_not_on_the_order_of_the_rows():
    raw = splits_of(train=100)
    first, again, other = (
        prompts(splits.choose_splits(rows, seed=seed)[0])
        for rows, seed in ((raw, 1), (DatasetDict(train=raw["train"].shuffle(seed=0)), 1), (raw, 2))
    )
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_all_rows_of_a_prompt_are_cut_together(cfg, tokenizer, tmp_path):
    """1,000 rows of 237 prompts once lost 172 as "prompt in test"."""
    rows = [pair(f"Question {i * i % 237}?", f"Yes {i}.", f"No {i}.") for i in range(300)]
    path = write_jsonl(tmp_path / "twins.jsonl", rows)
    report = prepare.prepare(dataclasses.replace(cfg, data=str(path), max_tokens=512), tokenizer).report
    assert not any("prompt in test" in split["dropped"] for split in report.values())
    assert sum(split["kept"] for split in report.values()) == len({row["prompt"] for row in rows})


@pytest.mark.parametrize(("n", "enough"), [(12, True), (11, False)])
def test_twelve_prompts_are_enough_to_cut_two_splits_from(n, enough):
    raw = DatasetDict(train=Dataset.from_list(numbered("row", n) * 2))
    if enough:
        assert sizes(splits.choose_splits(raw, seed=1)[0]) == {"train": 18, "val": 4, "test": 2}
    else:
        with pytest.raises(DataError, match="22 rows of 11 prompts are too few to cut val and test from"):
            splits.choose_splits(raw, seed=1)


@pytest.mark.parametrize(
    ("source_sizes", "n"), [(dict(train=60), 60), (dict(train=5), 5), (dict(test=3), 3), (dict(train=9, test=4), 4),
                            (dict(train=9, val=2), 11)],
    ids=str,
)  # fmt: skip
def test_to_be_judged_a_source_is_all_test_where_it_names_none(cfg, tokenizer, tmp_path, source_sizes, n):
    for name, size in source_sizes.items():
        write_jsonl(tmp_path / "set" / f"{name}.jsonl", numbered(name, size))
    here = dataclasses.replace(cfg, data=str(tmp_path / "set"), max_tokens=512)
    found, said = sources.load_preferences(here, judge=True)
    assert sizes(found) == {"test": n} and said[0].startswith("test: ")
    assert prepare.prepare(here, tokenizer, judge=True).report["test"]["kept"] == n


# --- load ---------------------------------------------------------------------------------------------------------


def load(cfg, path):
    return sources.load_preferences(dataclasses.replace(cfg, data=str(path)))


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_file_is_read_and_split(cfg, tmp_path, kind):
    rows, path = numbered("row", 30), tmp_path / f"pairs.{kind}"
    getattr(Dataset.from_list(rows), f"to_{kind}")(path)
    found, _ = load(cfg, path)
    assert sorted(row["prompt"] for split in found.values() for row in split) == sorted(r["prompt"] for r in rows)
    assert all(row_checks.row_problem(row) is None for split in found.values() for row in split)


@pytest.mark.parametrize("with_readme", [True, False], ids=["with the card", "without the card"])
def test_a_folder_laid_out_as_the_hub_serves_it_is_read_by_its_split_names(cfg, tmp_path, with_readme):
    sizes = {"train_prefs": 12, "test_prefs": 5, "train_sft": 4}
    (tmp_path / "data").mkdir()
    for name, n in sizes.items():
        Dataset.from_list(numbered(name, n)).to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    if with_readme:
        files = "".join(f"  - split: {name}\n    path: data/{name}-*\n" for name in sizes)
        (tmp_path / "README.md").write_text(
            f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n# Card\n"
        )
    found, said = load(cfg, tmp_path)
    assert {name: len(split) for name, split in found.items()} == {"train": 10, "val": 2, "test": 5}
    assert found["test"]["prompt"] == [row["prompt"] for row in numbered("test_prefs", 5)]
    assert "left alone: train_sft" + ", README.md" * with_readme in said


def test_the_repositorys_own_set_is_read_with_its_three_splits(cfg):
    found, said = load(cfg, "embedded")
    assert {name: len(split) for name, split in found.items()} == {
        ours: len(EMBEDDED[f"{ours}_prefs"]) for ours in ("train", "val", "test")
    }
    assert not any("cut from train" in sentence for sentence in said)


def folder_of(tmp_path, names):
    for name in names:
        if name.endswith(".parquet"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_list(numbered(name, 12)).to_parquet(tmp_path / name)
        else:
            write_jsonl(tmp_path / name, numbered(name, 12))
    return tmp_path


@pytest.mark.parametrize(
    ("names", "found", "left"),
    [
        (["train.jsonl", "held_out.jsonl"], {"train": 10, "val": 2, "test": 12}, None),
        (["pairs.train.jsonl", "pairs.test.jsonl"], {"train": 10, "val": 2, "test": 12}, None),
        (["train.jsonl", "Held-Out.jsonl", "eval.jsonl"], {"train": 10, "val": 2, "test": 12}, "held_out"),
        (["train.jsonl", "extra.jsonl", "notes.txt"], {"train": 9, "val": 2, "test": 1}, "extra, notes.txt"),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], {"train": 18, "val": 3, "test": 3}, None),
        (["a.jsonl", "b.jsonl", ".hidden/train.jsonl"], {"train": 18, "val": 3, "test": 3}, None),
        (["train/part-0.jsonl", "train/part-1.jsonl", "test/0000.jsonl"], {"train": 21, "val": 3, "test": 12}, None),
        (
            ["data/train_prefs-00000-of-00001-6497ae27e0ed2b5f.parquet", "data/train_gen-00000-of-00001.parquet",
             "data/test_prefs-00000-of-00001-ad7e8d9.parquet", "README.md"],
            {"train": 10, "val": 2, "test": 12}, "train_gen, README.md",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_each_file_of_a_folder_is_read_or_named_as_left_alone(cfg, tmp_path, names, found, left):
    splits, said = load(cfg, folder_of(tmp_path / "set", names))
    assert sizes(splits) == found
    assert [s.removeprefix("left alone: ") for s in said if s.startswith("left alone")] == ([left] if left else [])


@pytest.mark.parametrize(
    ("names", "cause"),
    [
        (["train.jsonl", "train.parquet"], "train.jsonl, train.parquet for train, which may be the same rows"),
        (["train_sft.jsonl", "test_sft.jsonl"], "No training split among test_sft, train_sft"),
        (["notes.txt"], "holds no file of rows"),
    ],
)
def test_a_folder_that_leaves_a_doubt_is_refused(cfg, tmp_path, names, cause):
    with pytest.raises(DataError) as caught:
        load(cfg, folder_of(tmp_path / "set", names))
    assert cause in caught.value.cause


def test_a_source_of_which_no_row_is_a_pair_is_an_error_that_says_what_was_found(cfg, tmp_path):
    rows = [{"question": "a", "response": "c"} for _ in range(20)]
    with pytest.raises(DataError) as caught:
        load(cfg, write_jsonl(tmp_path / "other.jsonl", rows))
    assert "no preference pair: 20 missing column" in caught.value.cause
    assert "question" in caught.value.cause and "DATA_COLUMNS" in caught.value.fix


def test_a_held_out_split_without_a_needed_column_is_an_error_that_names_the_split(prepared):
    with pytest.raises(DataError, match=r"\(test\): 3 missing column"):
        prepared(test=[without(row, "score_rejected") for row in numbered("test", 3)])


# --- the hub ------------------------------------------------------------------------------------------------------


def test_an_unknown_hub_id_without_a_network_is_an_error_that_names_it(cfg, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match="no-such-preferences could not be read: .*HF_HUB_OFF.*No file or folder here"
    ) as caught:
        load(cfg, "nobody/no-such-preferences")
    assert "DATA=embedded" in caught.value.fix


def test_a_hub_id_is_loaded_at_its_revision_and_each_row_read_like_any_other(cfg, monkeypatch):
    raw, asked = splits_of(train_prefs=12, test_prefs=3, train_sft=2), []
    raw["test_prefs"] = Dataset.from_list([*numbered("test", 3), without(GOOD, "chosen")])

    def load_dataset(name, revision):
        asked.append((name, revision))
        return raw

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    found, said = sources.load_preferences(dataclasses.replace(cfg, data="someone/pairs", data_revision="abc"))
    assert asked == [("someone/pairs", "abc")] and sizes(found) == {"train": 10, "val": 2, "test": 4}
    assert found["test"][3]["place"] == "test_prefs, row 4" and found["test"][3]["problem"] == "missing column"
    assert "left alone: train_sft" in said


def refused(kind, status=404):
    """An error of the hub's client as a response of this status gives it."""
    error = kind.__new__(kind)
    error.response = SimpleNamespace(status_code=status)
    return error


class TransportError(Exception):
    """What the client's HTTP library calls every failure below HTTP."""


HUB = huggingface_hub.errors


@pytest.mark.parametrize(
    ("error", "token", "cause", "fix"),
    [
        (HUB.OfflineModeIsEnabled("offline"), None, "HF_HUB_OFFLINE", "Unset HF_HUB_OFFLINE"),
        (TransportError("no route to host"), None, "cannot be reached (no route to host)", "network"),
        (ConnectionError("Couldn't reach it (LocalEntry)"), None, "cannot be reached (Couldn't reach it", "proxy"),
        (refused(HUB.RepositoryNotFoundError, 401), "hf_x", "token, which has expired", "hf auth login"),
        (refused(HUB.HfHubHTTPError, 401), "hf_x", "token, which has expired", "HF_TOKEN"),
        (refused(HUB.RepositoryNotFoundError, 401), None, "no such name, or it is private", "Check the name"),
        (refused(HUB.RepositoryNotFoundError), "hf_x", "no such name, or it is private", "Check the name"),
        (refused(HUB.GatedRepoError, 403), "hf_x", "gated", "Accept its terms"),
        (refused(HUB.RevisionNotFoundError), None, "not this revision", "@revision"),
        (refused(HUB.HfHubHTTPError, 503), None, "too busy", "Try again"),
        (refused(HUB.HfHubHTTPError, 429), None, "too busy", "Try again"),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            None,
            "could not be stored (Permission denied)",
            "HF_HOME",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), None, "could not be stored (No space", "Free space"),
        (
            ValueError("Config name is missing."),
            None,
            "several data sets",
            "Download the files of one, and set DATA to their folder",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_keeps_rows_on_the_hub_is_told_apart(cfg, monkeypatch, error, token, cause, fix):
    def load_dataset(name, revision):
        raise RuntimeError("failed") from error  # `datasets` wraps what happened

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    with pytest.raises(DataError) as caught:
        load(cfg, "someone/pairs")
    assert cause in caught.value.cause and fix in caught.value.fix


def test_local_pairs_need_no_cache_of_the_hub(cfg, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    assert load(cfg, "embedded")[0] and load(cfg, write_jsonl(tmp_path / "a.jsonl", numbered("row", 12)))[0]


# --- one odd row --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("missing column", dict(score_chosen=None)),
        ("wrong type", dict(chosen="a text")),
        ("wrong type", dict(chosen=[user("hi"), None])),
        ("wrong type", dict(chosen=[user("hi"), {"content": "ho"}])),
        ("wrong type", dict(score_chosen="ten")),
        ("empty conversation", dict(chosen=[])),
    ],
)
def test_one_odd_row_is_dropped_and_spares_the_others(prepared, reason, changes):
    report = prepared(train=[*numbered("train", 4), pair("odd?", "yes", "no") | changes]).report["train"]
    assert report["dropped"] == {reason: 1} and report["kept"] == 4


# --- the whole set ------------------------------------------------------------------------------------------------


def test_every_row_is_kept_or_dropped_for_one_reason(prepared):
    other = ("missing column", "wrong type", "invalid text", "unreadable line")
    broken = [rows[-1] for reason, rows in ROW_CASES.items() if reason not in other]
    train = [*numbered("train", 6), *broken, pair("train question 1?", "a", "b"), numbered("test", 1)[0]]
    report = prepared(train=train).report
    for split in report.values():
        assert split["rows"] == split["kept"] + sum(split["dropped"].values())
    assert report["train"]["rows"] == len(train) and report["train"]["kept"] == 6
    assert sum(report["train"]["dropped"].values()) == len(broken) + 2
    assert list(report) == ["train", "val", "test"]


def test_a_prompt_of_the_test_split_is_dropped_from_train_and_val_and_stays_in_test(prepared):
    shared = pair("Shared  QUESTION?", "yes", "no")
    made = prepared(
        train=[*numbered("train", 3), shared],
        val=[*numbered("val", 3), pair("shared question?", "a", "b")],
        test=[*numbered("test", 3), shared],
    )
    assert made.report["train"]["dropped"] == made.report["val"]["dropped"] == {"prompt in test": 1}
    assert "Shared  QUESTION?" in questions(made.splits["test"])
    assert not {"Shared  QUESTION?", "shared question?"} & {
        *questions(made.splits["train"]),
        *questions(made.splits["val"]),
    }


def test_a_held_out_prompt_is_dropped_from_train_even_when_the_limit_leaves_it_unused(prepared):
    """Else a larger MAX_TEST would find prompts that were trained on."""
    made = prepared(dict(max_test=1), train=[*numbered("train", 3), *numbered("test", 3)])
    assert made.report["train"]["dropped"] == {"prompt in test": 3} and made.report["test"]["used"] == 1


def test_two_conversations_that_share_only_the_first_message_are_both_kept(prepared):
    turns = [user("Hi"), assistant("Hello.")]
    rows = [conversation([*turns, user(text)], prompt="Hi") for text in ("Add 2 and 3.", "Add 4 and 5.")]
    assert prepared(train=rows).report["train"]["kept"] == 2


def test_the_seed_decides_the_order_and_nothing_else(prepared):
    rows = numbered("train", 30)
    first, again, other = (questions(prepared(dict(seed=s), train=rows).splits["train"]) for s in (1, 1, 2))
    assert first == again
    assert first != other and sorted(first) == sorted(other)
    assert first != [row["prompt"] for row in rows]


def test_the_limits_are_respected_and_take_the_front_of_the_shuffle(prepared):
    rows = dict(train=numbered("train", 20), val=numbered("val", 10), test=numbered("test", 10))
    whole, made = prepared(**rows), prepared(dict(max_train=7, max_val=2, max_test=3), **rows)
    for name, limit in (("train", 7), ("val", 2), ("test", 3)):
        assert questions(made.splits[name]) == questions(whole.splits[name])[:limit]
        assert made.report[name]["used"] == limit and made.report[name]["kept"] == len(rows[name])


def test_no_usable_row_is_an_error_that_names_the_split_and_the_counts(prepared):
    tied = [pair(f"tied {i}?", "a", "b", score_chosen=3.0) for i in range(3)]
    with pytest.raises(DataError) as caught:
        prepared(train=[*tied, pair("same?", "a", "a")])
    assert "(train): 3 tied scores, 1 chosen equals rejected." in caught.value.cause


def test_all_rows_too_long_is_an_error_that_tells_to_raise_max_tokens(prepared):
    with pytest.raises(DataError, match=r"\(test\): 3 too long") as caught:
        prepared(dict(max_tokens=32), test=[pair(f"long {i}?", "word " * 100, "no") for i in range(3)])
    assert "MAX_TOKENS" in caught.value.fix


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_pair_of_max_tokens_is_kept_whole_and_one_token_less_drops_it(prepared, tokenizer, side):
    answers = dict(chosen="Short.", rejected="Brief.") | {side: "A long answer. " * 8}
    row = pair("Long?", answers["chosen"], answers["rejected"])
    parts = row_checks.extract(row)
    length = sum(map(len, encoding.encode(tokenizer, parts["prompt"], parts[side])))
    rows = [*numbered("train", 3), row]
    kept = prepared(dict(max_tokens=length), train=rows)
    mine = next(r for r in kept.splits["train"] if r["prompt"] == parts["prompt"])
    assert (mine["chosen"], mine["rejected"]) == (parts["chosen"], parts["rejected"])
    assert max(encoding.token_lengths(kept.splits["train"])) == length
    dropped = prepared(dict(max_tokens=length - 1), train=rows)
    assert dropped.report["train"]["dropped"] == {"too long": 1}
    assert "Long?" not in questions(dropped.splits["train"])


@given(rows=st.lists(st.builds(lambda b, c: b | c, st.sampled_from([GOOD, {}]), row_changes), min_size=1, max_size=6))
def test_any_file_is_accounted_for_or_an_error_with_cause_and_fix(cfg, tokenizer, tmp_path, rows):
    folder = source(tmp_path / "any", train=rows)
    try:
        made = prepare.prepare(dataclasses.replace(cfg, data=folder), tokenizer)
    except DataError as error:
        assert error.cause and error.fix
    else:
        train = made.report["train"]
        assert train["rows"] == len(rows) == train["kept"] + sum(train["dropped"].values())


def test_the_order_of_a_source_changes_no_split_that_it_names(prepared):
    rows = {
        "train": [*numbered("train", 5), *numbered("test", 2), pair("TRAIN question 1?", "other", "answer"), {}],
        "test": [*numbered("test", 4), pair("test question 1?", "other", "answer")],
    }
    forth, back = prepared(**rows), prepared(**{name: split[::-1] for name, split in rows.items()})
    for name in ("train", "val", "test"):
        assert forth.report[name]["dropped"] == back.report[name]["dropped"]
        assert sorted(map(json.dumps, forth.splits[name])) == sorted(map(json.dumps, back.splits[name]))


def test_strict_turns_a_dropped_row_into_an_error_with_counts_and_ids(prepared):
    tied = [pair(f"tied {i}?", "a", "b", score_chosen=3.0) for i in range(4)]
    with pytest.raises(DataError) as caught:
        prepared(dict(strict=True), train=[*numbered("train", 4), *tied], val=[*numbered("val", 3), tied[0]])
    assert "train: 4 tied scores (tied 0?, tied 1?, tied 2?)" in caught.value.cause
    assert "val: 1 tied scores (tied 0?)" in caught.value.cause and "STRICT" in caught.value.fix
    assert prepared(dict(strict=True)).report["train"]["kept"] == 4


def test_an_empty_split_is_an_error_that_says_so(cfg, tokenizer, monkeypatch):
    empty = splits_of(train=3, val=3, test=3)
    empty["val"] = empty["val"].select([])
    monkeypatch.setattr(sources, "load_preferences", lambda config, judge: (empty, []))
    with pytest.raises(DataError, match=r"\(val\): it has no row"):
        prepare.prepare(cfg, tokenizer)


def test_rows_without_scores_are_kept_and_the_account_says_what_could_not_be_looked_for(cfg, tokenizer, monkeypatch):
    unscored = [row | {"score_chosen": None, "score_rejected": None} for row in numbered("train", 4)]
    splits = splits_of(train=3, val=3, test=3)
    splits["train"] = Dataset.from_list(unscored)
    monkeypatch.setattr(sources, "load_preferences", lambda config, judge: (splits, ["chosen"]))
    made = prepare.prepare(cfg, tokenizer)
    assert made.report["train"]["kept"] == 4
    assert len(made.choices) == 2 and made.choices[1].startswith("train: no scores")


def test_the_account_says_what_was_settled_in_the_template(cfg, tokenizer):
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = "{% if enable_thinking %}{{ strftime_now('%Y') }}{% endif %}" + tokenizer.chat_template
    templates.settle(thinking)
    made = prepare.prepare(dataclasses.replace(cfg, max_tokens=512), thinking)
    assert {"chat template: enable_thinking is False", "chat template: date is 2024-07-26"} < set(made.choices)


def test_a_template_that_spoils_every_row_is_an_error_that_shows_one_decoded(cfg, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|><|im_end|>")
    with pytest.raises(DataError, match=rf"\(test\): {len(EMBEDDED['test_prefs'])} template eos") as caught:
        prepare.prepare(dataclasses.replace(cfg, max_tokens=512), other)
    assert "<|im_end|><|im_end|>" in caught.value.cause and "EOS" in caught.value.fix


def test_the_account_has_a_row_per_reason_and_two_more_per_split(prepared):
    tied = [pair(f"tied {i}?", "a", "b", score_chosen=3.0) for i in range(2)]
    made = prepared(dict(max_train=3), train=[*numbered("train", 4), *tied])
    rows = prepare.report_rows(made.report)
    assert [(r["what"], r["rows"], r["examples"]) for r in rows if r["split"] == "train"] == [
        ("dropped: tied scores", 2, ["tied 0?", "tied 1?"]),
        ("kept", 4, []),
        ("used, after shuffle and limit", 3, []),
    ]
    assert len(rows) == 7


# --- the repository's own pairs -----------------------------------------------------------------------------------

EMBEDDED = {name: sources.embedded_rows(name) for name in ("train_prefs", "val_prefs", "test_prefs")}
ALL = [row for rows in EMBEDDED.values() for row in rows]


def named(row):
    return row_checks.prompt_key(row_checks.extract(row)["prompt"])


def test_every_embedded_row_is_usable():
    assert Counter(row_checks.row_problem(row) for row in ALL) == {None: len(ALL)}


def test_embedded_prompts_and_ids_are_unique_within_and_across_splits():
    for values in (Counter(map(named, ALL)), Counter(row["prompt_id"] for row in ALL)):
        assert [value for value, n in values.items() if n > 1] == []


def test_no_two_embedded_prompts_are_nearly_the_same():
    """Word-set Jaccard of the whole conversation before the answer, over all pairs within and across splits."""
    words = [set(re.findall(r"\w+", " ".join(m["content"] for m in row["chosen"][:-1]).lower())) for row in ALL]
    shared, a, b = max(
        (len(words[a] & words[b]) / len(words[a] | words[b]), a, b)
        for a, b in itertools.combinations(range(len(ALL)), 2)
    )
    assert shared < 0.8, (named(ALL[a]), named(ALL[b]))


def test_every_chosen_answer_of_the_embedded_set_keeps_the_rules_a_program_can_check():
    for row in ALL:
        text = row["chosen"][-1]["content"]
        answer = {"text": text, "tokens": 1, "finished": True}
        assert [name for name, check in house_style.RULES.items() if not check(answer)] == [], text


def test_each_dirty_row_gets_the_reason_it_was_made_for():
    rows = sources.dirty_rows()
    assert [row_checks.row_problem(row) for row in rows] == [row["expected"] for row in rows]
    alone = set(row_checks.REASONS) - {"prompt in test", "duplicate prompt", "too long"}
    alone -= {"unreadable line", "control token"}  # of a file, of a tokenizer
    alone -= {reason for reason in row_checks.REASONS if reason.startswith("template")}
    assert {row["expected"] for row in rows} == alone | {None}


#: Rows and SHA-256 of each prepared split, in order, with the tiny tokenizer. Recorded results depend on these rows: if
#: one changes on purpose, raise `store.VERSION` and measure again.
PREPARED = {
    "train": (400, "e7a7588c1c07ad038665fd31ea8d66b0ed21cd956b2bb3272af4e575f803f122"),
    "val": (60, "8ebaf810344bd1d72ea76698d620b0fbf1f5fbc5be7493eb3a0607ee0459d3b4"),
    "test": (120, "d8151e9ba93b1a7839aa3ee974be7af9e09fb119e4821d2c47b0661c9d0b5d5a"),
}


def test_the_prepared_embedded_splits_are_the_rows_that_results_were_recorded_on(cfg, tokenizer):
    changed = dataclasses.replace(cfg, max_tokens=256, max_train=400, max_val=60, max_test=120)
    found = {}
    for name, split in prepare.prepare(changed, tokenizer).splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in split)
        found[name] = (len(split), hashlib.sha256(text.encode()).hexdigest())
    assert found == PREPARED


def test_every_embedded_pair_has_a_kind_and_only_form_and_samples_break_the_style_on_the_surface():
    kinds = sources.rejected_kinds()
    assert set(kinds) == {row["prompt_id"] for row in ALL} and len(kinds) == len(ALL)
    for row in ALL:
        answer = {"text": row["rejected"][-1]["content"], "tokens": 1, "finished": True}
        if kinds[row["prompt_id"]] not in ("form", "base sample"):
            assert all(check(answer) for check in house_style.RULES.values()), answer["text"]


def test_every_kind_of_the_test_split_is_taught_and_no_answer_of_it_is_nearly_one_of_the_training_split():
    kinds = sources.rejected_kinds()
    train, test = ({kinds[row["prompt_id"]] for row in EMBEDDED[name]} for name in ("train_prefs", "test_prefs"))
    assert test == train == set(kinds.values())

    def words(split):
        answers = (row[side][-1]["content"] for row in EMBEDDED[split] for side in ("chosen", "rejected"))
        return [set(re.findall(r"\w+", answer.lower())) for answer in answers]

    pairs = itertools.product(words("train_prefs"), words("test_prefs"))
    assert max(len(a & b) / len(a | b) for a, b in pairs) < 0.7


# --- the pair that is followed ----


def test_the_running_example_is_the_first_usable_test_row_with_its_token_counts(cfg, tokenizer, tmp_path):
    rows = [pair(f"Question {n}?", "yes " * (n + 1), "no") for n in range(24)]
    folder = tmp_path / "set"
    folder.mkdir()
    bad = pair("Bad?", "same", "same")
    for split, part in (("train_prefs", rows[:16]), ("test_prefs", [bad, *rows[16:]])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{split}.jsonl").write_text(lines)
    cfg = dataclasses.replace(cfg, data=str(folder), data_revision=None)
    found = prepare.running_example(cfg, tokenizer)
    assert found["prompt_id"] == "Question 16?"
    test = prepare.prepare(cfg, tokenizer).splits["test"]
    assert found in [dict(row) for row in test]


def test_without_a_usable_test_row_the_running_example_is_an_error(cfg, tokenizer, tmp_path):
    bad = [pair(f"Bad {n}?", "same", "same") for n in range(24)]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    with pytest.raises(DataError, match=r"No usable pair is left.*: [23] chosen equals rejected"):
        prepare.running_example(
            dataclasses.replace(cfg, data=str(tmp_path / "bad.jsonl"), data_revision=None), tokenizer
        )
