"""The blind vote in the notebook: what is shown, what is not given away, and how votes are counted."""

import html
import json
import re
import sys
from html.parser import HTMLParser

import pytest
from statsmodels.stats.proportion import proportion_confint

from dpo_tutorial import show
from dpo_tutorial.comparing import vote
from dpo_tutorial.comparing.vote import TIE

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def answer(text, finished=True):
    return {"text": text, "tokens": len(text), "finished": finished}


def ask(text):
    return [{"role": "system", "content": "hidden"}, {"role": "user", "content": text}]


def wilson(hits, n):
    low, high = proportion_confint(hits, n, alpha=0.05, method="wilson")
    return {"rate": hits / n, "low": pytest.approx(low), "high": pytest.approx(high), "n": n}


MANY = [ask(f"question {i}") for i in range(12)]
BEFORE = [answer(f"first text {i}") for i in range(12)]
AFTER = [answer(f"other text {i}") for i in range(12)]


def tree(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from tree(child)


def pages(ballot):
    """Every HTML value on show, in order."""
    import ipywidgets

    return [w.value for w in tree(ballot.widget) if isinstance(w, ipywidgets.HTML)]


def press(ballot, label):
    buttons = {w.description: w for w in tree(ballot.widget) if hasattr(w, "click")}
    assert list(buttons) == ["A is better", "B is better", "No difference", "Undo"]
    buttons[label].click()


def shown(ballot):
    """What is on the page: prompt, answer A, answer B."""
    head, a, b = pages(ballot)
    texts = [html.unescape(re.sub("<[^>]*>", "\n", part)).strip() for part in (head, a, b)]
    return texts[0].split("\n")[-1], texts[1].removeprefix("A").strip(), texts[2].removeprefix("B").strip()


def everything(ballot, vote="No difference"):
    """Vote on every pair; returns what was shown."""
    seen = []
    while len(pages(ballot)) == 3:
        assert len(seen) < 20, "the vote does not end"
        seen.append(shown(ballot))
        press(ballot, vote(seen[-1]) if callable(vote) else vote)
    return seen


def test_the_order_of_prompts_and_answers_follows_the_seed_and_the_limit():
    first, again, other = (everything(vote.BlindVote(MANY, BEFORE, AFTER, seed)) for seed in (1, 1, 2))
    assert first == again != other and len(first) == 10
    assert [p for p, _, _ in first] != [p for p, _, _ in other]
    assert {a.split()[0] for _, a, _ in first} == {"first", "other"}, "A is now the base, now the policy"
    assert all({a, b} == {f"first text {p.split()[-1]}", f"other text {p.split()[-1]}"} for p, a, b in first)


def test_votes_give_the_result_worked_by_hand():
    """The reader always takes the policy's answer, but for question 3 (the base's) and question 7 (no difference)."""

    def choose(page):
        prompt, a, _ = page
        if prompt == "question 7":
            return "No difference"
        policy = "A" if a.startswith("other") else "B"
        return f"{policy if prompt != 'question 3' else 'AB'.replace(policy, '')} is better"

    ballot = vote.BlindVote(MANY, BEFORE, AFTER, seed=3, limit=12)
    assert ballot.result() is None
    seen = everything(ballot, choose)
    found = ballot.result()
    assert (found["judge"], found["wins"], found["losses"], found["ties"]) == ("reader", 10, 1, 1)
    assert found["win_rate"] == wilson(10.5, 12)
    for_a = sum(choose(page).startswith("A") for page in seen)
    assert 0 < for_a < 11 and found["position_bias"] == wilson(for_a, 11)
    for row, page in zip(found["votes"], seen, strict=True):
        assert row["prompt"] == page[0] and row["A was"] == ("policy" if page[1].startswith("other") else "base")
        assert row["verdict"] == {"question 3": "base", "question 7": "tie"}.get(page[0], "policy")
        assert row["vote"] == {"A": "A", "B": "B", "N": TIE}[choose(page)[0]]
    (page,) = pages(ballot)
    assert show.table(found["votes"], "Your votes").data in page
    assert "won 10, lost 1 and tied 1" in page and "0.88 (95% interval" in page


def test_a_vote_without_a_decision_has_no_position_bias():
    ballot = vote.BlindVote(MANY, BEFORE, AFTER, 0, limit=2)
    everything(ballot)
    assert ballot.result()["position_bias"] is None and ballot.result()["win_rate"]["rate"] == 0.5


def test_progress_is_counted_and_undo_takes_back_the_last_vote_only_while_it_is_blind():
    ballot = vote.BlindVote(MANY, BEFORE, AFTER, seed=5, limit=3)
    start = shown(ballot)
    press(ballot, "Undo")
    assert shown(ballot) == start and "1 of 3" in pages(ballot)[0] and ballot.result() is None
    press(ballot, "A is better")
    assert "2 of 3" in pages(ballot)[0] and shown(ballot) != start
    assert ballot.result()["win_rate"]["n"] == 1
    press(ballot, "Undo")
    assert shown(ballot) == start and ballot.result() is None
    buttons = [w for w in tree(ballot.widget) if hasattr(w, "click")]
    everything(ballot, "B is better")
    found = ballot.result()
    assert found["win_rate"]["n"] == 3 and found["position_bias"]["rate"] == 0.0
    for button in buttons:
        button.click()
    assert ballot.result() == found and len(pages(ballot)) == 1


def test_nothing_on_the_page_tells_base_from_policy():
    """Swap the models and the page is the same, up to which of the two texts is A."""

    def state(before, after):
        ballot = vote.BlindVote(MANY[:1], before, after, seed=0)
        values = [
            {k: v for k, v in w.get_state().items() if not isinstance(v, (list, tuple)) and "IPY_MODEL" not in str(v)}
            for w in tree(ballot.widget)
        ]
        return json.dumps(values, default=str)

    one, two = state([answer("left")], [answer("right")]), state([answer("right")], [answer("left")])
    assert one != two and one == two.replace("left", "?").replace("right", "left").replace("?", "right")
    assert not re.search("base|policy|dpo|before|after|chosen|reject", one.lower())


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_hostile_html_is_text_in_every_view_of_the_vote():
    turns = [{"role": "user", "content": HOSTILE}, {"role": HOSTILE, "content": HOSTILE}]
    ballot = vote.BlindVote([turns], [answer(HOSTILE)], [answer(HOSTILE + "2", finished=False)], seed=0)
    vote_pages = pages(ballot)
    press(ballot, "A is better")
    assert len(vote_pages) == 3 and len(pages(ballot)) == 1
    for page in [*vote_pages, *pages(ballot)]:
        found = Tags(page)
        assert HOSTILE in found.text and "<script" not in page and "<img" not in page
        assert found.tags <= {"div", "b", "style", "table", "caption", "thead", "tbody", "tr", "th", "td"}
        assert found.attributes <= {"style", "class", "scope"}
    assert "cut at the token limit" in "".join(vote_pages)


def test_the_page_sets_no_solid_colour_and_keeps_line_breaks():
    ballot = vote.BlindVote(MANY, [answer("a\n b")] * 12, AFTER, seed=0)
    for page in pages(ballot):
        assert "white-space: pre-wrap" in page and not re.search("color|background", page)


def test_earlier_turns_are_shown_and_the_system_prompt_is_not():
    talk = [*ask("one?"), {"role": "assistant", "content": "1."}, {"role": "user", "content": "two?"}]
    head = pages(vote.BlindVote([talk], [answer("a")], [answer("b")], seed=0))[0]
    assert "user: one?\n\nassistant: 1.\n\nuser: two?" in head and "hidden" not in head
    head = pages(vote.BlindVote([ask("one?")], [answer("a")], [answer("b")], seed=0))[0]
    assert ">one?<" in head and "hidden" not in head


def test_identical_pairs_are_skipped_and_a_vote_without_pairs_says_so():
    ballot = vote.BlindVote(MANY, [*AFTER[:11], answer("differs")], AFTER, seed=0)
    assert [p for p, _, _ in everything(ballot)] == ["question 11"]
    empty = vote.BlindVote(MANY, AFTER, AFTER, seed=0)
    assert "Nothing to vote on" in pages(empty)[0] and empty.result() is None


def test_headless_prints_one_line_and_needs_no_widgets(monkeypatch, capsys):
    monkeypatch.setenv("DPO_TUTORIAL_HEADLESS", "1")
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert vote.vote(MANY, BEFORE, AFTER, seed=0) is None
    assert capsys.readouterr().out == (
        "Blind vote skipped: nobody is here to vote. Open this notebook in Jupyter or Colab to take part.\n"
    )


def test_with_a_reader_the_widget_is_displayed(monkeypatch):
    monkeypatch.setenv("DPO_TUTORIAL_HEADLESS", "")
    displayed = []
    monkeypatch.setattr(vote, "display", displayed.append)
    ballot = vote.vote(MANY, BEFORE, AFTER, seed=0, limit=4)
    assert displayed == [ballot.widget] and "1 of 4" in pages(ballot)[0]
