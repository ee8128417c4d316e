"""Read preference pairs from a file, a folder, a hub id or the package, and choose its splits."""

import json
import re
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from importlib import resources
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Value, load_dataset

from .. import knobs
from ..errors import DataError
from ..knobs import Config
from ..loading import embedded, hub
from ..machine import hardware
from . import reader, reasons, shapes, splits
from .shapes import NotAPair

EMBEDDED_SPLITS = ("train_prefs", "val_prefs", "test_prefs")

_SCORES = ("score_chosen", "score_rejected")
_TURNS = [{"role": Value("string"), "content": Value("string")}]
#: A row of a split: both sides whole, the reason why it is no pair or "", and where it stands in the source.
FEATURES = Features(
    {"prompt_id": Value("string"), "prompt": Value("string"), "chosen": _TURNS, "rejected": _TURNS}
    | dict.fromkeys(_SCORES, Value("float64"))
    | dict.fromkeys(("problem", "place"), Value("string"))
)
_NOTHING = {"prompt_id": "", "prompt": "", "chosen": [], "rejected": []} | dict.fromkeys(_SCORES)

Rows = Iterable[tuple[str, object]]  # as `reader.rows` gives them


# --- load ---------------------------------------------------------------------------------------------------------


def load_preferences(config: Config, judge: bool = False) -> tuple[DatasetDict, list[str]]:
    """Read `config.data` and choose its splits. Every row read is a row of one split, in the schema of `FEATURES`.

    Accepts `embedded`, a file of `reader`'s formats, a folder of such files, or a hub id.

    Args:
        judge: for judging only: the one split `test`, which is all rows where the source has no test split.

    Returns:
        (`DatasetDict` with exactly `train`, `val`, `test`; the choices made, one sentence each).

    Raises:
        DataError: no such file or dataset, unreadable, no row of it is a pair, or too few to cut a split from.
    """
    parts, other = _parts(config)
    used = splits.used(parts, judge).values()
    columns, shape_of, odd, first = shapes.columns(config.data_columns), Counter(), Counter(), {}
    passed: set[str] = set()

    def pairs(rows: Rows) -> Iterator[dict]:
        for place, row in rows:
            pair, said = as_pair(place, row, columns)
            if problem := pair["problem"]:
                odd[problem] += 1
                first.setdefault(problem, f"{place}: {said}")
            else:
                shape_of[said] += 1
                passed.update(shapes.left_alone(row, columns))
            yield pair

    raw = DatasetDict({name: _dataset(pairs(parts[name]())) for name in used})
    if not any(raw.values()):
        raise DataError(f"DATA={config.data} holds no row.", "Give a source with rows.")
    if not shape_of:
        (most, _), *_ = odd.most_common()
        counts = ", ".join(f"{n:,} {reason}" for reason, n in odd.most_common())
        told = f"{first[most]}."
        if most == "missing column":
            told += " " + shapes.describe(next(row for row, pair, _ in read(config, judge) if pair["problem"] == most))
        raise DataError(f"DATA={config.data} holds no preference pair: {counts}. {told}", reasons.fix_of(most))
    chosen, said = splits.choose_splits(raw, config.seed, judge)
    if other := [*sorted(set(parts) - set(used)), *other]:
        said.append(f"left alone: {', '.join(other[:9])}" + (f" and {len(other) - 9} more" if other[9:] else ""))
    if passed:
        said.append(f"columns left alone: {', '.join(sorted(map(str, passed))[:9])}")
    said += [f"read as: {shape}: {n:,} rows" for shape, n in shape_of.most_common()]
    return chosen, said + [f"{reason}: {n:,} rows, first {first[reason]}" for reason, n in odd.most_common()]


def rejected_kinds() -> dict[str, str]:
    """prompt_id → what is wrong with the rejected answer, of the repository's own set.

    "base sample" was drawn from the base; "form" was written to break the style; the others keep the form and fail in
    substance (`resources/README.md` says how).
    """
    return {row["prompt_id"]: row["rejected_kind"] for row in embedded_rows("provenance")}


def read(config: Config, judge: bool = False) -> Iterator[tuple[object, dict, str]]:
    """The rows of a source, one at a time.

    Yields:
        (the row as it comes; as the splits hold it; the name of its shape, or why it is no pair).

    Raises:
        DataError: as `load_preferences`, but not for what the rows hold.
    """
    parts, _ = _parts(config)
    columns = shapes.columns(config.data_columns)
    for name in splits.used(parts, judge).values():
        for place, row in parts[name]():
            yield row, *as_pair(place, row, columns)


def before_and_after(config: Config) -> tuple[object, dict, str]:
    """The first pair of a source, as `read` gives it.

    Raises:
        DataError: as `load_preferences`.
    """
    found = next((found for found in read(config) if not found[1]["problem"]), None)
    if not found:
        raise DataError(f"DATA={config.data} holds no preference pair.", reasons.NO_PAIR)
    return found


def as_pair(place: str, row: object, columns: Mapping[str, str]) -> tuple[dict, str]:
    """(A row as the splits hold it; the name of its shape, or why it is no pair)."""
    problem = ""
    try:
        if isinstance(row, NotAPair):
            raise row
        pair, said = shapes.to_pair(row, columns)
        turns = (text for side in ("chosen", "rejected") for turn in pair[side] for text in turn.values())
        "".join((pair["prompt_id"], pair["prompt"], *turns)).encode()
    except NotAPair as error:
        pair, said, problem = _NOTHING, error.detail, error.reason
    except UnicodeEncodeError:
        pair, said, problem = _NOTHING, "a lone surrogate or a byte that is not UTF-8", "invalid text"
    return pair | {"problem": problem, "place": place}, said


def _dataset(pairs: Iterator[dict]) -> Dataset:
    """The pairs as Arrow, batch by batch: never all of them as Python objects."""
    schema, batches = FEATURES.arrow_schema, []
    while batch := list(islice(pairs, 256)):
        batches.append(pa.RecordBatch.from_pylist(batch, schema=schema))
    table = pa.Table.from_batches(batches, schema=schema)
    return Dataset(table, fingerprint=secrets.token_hex(8))  # else `datasets` makes one of a copy of all bytes


# --- where rows are -----------------------------------------------------------------------------------------------


def files(config: Config) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of a local source by the name of their split, and what of a folder is left alone; none of a hub id.

    Raises:
        DataError: no such path, a file of no known format, or files of one split that may hold the same rows.
    """
    spec, path = config.data, Path(config.data).expanduser()
    if spec == knobs.EMBEDDED:
        return {split: [embedded_file(split)] for split in EMBEDDED_SPLITS}, []
    if path.is_dir():
        return splits.of_folder(path)
    if path.is_file():
        if not reader.kind(path):
            raise DataError(f"DATA={spec} is a file of no known format.", reader.FORMATS)
        return {"train": [path]}, []
    if path.suffix.lower() in reader.SUFFIXES or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", spec):
        fix = "Give the path of an existing file or folder, or a hub id."
        raise DataError(f"DATA={spec} does not exist (looked in {Path.cwd()}).", fix)
    return {}, []


def _parts(config: Config) -> tuple[dict[str, Callable[[], Rows]], list[str]]:
    """What gives the rows of each split of the source, and the files of a folder that are left alone."""
    local, other = files(config)
    if local:
        by_hand = shapes.columns(config.data_columns)
        numbers = {name for names in shapes.SCORES for name in names} | {by_hand.get(name, name) for name in _SCORES}
        return {name: partial(_of_files, paths, numbers) for name, paths in local.items()}, other
    try:
        loaded = load_dataset(config.data, revision=config.data_revision)
    except Exception as error:  # datasets raises a dozen unrelated types for "cannot read this"
        cause, fix = hub.why(error)
        without = " Without a hub, DATA=embedded uses the repository's own pairs."
        raise DataError(
            f"DATA={config.data} could not be read: {cause}. No file or folder here has that name.", fix + without
        ) from error
    return {name: partial(_of_hub, split, name) for name, split in loaded.items()}, other


def _of_files(paths: list[Path], numbers: Collection[str]) -> Rows:
    return chain.from_iterable(reader.rows(path, numbers) for path in paths)


def _of_hub(split: Dataset, name: str) -> Rows:
    return reader.tables(split.with_format("arrow").iter(batch_size=256), name)


def embedded_file(split: str) -> Path:
    """Path of one split of the repository's own preference set (`train_prefs`, `val_prefs`, `test_prefs`)."""
    return Path(str(resources.files("dpo_tutorial.pairs") / "resources" / f"{split}.jsonl"))


def embedded_rows(name: str) -> list[dict]:
    """The lines of a split of the set, or of what lies beside it: `provenance`, `instructions`, `dirty_rows`."""
    return [json.loads(line) for line in embedded_file(name).read_text(encoding="utf-8").splitlines()]


def dirty_rows() -> list[dict]:
    """Rows made bad on purpose, for the audit lesson of notebook 04; no split reads them.

    Each has `expected`: the reason of `REASONS` that `row_problem` must find, None for the one sound row.
    """
    return embedded_rows("dirty_rows")


def ultrafeedback_counts() -> dict:
    """Counts of 1,000 rows of UltraFeedback, no text of any row; made by `scripts/ultrafeedback_counts.py`."""
    path = embedded_file("train_prefs").with_name("ultrafeedback_counts.json")
    return json.loads(path.read_text(encoding="utf-8"))


def or_hub(model: str = "", data: str = "") -> tuple[tuple[str, str | None], tuple[str, str | None]]:
    """Where the quickstart reads model and pairs from: as (hub id or folder, commit), the commit of a pinned id.

    Args:
        model: a hub id, a folder, or "embedded"; empty takes Qwen2.5-0.5B-Instruct where there is a GPU, else the
            embedded model.
        data: likewise; empty takes UltraFeedback where there is a GPU, else the repository's own pairs.

    Raises:
        As `ensure_embedded_model`.
    """
    gpu = hardware.device() == "cuda"
    model = model or (knobs.QWEN_SMALL[0] if gpu else knobs.EMBEDDED)
    data = data or (knobs.ULTRAFEEDBACK[0] if gpu else knobs.EMBEDDED)
    if model == knobs.EMBEDDED:
        model = str(embedded.ensure_embedded_model())
    if data == knobs.EMBEDDED:
        data = str(embedded_file("train_prefs").parent)
    return (model, knobs.PINNED.get(model)), (data, knobs.PINNED.get(data))
