"""Judge the change: implicit rewards on held-out pairs, answers before and after, how far the policy moved.

`dpo-tutorial compare --adapter DIR` gives the report of notebook 06 without a notebook.
"""

from pathlib import Path

from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from .. import knobs, run_folder
from ..adapter import lora
from ..config import other_data, resolve
from ..errors import DataError
from ..knobs import Config
from ..loading import models
from ..machine import hardware
from ..pairs import house_style, prepare, sources
from ..training import save, scoring
from . import baselines, generation, instructions, stats, verdict

EVERY_PAIR = 2**31 - 1  # the MAX_TEST of data given to judge an adapter on, where nobody sets one


def compare(
    config: Config, policy: PeftModel, tokenizer: PreTrainedTokenizerBase, splits, beta: float
) -> tuple[list[dict], dict]:
    """Everything notebook 06 measures, in one call.

    Args:
        splits: `test` and, for the word-counting opponent, `train`, as `prepare.prepare` makes them. Without `train`
            that opponent is left out.

    Returns:
        (the row-level records, the comparison as `derive` makes it).
    """
    test, requests = splits["test"], instructions.some(config.instructions)
    prompts, asked = test[: config.compare_prompts]["prompt"], instructions.conversations(requests)
    records = scoring.score_pairs(config, policy, tokenizer, test, beta)
    words = baselines.bag_of_words(splits["train"], test) if "train" in splits else None
    kl, kl_asked = generation.kl_from_base(config, policy, tokenizer, *map(generation.every_second, (prompts, asked)))
    before, after = generation.answers_of_both(config, policy, tokenizer, prompts + asked)
    measured = dict(
        noise=scoring.noise_floor(config, policy, tokenizer, test, records, beta),
        kl=kl,
        instructions=instructions.check(requests, before[len(prompts) :], after[len(prompts) :], kl_asked),
        verdicts=baselines.judges(records, words),
        kinds=kinds_of(config, test),
        shown=[scoring.token_rewards(tokenizer, *both) for both in zip(test, records[:3], strict=False)],
        target=generation.chosen_answers(tokenizer, test, len(prompts)),
    )
    return records, derive(records, prompts, before[: len(prompts)], after[: len(prompts)], **measured)


def kinds_of(config: Config, pairs: Dataset) -> list[str] | None:
    """What is wrong with each pair's rejected answer, where that is noted: of the repository's own set."""
    if config.data != knobs.EMBEDDED:
        return None
    kinds = sources.rejected_kinds()
    return [kinds.get(prompt_id, "not noted") for prompt_id in pairs["prompt_id"]]


def derive(records, prompts, before, after, *, noise, kl, instructions, verdicts, kinds, shown, target=()) -> dict:
    """The report, derived from what was measured: statistics with intervals, and the conclusion in words."""
    rules, form = stats.corrected(
        stats.rules(before, after, house_style.RULES, target), stats.form(before, after, target)
    )
    cut = stats.equal_length(before, after)
    same_length, same_form = stats.corrected(stats.rules(*cut, house_style.OF_TEXT), stats.form(*cut))
    found = {
        "held_out": {"before": stats.summarise(stats.untrained(records)), "after": stats.summarise(records)},
        "noise": noise,
        "against": baselines.against(records, verdicts),
        "by_kind": baselines.by_kind(records, verdicts, kinds) if kinds else {},
        "by_position": stats.reward_by_position(records),
        "kl": {"inside": kl, "outside": instructions["kl"]},
        "rules": rules,
        "form": form,
        "same_length": same_length,
        "same_form": same_form,
        "instructions": instructions,
        "token_rewards": shown,
        "answers": [{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)],
    }
    return found | {"verdict": verdict.verdict(found)}


def _other_pairs(config: Config, tokenizer: PreTrainedTokenizerBase, adapter: Path) -> DatasetDict:
    """As `test`, the usable pairs of `config.data` whose prompts the adapter was not trained on; says what it drops."""
    prepared = prepare.prepare(config, tokenizer, judge=True)
    held_out = save.held_out(adapter, prepared.splits["test"])
    (account,) = prepared.report.values()
    dropped = "".join(f", {n} dropped ({reason})" for reason, n in account["dropped"].items())
    seen = account["used"] - len(held_out)
    print(f"{config.data}: {account['rows']} rows{dropped}; {seen} left out, because it was trained on their prompts.")
    if not held_out:
        raise DataError(f"The adapter was trained on all usable pairs of {config.data}.", "Give pairs it has not seen.")
    return DatasetDict({"test": held_out})


def write_report(adapter: str, source: str, out: str, parameters: dict[str, str]) -> None:
    """Judge the adapter in a folder: `comparison.json`, `records.json` and one self-contained `report.html` in `out`.

    Args:
        source: hub id[@revision], folder or file with pairs to judge it on: its test split, else all of it, less the
            pairs it was trained on; "" for the test split of what it was trained on.

    Raises:
        ArtifactError: no adapter, one of another base, or one that was trained on its test split.
        DataError: nothing to judge it on.
    """
    from . import report  # here, because report.py draws and this module need not

    folder = Path(adapter)
    record = save.read_training_record(folder)
    recorded = save.recorded(folder)
    if source:
        recorded, parameters = other_data(recorded | {"max_test": EVERY_PAIR}, source, "--data", parameters)
    config = resolve(recorded, **parameters)
    hardware.seed_everything(config.seed)
    lora.check_adapter(config, folder)  # before anything is fetched
    tokenizer = models.load_tokenizer(config)
    run = run_folder.Run(config, Path(out))
    if source:
        splits = _other_pairs(config, tokenizer, folder)
    else:
        splits = prepare.prepare(config, tokenizer).splits  # not kept: `out` is a folder to show
        save.check_held_out(folder, splits["test"])
    policy = lora.load_policy(config, folder)
    records, comparison = compare(config, policy, tokenizer, splits, record["config"]["beta"])
    for path in report.save(run, record, records, comparison):
        print(f"wrote {path}")
    print("\n".join(comparison["verdict"]))
