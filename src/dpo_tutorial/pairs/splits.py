"""The splits of a source: found by their usual names among files or splits, and cut by prompt where one is missing."""

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from datasets import Dataset, DatasetDict, concatenate_datasets

from ..errors import DataError
from . import reader, row_checks

#: Names of each split, first hit wins; "-" counts as "_". What is missing is cut from the training split, by prompt.
SPLIT_NAMES = {
    "train": ("train_prefs", "train", "training"),
    "val": ("val_prefs", "validation", "valid", "val", "dev"),
    "test": ("test_prefs", "test", "testing", "eval", "evaluation", "held_out", "heldout", "holdout"),
}
_KNOWN = {name for names in SPLIT_NAMES.values() for name in names}


# --- of a folder --------------------------------------------------------------------------------------------------


def of_folder(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Each file of rows by its split: what it is called, else the folder it lies in. A single unknown name is train."""
    found, other = {}, []
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in place.parts):
            continue
        if path.name in _NO_ROWS or path.name.startswith("cache-") or not reader.kind(path):
            other.append(place.as_posix())
            continue
        parts = (*path.name.split("."), *place.parent.parts[::-1])  # pairs.train.jsonl is train
        names = [re.sub(r"\W", "_", _SHARD.sub("", part).lower()) for part in parts]
        found.setdefault(next((n for n in names if n in _KNOWN), names[0]), []).append(path)
    if not found:
        raise DataError(f"DATA={folder} holds no file of rows.", reader.FORMATS)
    if not _KNOWN & set(found) and not any(re.search("train|test|val|dev|held", name) for name in found):
        found = {"train": [path for paths in found.values() for path in paths]}
    for name, paths in found.items():
        if len({(reader.kind(path), path.suffix.lower()) for path in paths}) > 1:
            same = ", ".join(path.name for path in paths)
            raise DataError(
                f"DATA={folder} has {same} for {name}, which may be the same rows.", "Keep files of one kind."
            )
    return found, other


_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of `save_to_disk`
_SHARD = re.compile(r"[-_]\d+(-of-\d+(-[0-9a-f]+)?)?$")  # train-00000-of-00002, part_7


# --- of a source --------------------------------------------------------------------------------------------------


def usual(names: Collection[str]) -> dict[str, str]:
    """Which of these splits is our train, val and test, by `SPLIT_NAMES`; one that is not there is left out."""
    found = {ours: next((n for n in theirs if n in names), None) for ours, theirs in SPLIT_NAMES.items()}
    return {ours: name for ours, name in found.items() if name}


def used(names: Collection[str], judge: bool = False) -> dict[str, str]:
    """The `usual` splits that are read; to be judged, the test split alone where there is one.

    Raises:
        DataError: no training split, or no usual name at all.
    """
    found = usual(names)
    if not found or not (judge or "train" in found):
        fix = f"Name it {' or '.join(SPLIT_NAMES['train'])}."
        raise DataError(f"No training split among {', '.join(names)}.", fix)
    return {"test": found["test"]} if judge and "test" in found else found


def choose_splits(raw: Mapping[str, Dataset], seed: int, judge: bool = False) -> tuple[DatasetDict, list[str]]:
    """Find train, val and test by their usual names; cut a missing one from train by prompt, and say so.

    What is cut follows from the seed and the prompts alone: all rows of a prompt go together, in any order of the rows.

    Args:
        raw: by the names of the source; each with a column `chosen`, a conversation.

    Raises:
        DataError: no training split, or too few prompts.
    """
    names = used(raw, judge)
    said = [f"{ours}: split '{name}', {len(raw[name]):,} rows" for ours, name in names.items()]
    if judge:
        test = concatenate_datasets([raw[name] for name in names.values()])
        whole = f"test: no such split, so all {len(test):,} rows, to be judged"
        return DatasetDict(test=test), said if "test" in names else [whole]
    found = {ours: raw[name] for ours, name in names.items()}
    missing = [ours for ours in ("val", "test") if ours not in found]
    if missing:
        batches = found["train"].select_columns("chosen").iter(batch_size=256)
        sides = (side for batch in batches for side in batch["chosen"])
        keys = [row_checks.prompt_digest(side[:-1]) if side[1:] else b"" for side in sides]
        left = sorted(set(keys) - {b""}, key=lambda key: hashlib.sha256(f"{seed} ".encode() + key).digest())
        train, prompts = found["train"], len(left)
    for ours in missing:
        if len(left) < 10:
            raise DataError(
                f"{len(train):,} rows of {prompts:,} prompts are too few to cut {' and '.join(missing)} from.",
                f"Give at least {8 + 2 * len(missing)} prompts; DATA_COLUMNS says which column holds them.",
            )
        tenth = -(-len(left) // 10)
        cut, left, total = set(left[:tenth]), left[tenth:], len(left)
        found[ours] = train.select([i for i, key in enumerate(keys) if key in cut])
        rows = f"{len(found[ours]):,} rows cut from train with seed {seed}"
        said.append(f"{ours}: no such split, so {tenth:,} of {total:,} prompts, {rows}")
    if missing:
        stays = {*left, b""}
        found["train"] = train.select([i for i, key in enumerate(keys) if key in stays])
    return DatasetDict({k: found[k] for k in ("train", "val", "test")}), said
