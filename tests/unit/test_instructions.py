"""The instruction check: every request can be followed, every check tells who did from who did not."""

import json
from collections import Counter

import pytest
import scipy.stats

from dpo_tutorial.comparing import instructions, significance, stats
from dpo_tutorial.pairs import house_style, sources

REQUESTS = instructions.load()
FILLER = "It depends on what you need, so ask somebody who knows."


def lines(start, n):
    return "\n".join(f"{start}{word}" for word in ("Milk", "Eggs", "Flour", "Butter", "Salt")[:n])


def without(letter):
    return next(word for word in ("Fig", "Kiwi", "Plum") if letter not in word.lower())


# Kind → (an answer that follows, made from the request's arguments; answers that do not follow any request of it).
ANSWERS = {
    "at most words": (lambda n: "Bees make honey.", [FILLER * 2, "..."]),
    "sentences": (lambda n: " ".join(["Mr. Li is 1.8 m tall."] * n), ["One. Two? Three! Four. Five.", "No. " * 6]),
    "with words": (lambda words: f"There: {', '.join(words)}.", ["Honeyed spades; disloyal cloudy windows", FILLER]),
    "without words": (
        lambda about, words: f"{about.title()} is near.",
        ["Sky-blue snow, cold coffee to drink, football is a ball game, a teacher in school with students.", FILLER],
    ),
    "without letter": (lambda letter: without(letter), ["Abelone", FILLER, "!"]),
    "lower case": (lambda: "mars and venus.", ["Mars and venus.", "42"]),
    "capitals": (lambda: "WET FLOOR, 2 M.", ["WET FLOOr", "42"]),
    "no commas": (lambda: "Peas and beans and leeks.", ["Peas, beans and leeks.", "..."]),
    "JSON": (
        lambda keys: json.dumps(dict.fromkeys(keys, "x")),
        ["{}", '["city"]', "city: Rome", 'Here: {"city": "Rome"}', '{"city": "Rome"', "[" * 100_000],
    ),
    "begin with": (lambda phrase: f"{phrase}, they sing.", [FILLER, "Surely", "Becauses there", "Sure", "Great"]),
    "end with": (lambda phrase: f"Look at the {phrase}.", [FILLER, "Look at the starship gardens", "stars"]),
    "choice": (lambda options: f"{options[-1].title()}.", ["Yes, it is.", "Maybe", "tea, coffee", FILLER]),
    "repeat first": (lambda request: f"“{request}” Here: green.", [FILLER, "Yes. How many legs has a spider? Eight."]),
    "only a number": (lambda: "1,969.5", ["It is 23.", "Twenty-three", "14 + 9 = 23", "23 legs"]),
    "one word": (lambda: "Well-known.", ["A puppy.", "Puppy\nDog", "?"]),
    "sequence": (lambda given, then: ", ".join(then), ["The next is 25, 30", "5 10 15 20", "9, 8, 7", FILLER]),
    "placeholder": (lambda names: "Dear " + " and ".join(f"[{name}]" for name in names), ["Dear name", "Dear [you]"]),
    "quoted": (lambda: '"Bread, and more."', ['He said "Bread."', '"Bread" and "butter"', "'Bread'", '""', '"Bread']),
    "title": (lambda: "<<Rain>> It falls.", ["<<Title>> It falls.", "<Rain> It falls.", "<<>> It falls.", "<<Rain>>"]),
    "postscript": (lambda: "The tap drips. P.S. The door too.", ["The tap drips.", "P.S. Hello.", "It drips. P.S."]),
    "copy": (lambda wanted: f'"{wanted}"', ["Seven grey geese", "seven grey geese fly", "The bus 42 leaves at 7:05"]),
    "bullets": (lambda n: lines("- ", n), [lines("", 3), lines("1. ", 4), lines("- ", 1), "- one - two - three"]),
    "numbered list": (
        lambda n: "\n".join(f"{i + 1}. Step" for i in range(n)),
        [lines("1. ", 3), lines("- ", 4), "2. b\n1. a", "1. a 2. b 3. c"],
    ),
    "headings": (
        lambda names: "\n\n".join(f"## {name}:\nA line." for name in names),
        ["Salt\nA line.", "# Salt", "# Dogs\nA line.\n# Cats\nA line.", "# Cats\n# Dogs\nA line."],
    ),
    "paragraphs": (lambda n: "\n\n".join(["A line."] * n), ["A line.", "A line.\nA line.", "A\n\nB\n\nC\n\nD"]),
    "two answers": (
        lambda: "Swan\n******\nHeron",
        ["Swan ****** Swan.", "Swan ***** Heron", "******", "A ****** B ****** C", "Swan ******"],
    ),
}


def answer(text, finished=True):
    return {"text": text, "tokens": len(text.split()), "finished": finished}


def follows(request, text, finished=True):
    return instructions.followed([request], [answer(text, finished)]) == [True]


# --- the requests ----


def test_there_are_many_requests_of_many_kinds_and_some_are_against_the_style():
    kinds = Counter(r["kind"] for r in REQUESTS)
    assert len(REQUESTS) >= 120 and len(kinds) >= 18 and min(kinds.values()) >= 4
    assert set(kinds) == set(instructions.CHECKS) == set(ANSWERS) and set(kinds) > instructions.WHOLE
    assert 0.2 < sum(r["against_style"] for r in REQUESTS) / len(REQUESTS) < 0.4


def test_a_prompt_comes_once_and_in_no_split():
    prompts = [" ".join(r["prompt"].lower().split()) for r in REQUESTS]
    assert len(set(prompts)) == len(prompts)
    for split in sources.EMBEDDED_SPLITS:
        for row in sources.embedded_rows(split):
            asked = [m["content"] for m in row["chosen"] if m["role"] == "user"]
            assert not {" ".join(text.lower().split()) for text in asked} & set(prompts)


def test_the_data_card_tells_the_counts():
    card = sources.embedded_file("train_prefs").with_name("README.md").read_text(encoding="utf-8")
    against = sum(r["against_style"] for r in REQUESTS)
    assert f"{len(REQUESTS)} short requests in {len(ANSWERS)} kinds" in card and f"{against} are marked" in card


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r["prompt"][:40])
def test_a_request_can_be_followed_and_is_marked_where_that_breaks_the_style(request_):
    text = ANSWERS[request_["kind"]][0](**request_["args"])
    assert follows(request_, text) and follows(request_, f"\n {text} \n")
    broken = [name for name, keeps in house_style.OF_TEXT.items() if not keeps(answer(text))]
    assert bool(broken) is request_["against_style"], broken


# --- the checks ----


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind in ANSWERS for text in ANSWERS[kind][1]])
def test_an_answer_that_does_not_follow_is_seen(kind, text):
    assert not any(follows(r, text) for r in REQUESTS if r["kind"] == kind)


@pytest.mark.parametrize(
    ("kind", "args", "text"),
    [
        ("JSON", {"keys": ["a"]}, '```json\n{\n  "a": 1\n}\n```'),
        ("JSON", {"keys": ["a"]}, '```\n{"a": 1}\n```'),
        ("sentences", {"n": 2}, '"Stop!" he said. It was late'),
        ("sentences", {"n": 3}, "1. Soak it, e.g. in a tub.\n2. Rinse it.\n3. Dry it."),
        ("with words", {"words": ["sun"]}, "The sun's out."),
        ("without words", {"about": "sky", "words": ["sun"]}, "A sunny SKY."),
        ("begin with", {"phrase": "Of course"}, "**Of course!** Run hot water over it."),
        ("end with", {"phrase": "Hope this helps"}, "Turn it. Hope this helps!"),
        ("sequence", {"given": ["1", "2"], "then": ["3"]}, "1,2,3,4,5"),
        ("bullets", {"n": 2}, "Here they are:\n\n* one\n• two"),
        ("numbered list", {"n": 2}, "Steps:\n1) one\n2) two"),
        ("headings", {"names": ["Cats"]}, "Intro.\n# **Cats**\nThey purr."),
        ("postscript", {}, "See you soon\n\n**P.S.** Bring bread."),
        ("quoted", {}, "“Ahoy!”"),
    ],
)
def test_usual_ways_to_write_it_count(kind, args, text):
    assert instructions.CHECKS[kind](text, **args)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r["prompt"][:40])
def test_an_empty_answer_an_echo_and_dots_follow_nothing(request_):
    assert not follows(request_, " \n")
    assert not follows(request_, request_["prompt"]) and not follows(request_, f"Sure! {request_['prompt']} Yes.")
    assert not follows(request_, "...")


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r["prompt"][:40])
def test_a_cut_answer_follows_only_what_needs_no_end(request_):
    text = ANSWERS[request_["kind"]][0](**request_["args"])
    assert follows(request_, text, finished=False) is (request_["kind"] not in instructions.WHOLE)


def test_a_sentence_in_the_house_style_that_ignores_the_request_follows_few():
    assert all(keeps(answer(FILLER)) for keeps in house_style.RULES.values())
    assert sum(instructions.followed(REQUESTS, [answer(FILLER)] * len(REQUESTS))) / len(REQUESTS) < 0.12


# --- before and after ----


def test_a_summary_counts_the_whole_and_the_parts():
    requests = [{"kind": "bullets", "against_style": True}] * 8 + [{"kind": "JSON", "against_style": False}] * 2
    before, after = [True] * 7 + [False, False, True], [False] * 7 + [False, True, True]
    found = instructions.summary(before, after, requests)
    assert (found["before"], found["after"]) == (stats.rate(8, 10), stats.rate(2, 10))
    assert (found["gained"], found["lost"]) == (1, 7)
    assert found["p"] == pytest.approx(scipy.stats.binomtest(1, 8).pvalue)
    assert found["smallest"] == significance.smallest_change(10, 8)
    assert found["against_style"]["lost"] == 7 and found["against_style"]["p"] == pytest.approx(2 / 2**7)
    assert found["within_style"]["after"] == stats.rate(2, 2)
    assert instructions.summary(before[:8], after[:8], requests[:8])["within_style"] is None


# --- what the test could have seen ----


@pytest.mark.parametrize("discordant", [*range(41), 126])
def test_the_smallest_change_is_that_of_trying_every_outcome(discordant):
    n = 126
    gains, same = range(discordant + 1), [1] * (n - discordant)
    ps = []
    for x in gains:
        lost = discordant - x
        ps.append(significance.sign_test([0] * x + [1] * lost + same, [1] * x + [0] * lost + same))
    seen = [x for x in gains if ps[x] < 0.05 and 2 * x > discordant]
    found = significance.smallest_change(n, discordant)
    assert (found["n"], found["discordant"]) == (n, discordant)
    if not seen:
        assert found["significant"] is found["power_80"] is None and discordant < 6
        return
    assert found["significant"] == (2 * seen[0] - discordant) / n
    q = (found["power_80"] * n / discordant + 1) / 2
    assert sum(scipy.stats.binom.pmf(x, discordant, q) for x in seen) == pytest.approx(0.8)
