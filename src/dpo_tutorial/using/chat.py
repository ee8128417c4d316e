"""`dpo-tutorial chat`: base and policy answer side by side, each in its own conversation; or a merged model alone."""

import sys
import textwrap
from collections.abc import Collection, Iterator
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapter import lora
from ..config import resolve
from ..errors import ArtifactError
from ..knobs import Config
from ..loading import models
from ..pairs import encoding
from ..training import dpo, scoring
from . import engines, merge

WIDTH = 79  # of all columns with what is between them


def plain(text: str) -> str:
    """What a terminal may show of a model's text: no escape sequence, no other control character, no change of line
    direction; line breaks stay."""
    return "".join(c if c == "\n" or c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def stream(
    config: Config, policy: PreTrainedModel | PeftModel, ids: list[int], ends: Collection[int], base: bool = False
) -> Iterator[int]:
    """Greedy tokens one by one, up to and including the first of `ends`, at most `config.max_new_tokens`.

    With `base` the adapter is off, but only while a token is made, so that both can take turns.
    """
    step, cache = torch.tensor([ids], device=policy.device), None
    for _ in range(config.max_new_tokens):
        with torch.no_grad(), scoring.autocast(config), policy.disable_adapter() if base else nullcontext():
            out = policy(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, step = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        yield step.item()
        if step.item() in ends:
            return


class Chat:
    """A conversation for each of `names`, with the same questions, and the token ids of the last answers."""

    def __init__(
        self, config: Config, policy: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, *names: str
    ) -> None:
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        self.turns: dict[str, list[dict]] = {name: [] for name in names or ("base", "policy")}
        self.last: dict[str, tuple[list[int], list[int]]] = {}

    def ask(self, question: str) -> Iterator[tuple[dict[str, str], bool]]:
        """What each has answered so far, after every token, and whether both are done."""
        for who, turns in self.turns.items():
            turns.append({"role": "user", "content": question})
            ids = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            self.last[who] = ids, []
        ends = models.generate_arguments(self.policy, self.tokenizer)["eos_token_id"]
        writing = {
            who: stream(self.config, self.policy, ids, ends, base=who == "base") for who, (ids, _) in self.last.items()
        }
        texts = dict.fromkeys(writing, "")
        while writing:
            for who, tokens in list(writing.items()):
                token = next(tokens, None)
                if token is None:
                    del writing[who]
                    continue
                self.last[who][1].append(token)
                texts[who] = self.tokenizer.decode(self.last[who][1], skip_special_tokens=True).removesuffix("\ufffd")
            yield dict(texts), not writing
        for who, turns in self.turns.items():
            turns.append({"role": "assistant", "content": texts[who]})

    def heat(self) -> dict[str, list[tuple[str, float]]]:
        """The last answers as (text, reward) pairs: beta times the log-ratio of policy to base.

        Empty before the first answer, and where the base is not beside the policy.

        A positive reward: the policy would rather write this than the base would.
        """
        answers = list(self.last.values())
        if not answers or "base" not in self.turns:
            return {}
        ours, theirs = scoring.answer_log_probs(self.config, self.policy, self.tokenizer, answers)
        found = {}
        for who, (_, ids), a, b in zip(self.last, answers, ours, theirs, strict=True):
            rewards = dpo.implicit_reward(a, b, self.config.beta).tolist()
            found[who] = encoding.pieces(self.tokenizer, ids, rewards)
        return found


class Columns:
    """Growing texts in columns under their names, printed line by line; on a terminal the last line is redrawn."""

    def __init__(self) -> None:
        self.printed = 0

    def show(self, texts: dict[str, str], done: bool) -> None:
        width = (WIDTH - 3 * (len(texts) - 1)) // len(texts)

        def laid(text: str) -> list[str]:
            return [line for part in plain(text).strip().split("\n") for line in textwrap.wrap(part, width) or [""]]

        def line(at: int) -> str:
            return " | ".join(f"{column[at] if at < len(column) else '':{width}}" for column in columns)

        columns = [[name, "-" * width, *laid(text)] for name, text in texts.items()]
        whole = max(map(len, columns)) if done else min(map(len, columns)) - 1
        back = "\r" if sys.stdout.isatty() else ""
        for at in range(self.printed, whole):
            print(back + line(at))
        self.printed = max(self.printed, whole)
        if back and not done:
            print(back + line(self.printed), end="", flush=True)


def questions() -> Iterator[str]:
    """What is typed, without empty lines, until `/quit` or the end of standard input."""
    with suppress(EOFError, KeyboardInterrupt):
        while (question := input("\n> ").strip()) != "/quit":
            if question:
                yield question


def opened(adapter: str, merged: str, parameters: dict[str, str]) -> Chat:
    """An adapter on its base, or, where there is none, a merged folder, which plain transformers loads.

    Raises:
        ArtifactError: as `merge.config_of`; `merged` is no folder that `export --to merged` wrote.
        ModelUnsuitableError: as `engines.opened`.
    """
    if adapter:
        config = merge.config_of(adapter, parameters)
        return Chat(config, lora.load_policy(config, adapter), models.load_tokenizer(config))
    if not (Path(merged) / "config.json").is_file():
        fix = "Make one: dpo-tutorial export --adapter DIR --to merged."
        raise ArtifactError(f"{merged} is no merged model: there is no config.json in it.", fix)
    with redirect_stdout(None):  # model and data of the profile have no part in this
        config = resolve({"dtype": "fp16" if torch.cuda.is_available() else "fp32"}, **parameters)
    model = engines.opened(Path(merged), config)
    assert isinstance(model, engines.Transformers)
    return Chat(config, model.model, model.tokenizer, "merged")


def main(adapter: str, merged: str, parameters: dict[str, str]) -> None:
    """Answer what is typed."""
    chat = opened(adapter, merged, parameters)
    print("Greedy answers. /heat: token rewards of the last answers, with --adapter. /quit: end.")
    for question in questions():
        if question == "/heat":
            for who, tokens in chat.heat().items():
                print(f"{who}: reward {sum(reward for _, reward in tokens):+.2f}")
                print(" ".join(f"{plain(text).strip() or '␣'}[{reward:+.2f}]" for text, reward in tokens))
        else:
            columns = Columns()
            for texts, done in chat.ask(question):
                columns.show(texts, done)
