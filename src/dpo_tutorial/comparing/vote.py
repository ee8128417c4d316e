"""The reader votes, blind: which of two answers is better?"""

import html
import os
import random
from collections.abc import Sequence

from IPython.display import display

from .. import show
from . import stats

TIE = "tie"


class BlindVote:
    """A vote in the notebook between answers A and B, in an order drawn with `seed` that the page does not give away.

    At most `limit` pairs are shown, none with identical texts. After the last vote `widget` shows the result and takes
    no vote back, since it would no longer be blind.
    """

    def __init__(self, prompts, before: Sequence[dict], after: Sequence[dict], seed: int, limit: int = 10) -> None:
        import ipywidgets as widgets  # here, because a headless run needs none

        draw = random.Random(seed)
        rows = [row for row in zip(prompts, before, after, strict=True) if row[1]["text"] != row[2]["text"]]
        draw.shuffle(rows)  # and then, for each row, which model is A and which is B
        self._pairs = [(p, {"base": b, "policy": a}, draw.sample(("base", "policy"), 2)) for p, b, a in rows[:limit]]
        self._cast: list[str] = []  # "A", "B" or TIE, one per pair so far
        side = widgets.Layout(flex="1 1 18em", border="1px solid #8886", padding="0 0.8em 0.5em", margin="0.2em")
        self._head, *self._sides = widgets.HTML(), widgets.HTML(layout=side), widgets.HTML(layout=side)
        labels = {"A": "A is better", "B": "B is better", TIE: "No difference", None: "Undo"}
        buttons = [widgets.Button(description=label) for label in labels.values()]
        for button, vote in zip(buttons, labels, strict=True):
            button.on_click(lambda _, vote=vote: self._click(vote))
        lines = [widgets.HBox(row, layout=widgets.Layout(flex_flow="row wrap")) for row in (self._sides, buttons)]
        self.widget = widgets.VBox([self._head, *lines])
        self._show()

    def _click(self, vote: str | None) -> None:
        if len(self._cast) < len(self._pairs):
            self._cast = self._cast[:-1] if vote is None else [*self._cast, vote]
            self._show()

    def _show(self) -> None:
        done, n = len(self._cast), len(self._pairs)
        if done == n:
            self.widget.children = [self._head]
            self._head.value = self._outcome() if n else _text("Nothing to vote on: base and policy answer alike.")
            return
        prompt, answers, names = self._pairs[done]
        turns = [m for m in prompt if m["role"] != "system"]
        said = prompt[-1]["content"] if len(turns) < 2 else "\n\n".join(f"{m['role']}: {m['content']}" for m in turns)
        self._head.value = _text(f"{done + 1} of {n}") + _text(said)
        for box, letter, name in zip(self._sides, "AB", names, strict=True):
            box.value = f"<b>{letter}</b>" + _text(show.tables.answer_text(answers[name]))

    def _outcome(self) -> str:
        found = self.result()
        assert found is not None, "shown after the last vote"
        rate = found["win_rate"]
        line = f"The policy won {found['wins']}, lost {found['losses']} and tied {found['ties']}: win rate "
        line += f"{rate['rate']:.2f} (95% interval {rate['low']:.2f} to {rate['high']:.2f})."
        return _text(line) + f'<div style="line-height: 1.45">{show.table(found["votes"], "Your votes").data}</div>'

    def result(self) -> dict | None:
        """The votes so far; None before the first.

        Returns:
            `judge`, which is "reader"; `win_rate` of the policy, a tie counting half, with its 95% Wilson interval;
            `wins`, `losses`, `ties`; `position_bias`, the share of A among the votes for A or B with its interval, or
            None without such a vote; `votes`, a row per prompt: `prompt`, `verdict` ("policy", "base" or "tie"),
            `vote` ("A", "B" or "tie") and which model `A was`.
        """
        if not self._cast:
            return None
        votes = []
        for (prompt, _, (a, b)), vote in zip(self._pairs, self._cast, strict=False):
            verdict = {"A": a, "B": b, TIE: TIE}[vote]
            votes.append({"prompt": prompt[-1]["content"], "verdict": verdict, "vote": vote, "A was": a})
        wins, losses = (sum(v["verdict"] == side for v in votes) for side in ("policy", "base"))
        ties = len(votes) - wins - losses
        for_a, decisions = self._cast.count("A"), len(votes) - ties
        bias = stats.rate(for_a, decisions) if decisions else None
        rate = stats.rate(wins + ties / 2, len(votes))
        return dict(judge="reader", win_rate=rate, wins=wins, losses=losses, ties=ties, position_bias=bias, votes=votes)


def _text(text: str) -> str:
    return f'<div style="white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.45">{html.escape(text)}</div>'


def vote(prompts, before: Sequence[dict], after: Sequence[dict], seed: int, limit: int = 10) -> BlindVote | None:
    """Show a `BlindVote` and return it; where `DPO_TUTORIAL_HEADLESS` is set, say that it is skipped: None."""
    if os.environ.get("DPO_TUTORIAL_HEADLESS"):
        print("Blind vote skipped: nobody is here to vote. Open this notebook in Jupyter or Colab to take part.")
        return None
    ballot = BlindVote(prompts, before, after, seed, limit)
    display(ballot.widget)
    return ballot
