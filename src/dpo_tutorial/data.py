"""Preference data: load a source, choose splits, keep whole pairs, give every dropped row a reason."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from tqdm.auto import tqdm

from . import config as configs
from .config import Config
from .errors import DataError

COLUMNS = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")

VERSION = 1  # raise it when the same source would give other rows: prepared data of another version is not reused

#: Where each split is looked for, first hit wins. What is missing is cut from the training split, by seed.
SPLIT_NAMES = {
    "train": ("train_prefs", "train"),
    "val": ("val_prefs", "validation", "val"),
    "test": ("test_prefs", "test"),
}

EMBEDDED_SPLITS = ("train_prefs", "val_prefs", "test_prefs")

#: Reasons a row is dropped, in the order they are checked. One row has one reason.
REASONS = {
    "missing column": "a needed column is absent or null",
    "wrong type": "a conversation is not a list of {role, content} texts, or a score is not a number",
    "empty conversation": "a side has no turn at all",
    "bad role": "a role other than system, user, assistant",
    "roles out of order": "user and assistant do not alternate, starting with the user",
    "last turn not assistant": "there is no answer to prefer",
    "empty answer": "the last turn is empty or white space",
    "invalid text": "control characters or broken Unicode",
    "prompts differ": "the two answers belong to different conversations",
    "chosen equals rejected": "nothing to prefer",
    "tied scores": "the annotator had no preference",
    "inverted scores": "the rejected answer has the higher score",
    "prompt in test": "the conversation is also in a held-out split",
    "duplicate prompt": "the same conversation again in this split",
    "template border": "the answer's first characters merge with the end of the prompt into other tokens",
    "too long": "prompt and answer exceed max_tokens; never cut silently",
}

_INVALID = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffd]")


# --- load ---------------------------------------------------------------------------------------------------------


def load_preferences(config: Config) -> tuple[DatasetDict, list[str]]:
    """Read `config.data` and choose its train, val and test splits.

    Accepts `embedded`, a hub id, a folder laid out as the hub serves it, a `.parquet` or a `.jsonl` file.

    Returns:
        (`DatasetDict` with exactly `train`, `val`, `test`; the choices made, one sentence each).

    Raises:
        DataError: no such file or dataset, unreadable, or not the UltraFeedback-binarized schema.
    """
    raw = _read(config)
    for name, split in raw.items():
        if name in {n for names in SPLIT_NAMES.values() for n in names}:
            _check_columns(split, f"{config.data} ({name})")
    return choose_splits(raw, config.seed)


def embedded_file(split: str) -> Path:
    """Path of one split of the repository's own preference set (`train_prefs`, `val_prefs`, `test_prefs`)."""
    return Path(str(resources.files("dpo_tutorial") / "resources" / f"{split}.jsonl"))


def dirty_rows() -> list[dict]:
    """Rows made bad on purpose, for the audit lesson of notebook 04; no split reads them.

    Each has `expected`: the reason of `REASONS` that `row_problem` must find, None for the one sound row.
    """
    return [json.loads(line) for line in embedded_file("dirty_rows").read_text(encoding="utf-8").splitlines()]


def _read(config: Config) -> DatasetDict:
    spec = config.data
    path = Path(spec).expanduser()
    try:
        if spec == configs.EMBEDDED:
            files = {s: str(embedded_file(s)) for s in EMBEDDED_SPLITS}
            return load_dataset("json", data_files=files)
        if path.is_dir():
            return load_dataset(str(path))
        if path.suffix in (".parquet", ".jsonl", ".json"):
            if not path.is_file():
                raise DataError(
                    f"DATA={spec} does not exist (looked in {Path.cwd()}).", "Give the path of an existing file."
                )
            kind = "parquet" if path.suffix == ".parquet" else "json"
            return load_dataset(kind, data_files={"train": str(path)})
        return load_dataset(spec, revision=config.data_revision)
    except DataError:
        raise
    except Exception as error:  # datasets raises a dozen unrelated types for "cannot read this"
        raise DataError(
            f"DATA={spec} could not be read: {_cause(error)}",
            "Give a hub id (with @revision), a folder as the hub serves it, a .parquet or a .jsonl file. "
            "Without a hub, DATA=embedded uses the repository's own pairs.",
        ) from error


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line: `datasets` wraps it in exceptions that say only that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, StopIteration):
        return "the file holds no row"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _check_columns(split: Dataset, where: str) -> None:
    missing = [c for c in COLUMNS if c not in split.column_names]
    if missing:
        raise DataError(
            f"{where} has no column {', '.join(missing)}; it has {', '.join(split.column_names)}.",
            "Preference data needs prompt (text), chosen and rejected (lists of {role, content}), "
            "score_chosen and score_rejected (numbers), as HuggingFaceH4/ultrafeedback_binarized has them.",
        )


def choose_splits(raw: DatasetDict, seed: int) -> tuple[DatasetDict, list[str]]:
    """Find train, val and test by their usual names; cut a missing one from train, by seed, and say so."""
    found, said = {}, []
    for ours, names in SPLIT_NAMES.items():
        name = next((n for n in names if n in raw), None)
        if name:
            found[ours] = raw[name]
            said.append(f"{ours}: split '{name}', {len(raw[name]):,} rows")
    others = sorted(set(raw) - {n for names in SPLIT_NAMES.values() for n in names})
    if others:
        said.append(f"left alone: {', '.join(others)}")
    if "train" not in found:
        raise DataError(f"No training split among {', '.join(raw)}.", f"Name it {' or '.join(SPLIT_NAMES['train'])}.")
    for ours in ("val", "test"):
        if ours not in found:
            if len(found["train"]) < 10:
                raise DataError(
                    f"{len(found['train'])} rows are too few to cut a {ours} split from.", "Give at least 12 rows."
                )
            cut = found["train"].train_test_split(test_size=0.1, seed=seed)
            found["train"], found[ours] = cut["train"], cut["test"]
            said.append(f"{ours}: no such split, so {len(cut['test']):,} rows cut from train with seed {seed}")
    return DatasetDict({k: found[k] for k in ("train", "val", "test")}), said


# --- one row ------------------------------------------------------------------------------------------------------


def extract(row: dict) -> dict:
    """Split a checked row into what TRL trains on.

    Returns:
        `prompt`: every turn before the last answer; `chosen` and `rejected`: the last turn of each side, as a list of
        one message; `prompt_id`: the row's own id, or "" where it has none.
    """
    return {
        "prompt_id": str(row.get("prompt_id") or ""),
        "prompt": [_message(m) for m in row["chosen"][:-1]],
        "chosen": [_message(row["chosen"][-1])],
        "rejected": [_message(row["rejected"][-1])],
    }


def _message(m: dict) -> dict:
    return {"role": m["role"], "content": m["content"]}


def row_problem(row: dict) -> str | None:
    """The first of `REASONS` that applies to this row alone, or None."""
    if any(row.get(c) is None for c in COLUMNS):
        return "missing column"
    sides = (row["chosen"], row["rejected"])
    if not all(isinstance(s, list) and all(_is_message(m) for m in s) for s in sides) or not all(
        isinstance(row[c], (int, float)) and not isinstance(row[c], bool) and -math.inf < row[c] < math.inf
        for c in ("score_chosen", "score_rejected")
    ):
        return "wrong type"
    if not all(sides):
        return "empty conversation"
    if any(m["role"] not in ("system", "user", "assistant") for s in sides for m in s):
        return "bad role"
    if any(not _alternates([m["role"] for m in s]) for s in sides):
        return "roles out of order"
    if any(s[-1]["role"] != "assistant" for s in sides):
        return "last turn not assistant"
    if any(not s[-1]["content"].strip() for s in sides):
        return "empty answer"
    if any(_INVALID.search(m["content"]) for s in sides for m in s):
        return "invalid text"
    if [_message(m) for m in sides[0][:-1]] != [_message(m) for m in sides[1][:-1]]:
        return "prompts differ"
    if sides[0][-1]["content"].strip() == sides[1][-1]["content"].strip():
        return "chosen equals rejected"
    if row["score_chosen"] == row["score_rejected"]:
        return "tied scores"
    if row["score_chosen"] < row["score_rejected"]:
        return "inverted scores"
    return None


def _is_message(m: object) -> bool:
    return isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)


def _alternates(roles: list[str]) -> bool:
    turns = roles[1:] if roles[0] == "system" else roles
    return bool(turns) and all(role == ("user", "assistant")[i % 2] for i, role in enumerate(turns))


def prompt_key(prompt: list[dict]) -> str:
    """Case- and space-blind text of a conversation: two prompts with one key are the same prompt."""
    return "\n".join(f"{m['role']}: {' '.join(m['content'].lower().split())}" for m in prompt)


def encode(tokenizer, prompt: list[dict], answer: list[dict]) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer under the chat template, cut exactly as `DPOTrainer` cuts them.

    The whole conversation is templated once and the prompt's ids are taken off its front, so no token can merge
    across the border.

    Raises:
        DataError: the prompt's ids are not a prefix of the whole.
    """
    options = dict(tokenize=True, return_dict=False)
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template(prompt + answer, **options)
    if whole[: len(before)] != before:
        raise DataError(
            "The chat template renders the prompt differently once an answer follows.",
            "Use a template whose prompt is a prefix of the whole conversation.",
        )
    return before, whole[len(before) :]


def pieces(tokenizer, ids: list[int]) -> list[tuple[str, int]]:
    """The text that each token adds, and how many tokens it took: a character of several byte tokens is one piece.

    Decoded as a growing whole, because some tokenizers decode a token alone without its leading space.
    """
    found, shown, waiting = [], "", 0
    for end in range(1, len(ids) + 1):
        text, waiting = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False), waiting + 1
        if text.endswith("\ufffd") and end < len(ids):  # half a character: the next token has the rest
            continue
        found.append((text[len(shown) :], waiting))
        shown, waiting = text, 0
    return found


# --- the whole set ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """Training-ready splits (prompt_id, prompt, chosen, rejected, token counts) and the account of what was dropped."""

    splits: DatasetDict
    report: dict
    choices: list[str]


def prepare(config: Config, tokenizer) -> Prepared:
    """Load, check, filter by tokens, shuffle and subsample: notebook 04 in one call.

    Raises:
        DataError: as `load_preferences`, or no row of a split is usable.
    """
    raw, choices = load_preferences(config)
    splits, report, seen = {}, {}, set()
    limits = {"train": config.max_train, "val": config.max_val, "test": config.max_test}
    for name in ("test", "val", "train"):  # held-out splits first: a shared prompt is dropped from the other side
        splits[name], report[name], keys = _prepare_split(raw[name], name, tokenizer, config, seen, limits[name])
        seen |= keys
    order = ("train", "val", "test")
    return Prepared(DatasetDict({k: splits[k] for k in order}), {k: report[k] for k in order}, choices)


def _prepare_split(raw, name, tokenizer, config, held_out, limit):
    kept, keys, dropped, examples = [], set(), Counter(), {}
    for index, row in enumerate(tqdm(raw, desc=f"checking {name}", unit="row", leave=False)):
        problem = row_problem(row)
        if problem is None:
            example = extract(row)
            key = prompt_key(example["prompt"])
            problem = "prompt in test" if key in held_out else "duplicate prompt" if key in keys else None
        if problem is None:
            keys.add(key)
            try:
                before, chosen = encode(tokenizer, example["prompt"], example["chosen"])
                _, rejected = encode(tokenizer, example["prompt"], example["rejected"])
            except DataError:
                problem = "template border"
        if problem is None:
            example |= {
                "prompt_tokens": len(before), "chosen_tokens": len(chosen), "rejected_tokens": len(rejected),
            }  # fmt: skip
            if len(before) + max(len(chosen), len(rejected)) > config.max_tokens:
                problem = "too long"
        if problem is None:
            kept.append(example)
        else:
            dropped[problem] += 1
            examples.setdefault(problem, []).append(str(row.get("prompt_id") or index)[:16])
    if not kept:
        raise DataError(
            f"No usable pair is left in {config.data} ({name}): "
            + ", ".join(f"{n} {reason}" for reason, n in dropped.most_common())
            + ".",
            "Mend the rows, or raise MAX_TOKENS if most are too long.",
        )
    assert len(raw) == len(kept) + dropped.total(), "every row is kept or dropped by one reason"
    dataset = Dataset.from_list(kept).shuffle(seed=config.seed)
    chosen_rows = dataset.select(range(min(limit, len(dataset))))
    report = {
        "rows": len(raw),
        "dropped": {reason: dropped[reason] for reason in REASONS if dropped[reason]},
        "examples": {reason: ids[:3] for reason, ids in examples.items()},
        "kept": len(kept),
        "used": len(chosen_rows),
    }
    return chosen_rows, report, keys


def token_lengths(split: Dataset) -> list[int]:
    """Tokens of the longer side of each pair: prompt plus the longer answer."""
    return [
        p + max(c, r)
        for p, c, r in zip(split["prompt_tokens"], split["chosen_tokens"], split["rejected_tokens"], strict=True)
    ]


def source_identity(config: Config) -> dict:
    """What the prepared data depends on; artifacts made from other values are not reused."""
    names = ("model", "model_revision", "data_revision", "max_tokens", "max_train", "max_val", "max_test", "seed")
    values = dataclasses.asdict(config)
    return {n: values[n] for n in names} | {"data": _content(config), "code": VERSION}


def _content(config: Config) -> str | list[str]:
    """A hub id names its content by revision; of local files the bytes count, not the name."""
    path = Path(config.data).expanduser()
    if config.data == configs.EMBEDDED:
        files = [embedded_file(s) for s in EMBEDDED_SPLITS]
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
    elif path.is_file():
        files = [path]
    else:
        return config.data
    return [f"{p.name} {hashlib.sha256(p.read_bytes()).hexdigest()}" for p in files]
