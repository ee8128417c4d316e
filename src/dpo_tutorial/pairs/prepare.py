"""Prepared pairs: every row checked (`row_checks`), shuffled, subsampled, and an account of what was dropped."""

from collections import Counter
from dataclasses import dataclass

from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..knobs import Config
from ..loading import templates
from . import sources
from .reasons import REASONS, fix_of
from .row_checks import Audit, audit_split, prepared_row


@dataclass(frozen=True)
class Prepared:
    """Training-ready splits (prompt_id, prompt, chosen, rejected, token counts) and the account of what was dropped."""

    splits: DatasetDict
    report: dict
    choices: list[str]


def prepare(config: Config, tokenizer: PreTrainedTokenizerBase, judge: bool = False) -> Prepared:
    """Load, audit, shuffle and subsample: notebook 04 in one call.

    With `judge` nothing is to be trained, and there is a `test` split alone (`sources.load_preferences`).

    The report has for each split: `rows`, `dropped` by reason, `examples` (ids), `decoded` (excerpts), `kept`, `used`.

    Raises:
        DataError: as `load_preferences`; no row of a split is usable; or `config.strict` and a row was dropped.
    """
    raw, choices = sources.load_preferences(config, judge)
    choices = [*choices, *_notes(raw, tokenizer)]
    splits, report, held_out = {}, {}, set()
    limits = {"train": config.max_train, "val": config.max_val, "test": config.max_test}
    for name in reversed(raw):  # held-out splits first: a shared prompt is dropped from the other side
        rows = tqdm(raw[name], desc=f"checking {name}", unit="row", leave=False)
        found = audit_split(rows, tokenizer, config.max_tokens, held_out)
        if not found.kept:
            raise _nothing_left(f"{config.data} ({name})", found)
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
    report = {k: report[k] for k in raw}
    if config.strict:
        refuse_dropped(report)
    return Prepared(DatasetDict({k: splits[k] for k in raw}), report, choices)


def _notes(raw: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the account says once: what was settled in the template, and splits without a score."""
    options = templates.template_options(tokenizer)
    said = [f"chat template: {name} is {value}" for name, value in options.items() if name != "turn_end"]
    unscored = [name for name, rows in raw.items() if not any(score is not None for score in rows["score_chosen"])]
    why = "no scores, so chosen is taken at its word: ties and flipped labels could not be looked for"
    return said + [f"{', '.join(unscored)}: {why}"] * bool(unscored)


def running_example(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The pair that all six notebooks follow: the first usable row of the test split, as `prepare` makes rows.

    Of the test split, so that the adapter has not been trained on it.

    Raises:
        DataError: as `prepare`.
    """
    split = sources.load_preferences(config)[0]["test"]
    for row in split:
        if audit_split([row], tokenizer, config.max_tokens).kept:
            return prepared_row(tokenizer, row)
    raise _nothing_left(f"{config.data} (test)", audit_split(split, tokenizer, config.max_tokens))


def _nothing_left(where: str, found: Audit) -> DataError:
    most = Counter(found.dropped).most_common()
    dropped = ", ".join(f"{n} {reason}" for reason, n in most) or "it has no row"
    shown = "".join(f" {reason}, for example {texts[0]!r}." for reason, texts in found.decoded.items())
    shown += "".join(f" {reason}: {REASONS[reason]}." for reason, _ in most[:1])
    fix = fix_of(most[0][0] if most else "")
    return DataError(f"No usable pair is left in {where}: {dropped}.{shown}", fix)


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
        "source": config.identity()["data"],
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
            "Fix these rows in the source, or leave STRICT off to go on without them.",
        )
