"""Preference data: load a source, choose splits, audit every row (`audit`), shuffle, subsample, account for it all."""

from __future__ import annotations

import csv
import dataclasses
import glob
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from . import config as configs
from .audit import (  # noqa: F401  notebooks and modules find the parts of a row here
    COLUMNS,
    REASONS,
    Audit,
    audit_split,
    encode,
    extract,
    prepared_row,
    prompt_key,
    row_problem,
)
from .config import Config
from .embedded import sha256
from .errors import DataError, first_line

VERSION = 2  # raise it when the same source would give other rows: prepared data of another version is not reused

#: Where each split is looked for, first hit wins. What is missing is cut from the training split, by seed.
SPLIT_NAMES = {
    "train": ("train_prefs", "train"),
    "val": ("val_prefs", "validation", "val"),
    "test": ("test_prefs", "test"),
}

EMBEDDED_SPLITS = ("train_prefs", "val_prefs", "test_prefs")


# --- load ---------------------------------------------------------------------------------------------------------


def load_preferences(config: Config) -> tuple[DatasetDict, list[str]]:
    """Read `config.data` and choose its train, val and test splits.

    Accepts `embedded`, a hub id, a folder laid out as the hub serves it, a `.parquet` or a `.jsonl` file. Not CSV: a
    cell of it holds no list of messages.

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


def source(config: Config) -> tuple[str, dict | None, str | None]:
    """What `load_dataset` is called with for `config.data`: hub id, folder or kind of file; files; revision.

    Raises:
        DataError: no such file, or a table of plain cells.
    """
    spec = config.data
    path = Path(spec).expanduser()
    if spec == configs.EMBEDDED:
        return "json", {s: str(embedded_file(s)) for s in EMBEDDED_SPLITS}, None
    if path.is_dir():
        return str(path), None, None
    if path.suffix in (".parquet", ".jsonl", ".json"):
        if not path.is_file():
            raise DataError(
                f"DATA={spec} does not exist (looked in {Path.cwd()}).", "Give the path of an existing file."
            )
        kind = "parquet" if path.suffix == ".parquet" else "json"
        return kind, {"train": glob.escape(str(path))}, None  # `[1]` in a name is no pattern
    if path.suffix in (".csv", ".tsv") and path.is_file():
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            found = next(csv.reader(stream, delimiter="," if path.suffix == ".csv" else "\t"), [])
        raise DataError(
            f"DATA={spec} is a table of plain cells, which hold no conversation; it has {_listed(found)}.",
            f"Write it as .jsonl or .parquet. {_SCHEMA}",
        )
    return spec, None, config.data_revision


def _read(config: Config) -> DatasetDict:
    try:
        where, files, revision = source(config)
        return load_dataset(where, data_files=files, revision=revision)
    except DataError:
        raise
    except Exception as error:  # datasets raises a dozen unrelated types for "cannot read this"
        raise DataError(
            f"DATA={config.data} could not be read: {_cause(error)}",
            "Give a hub id (with @revision), a folder as the hub serves it, a .parquet or a .jsonl file. "
            "Without a hub, DATA=embedded uses the repository's own pairs.",
        ) from error


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line: `datasets` wraps it in exceptions that say only that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, StopIteration):
        return "the file holds no row"
    return first_line(error)


_SCHEMA = (
    "Preference data needs prompt (text), chosen and rejected (lists of {role, content}), "
    "score_chosen and score_rejected (numbers), as HuggingFaceH4/ultrafeedback_binarized has them."
)


def _listed(columns: list[str]) -> str:
    return ", ".join(columns) or "no column"


def _check_columns(split: Dataset, where: str) -> None:
    missing = [c for c in COLUMNS if c not in split.column_names]
    if missing:
        raise DataError(f"{where} has no column {', '.join(missing)}; it has {_listed(split.column_names)}.", _SCHEMA)


def choose_splits(raw: DatasetDict, seed: int) -> tuple[DatasetDict, list[str]]:
    """Find train, val and test by their usual names; cut a missing one from train, by seed, and say so.

    What is cut follows the order of the source: another order of its rows is another cut.
    """
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


# --- the whole set ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """Training-ready splits (prompt_id, prompt, chosen, rejected, token counts) and the account of what was dropped."""

    splits: DatasetDict
    report: dict
    choices: list[str]


def prepare(config: Config, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Load, audit, shuffle and subsample: notebook 04 in one call.

    The report has for each split: `rows`, `dropped` by reason, `examples` (ids), `decoded` (excerpts), `kept`, `used`.

    Raises:
        DataError: as `load_preferences`; no row of a split is usable; or `config.strict` and a row was dropped.
    """
    raw, choices = load_preferences(config)
    splits, report, held_out = {}, {}, set()
    limits = {"train": config.max_train, "val": config.max_val, "test": config.max_test}
    for name in ("test", "val", "train"):  # held-out splits first: a shared prompt is dropped from the other side
        rows = tqdm(_rows(raw[name]), desc=f"checking {name}", total=len(raw[name]), unit="row", leave=False)
        found = audit_split(rows, tokenizer, config.max_tokens, held_out)
        if not found.kept:
            raise _nothing_left(f"{config.data} ({name})", found, raw[name].column_names)
        held_out |= found.prompts
        shuffled = raw[name].select(found.kept).shuffle(seed=config.seed)
        used = shuffled.select(range(min(limits[name], len(shuffled))))
        splits[name] = Dataset.from_list([prepared_row(tokenizer, row) for row in used])
        report[name] = {
            "rows": found.rows,
            "dropped": found.dropped,
            "examples": found.examples,
            "decoded": found.decoded,
            "kept": len(found.kept),
            "used": len(splits[name]),
        }
    order = ("train", "val", "test")
    report = {k: report[k] for k in order}
    if config.strict:
        refuse_dropped(report)
    return Prepared(DatasetDict({k: splits[k] for k in order}), report, choices)


def running_example(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The pair that all six notebooks follow: the first usable row of the test split, as `prepare` makes rows.

    Of the test split, so that the adapter has not been trained on it.

    Raises:
        DataError: as `prepare`.
    """
    split = load_preferences(config)[0]["test"]
    for row in _rows(split):
        if row is not None and audit_split([row], tokenizer, config.max_tokens).kept:
            return prepared_row(tokenizer, row)
    found = audit_split(_rows(split), tokenizer, config.max_tokens)
    raise _nothing_left(f"{config.data} (test)", found, split.column_names)


def _rows(split: Dataset) -> Iterator[dict | None]:
    """Every row by its number, None where its bytes are not UTF-8: iterating a `Dataset` would stop there."""
    for index in range(len(split)):
        try:
            yield split[index]
        except UnicodeDecodeError:
            yield None


def _nothing_left(where: str, found: Audit, columns: list[str]) -> DataError:
    dropped = ", ".join(f"{n} {reason}" for reason, n in Counter(found.dropped).most_common())
    shown = [f"{reason}, for example {texts[0]!r}" for reason, texts in found.decoded.items()]
    mend = (
        "Take a model whose chat template ends an answer with the tokenizer's EOS and takes these turns. "
        if shown
        else "Mend the rows, or raise MAX_TOKENS if most are too long. "
    )
    return DataError(
        f"No usable pair is left in {where}: {dropped or 'it has no row'}. It has the columns {_listed(columns)}."
        + "".join(f" {text}." for text in shown),
        mend + _SCHEMA,
    )


# --- the account --------------------------------------------------------------------------------------------------


def report_rows(report: dict[str, dict]) -> list[dict]:
    """`Prepared.report` as rows for `show.table`: what was dropped (with example ids), kept and used in each split."""
    rows = []
    for split, found in report.items():
        what = {f"dropped: {reason}": (n, found["examples"][reason]) for reason, n in found["dropped"].items()}
        what |= {"kept": (found["kept"], []), "used, after shuffle and limit": (found["used"], [])}
        rows += [{"split": split, "what": w, "rows": n, "examples": ids} for w, (n, ids) in what.items()]
    return rows


def data_report(config: Config, prepared: Prepared) -> dict:
    """The audit as one record, for `data_report.json`: source, limit, totals, and the report of each split."""
    splits = prepared.report.values()
    dropped = sum((Counter(s["dropped"]) for s in splits), Counter())
    total, kept = sum(s["rows"] for s in splits), sum(s["kept"] for s in splits)
    assert total == kept + dropped.total(), "every row is kept or dropped by one reason"
    return {
        "source": config.data,
        "revision": config.data_revision,
        "max_tokens": config.max_tokens,
        "strict": config.strict,
        "choices": prepared.choices,
        "rows": total,
        "kept": kept,
        "dropped": {reason: dropped[reason] for reason in REASONS if dropped[reason]},
        "meaning": {reason: REASONS[reason] for reason in REASONS if dropped[reason]},
        "splits": prepared.report,
    }


def refuse_dropped(report: dict[str, dict]) -> None:
    """What STRICT asks for.

    Raises:
        DataError: a row was dropped (counts by reason, with example ids).
    """
    found = [
        f"{split}: {n} {reason} ({', '.join(part['examples'][reason])})"
        for split, part in report.items()
        for reason, n in part["dropped"].items()
    ]
    if found:
        raise DataError(
            f"STRICT is on, and rows were dropped. {'; '.join(found)}.",
            "Mend these rows in the source, or leave STRICT off to go on without them.",
        )


# --- prepared data ------------------------------------------------------------------------------------------------


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[tuple[str, int]]:
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
    return [f"{p.name} {sha256(p)}" for p in files]
