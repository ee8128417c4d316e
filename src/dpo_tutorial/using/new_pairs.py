"""`dpo-tutorial pairs --adapter DIR --out PLACE`: new pairs from the policy's own answers, best and worst of n."""

import json
import math
import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .. import run_folder
from ..adapter import lora
from ..comparing import generation
from ..errors import ArtifactError, ConfigError, DataError, first_line
from ..knobs import Config
from ..loading import models
from ..pairs import house_style, prepare, row_checks, shapes, sources
from . import merge, served

HOUSE_STYLE = "house-style"


def prompts_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[dict]], dict[str, list[dict]]]:
    """The prompts of `config.data`: of pairs those that training sees, of a file of prompts alone every one.

    Returns:
        (conversations that end with the user's turn; the held-out pairs `val` and `test`, where there are pairs).

    Raises:
        DataError: as `prepare.prepare`, or a row of prompts holds none.
    """
    rows = list(sources.read(config)) if Path(config.data).expanduser().is_file() else []
    if rows and all(pair["problem"] for _, pair, _ in rows):
        by_hand, two = shapes.columns(config.data_columns), {"chosen": "A.", "rejected": "B."}
        by_hand = {ours: theirs for ours, theirs in by_hand.items() if ours not in two}
        pairs = [sources.as_pair("", row | two, by_hand)[0] for row, _, _ in rows if isinstance(row, dict)]
        found = [pair["chosen"][:-1] for pair in pairs if not row_checks.row_problem(pair)]
        if len(found) < len(rows):
            cause = f"{len(rows) - len(found)} of {len(rows)} rows of {config.data} hold no prompt."
            raise DataError(cause, "Write one a line, in a column prompt: text, or messages up to the user's.")
        return found, {}
    raw, columns = sources.load_preferences(config)[0], ["prompt_id", *row_checks.COLUMNS]
    held_out = {name: [row for row in raw[name].select_columns(columns) if row["chosen"]] for name in ("val", "test")}
    return list(prepare.prepare(config, tokenizer).splits["train"]["prompt"]), held_out


def scores_of(rank: str, prompts: Sequence[list[dict]], answers: Sequence[Sequence[dict]]) -> list[list[float]]:
    """Score the answers to each prompt; higher is better.

    Args:
        rank: "house-style" counts the rules kept (`house_style.RULES`). An address that begins with http is a served
            model, which is asked for a mark from 1 to 10; an answer to which it writes none gets 0. Anything else is a
            program, which reads a line {"prompt": conversation, "answers": [text, …]} for each prompt and writes a line
            of as many numbers.
        answers: as `generation.generate` gives them, those of each prompt together.

    Raises:
        ConfigError: the program does not start, fails, or writes something else; the model gives no mark at all.
        ServerError: as `served.stream`.
    """
    if rank == HOUSE_STYLE:
        return [[float(sum(keeps(a) for keeps in house_style.RULES.values())) for a in of_one] for of_one in answers]
    if rank.startswith("http"):
        return _marks(rank, prompts, answers)
    asked = [{"prompt": p, "answers": [a["text"] for a in of_one]} for p, of_one in zip(prompts, answers, strict=True)]
    try:
        done = subprocess.run(
            shlex.split(rank, posix=os.name != "nt"), input=_lines(asked).encode(), stdout=subprocess.PIPE, check=True
        )
        lines = [line.strip(" []").replace(",", " ").split() for line in done.stdout.decode().splitlines()]
        if len(lines) != len(asked):
            raise ValueError(f"it wrote {len(lines)} lines for {len(asked)} prompts")
        for words, of_one in zip(lines, answers, strict=True):
            if len(words) != len(of_one) or not all(map(math.isfinite, map(float, words))):
                raise ValueError(f"it wrote “{' '.join(words)[:80]}” for {len(of_one)} answers, not as many numbers")
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        cause = f"The ranking {rank!r} gives no scores: {first_line(error).rstrip('.')}."
        raise ConfigError(cause, "Mend the program; docs/using.md shows one.") from error
    return [list(map(float, words)) for words in lines]


def _marks(url: str, prompts: Sequence[list[dict]], answers: Sequence[Sequence[dict]]) -> list[list[float]]:
    marks, said = [], ""
    for prompt, of_one in tqdm(list(zip(prompts, answers, strict=True)), desc="asking for marks", leave=False):
        marks.append([])
        for answer in of_one:
            said = "".join(served.stream(url, "", [{"role": "user", "content": _asking(prompt, answer["text"])}], 8))
            found = re.search(r"\b(10|[1-9])\b", said)
            marks[-1].append(float(found[0]) if found else 0.0)
    if not any(map(any, marks)):
        cause = f"The model at {url} gives no mark from 1 to 10; it wrote “{said.strip()[:80]}”."
        raise ConfigError(cause, "Serve a larger model, or give --rank a program.")
    return marks


def _asking(prompt: list[dict], answer: str) -> str:
    talk = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    return f"{talk}\n\nassistant: {answer}\n\nHow good is the last answer, from 1 (bad) to 10? Write the number alone."


def make(
    config: Config, policy: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[dict]], *,
    n: int = 4, rank: str = HOUSE_STYLE, seed: int = 0,
) -> tuple[list[dict], dict[str, int]]:  # fmt: skip
    """Draw `n` answers to each prompt from the policy, at temperature 1, and pair the best with the worst.

    Returns:
        (rows `prompt`, `chosen`, `rejected` as messages, `score_chosen`, `score_rejected`, fit to train on; how many
        were dropped, by reason as in `row_checks`; and of the answers, how many the token limit `cut`).

    Raises:
        ConfigError, DataError: as `scores_of`; or no pair is left.
    """
    scores_of(rank, prompts[:1], [[{"text": f"{i}.", "finished": True} for i in range(n)]])  # fails now, if it fails
    drawn = generation.generate(config, policy, tokenizer, [p for p in prompts for _ in range(n)], seed=seed)
    answers, rows = [drawn[at : at + n] for at in range(0, len(drawn), n)], []
    for prompt, of_one, scores in zip(prompts, answers, scores_of(rank, prompts, answers), strict=True):
        best = max(range(n), key=scores.__getitem__)
        worst = min(reversed(range(n)), key=scores.__getitem__)  # another one than the best where all are equal: a tie
        row: dict = {"prompt": prompt}
        for side, at in (("chosen", best), ("rejected", worst)):
            row[side] = [{"role": "assistant", "content": of_one[at]["text"]}]
            row[f"score_{side}"] = scores[at]
        rows.append(row)
    found = row_checks.audit_split((shapes.to_pair(row)[0] for row in rows), tokenizer, config.max_tokens)
    if not found.kept:
        told = ", ".join(f"{number} {reason}" for reason, number in found.dropped.items())
        raise DataError(f"No pair is left of {len(prompts)}: {told}.", "Raise --n, or take another --rank.")
    return [rows[i] for i in found.kept], found.dropped | {"cut": sum(not a["finished"] for a in drawn)}


def main(adapter: str, prompts: str, out: str, parameters: dict[str, str], *, n: int, rank: str, seed: int) -> None:
    """Write new pairs whole or not at all: into a file `.jsonl`, or a folder with the held-out pairs beside them.

    Raises:
        ConfigError, ArtifactError, DataError: `n` is below 2; `out` is there already; and what the others here raise.
    """
    place = Path(out).expanduser()
    if n < 2:
        raise ConfigError(f"--n {n} leaves nothing to choose from.", "Give 2 or more.")
    if place.exists():
        raise ArtifactError(f"{out} is there already.", "Give --out a new name, or remove it.")
    config = merge.config_of(adapter, parameters, prompts=prompts)
    tokenizer = models.load_tokenizer(config)
    asked, held_out = prompts_of(config, tokenizer)
    rows, account = make(config, lora.load_policy(config, adapter), tokenizer, asked, n=n, rank=rank, seed=seed)
    if place.suffix == ".jsonl":
        run_folder.write_text(place, _lines(rows))
    else:
        with run_folder.Run.replacing(place) as folder:
            for name, of_split in ({"train": rows} | held_out).items():
                (folder / f"{name}.jsonl").write_text(_lines(of_split), encoding="utf-8")
    cut = f"{account.pop('cut')} of {n * len(asked)} answers were cut at MAX_NEW_TOKENS={config.max_new_tokens}"
    dropped = "".join(f", {number} dropped ({reason})" for reason, number in account.items())
    print(f"wrote {out}: {len(rows)} pairs of {len(asked)} prompts{dropped}; {cut}")


def _lines(rows: Sequence[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
