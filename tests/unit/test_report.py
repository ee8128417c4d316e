"""The report as a browser shows it: what a model wrote is text there, and nothing of it runs."""

import json
import os
import re
import shutil
import subprocess
from importlib.metadata import version

import pytest
from test_show import HOSTILE, Page

from dpo_tutorial import run_folder, show
from dpo_tutorial.comparing import compare, instructions, report, stats, vote

RUNS = "<script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"
TRAP = RUNS + HOSTILE


def browser() -> str:
    """Path of a Chromium. None there: a skip at home, a failure in CI."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"none of {', '.join(names)} is installed")
    return found


def rendered(path, tmp_path) -> str:
    """The page's DOM after the browser has loaded it and run whatever it would run."""
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


def record(margin, gap=0):
    return {
        "prompt_id": TRAP, "margin": margin, "reward_chosen": margin / 2, "reward_rejected": -margin / 2,
        "chosen_tokens": 50 + gap, "rejected_tokens": 50, "policy_chosen": -40.0, "reference_chosen": -42.0,
        "policy_rejected": -50.0, "reference_rejected": -48.0,
        "chosen_token_rewards": [margin / 2], "rejected_token_rewards": [-margin / 2],
    }  # fmt: skip


RECORDS = [record(m, gap) for m, gap in ((1.0, -3), (2.0, 0), (-0.5, 4), (0.1, 1))]


def derived(before, after, kl, outside):
    """A comparison of these answers, with a trap for every other text that a model or a dataset could have written."""
    answer, prompt = {"text": TRAP, "tokens": 5, "finished": True}, [{"role": "user", "content": TRAP}]
    request = {"prompt": TRAP, "kind": "bullets", "args": {}, "against_style": True}
    shown = {
        "prompt": prompt, "reward_chosen": 0.5, "reward_rejected": -0.5,
        "chosen": [(TRAP, 0.4), ("fine\n", 0.1)], "rejected": [(TRAP, -0.5)],
    }  # fmt: skip
    return compare.derive(
        RECORDS, [prompt] * 2, before, after,
        noise={"spread": 0.1, "floor": 0.2, "within": 1, "pairs": 4, "dtype": "bf16"},
        kl=kl, verdicts={TRAP: [1.0, 0.0, 1.0, 1.0]}, kinds=[TRAP, TRAP, "form", "form"], shown=[shown], target=before,
        instructions=instructions.summary([True], [False], [request]) | {
            "requests": [request], "answers": {"before": [answer], "after": [answer]},
            "followed": {"before": [True], "after": [False]}, "kl": outside,
        },
    )  # fmt: skip


KL = {"per_answer": stats.mean([1.0, 2.0]), "per_token": stats.mean([0.1, 0.2]), "tokens": 30}


@pytest.fixture(scope="module")
def comparison():
    answer = {"text": TRAP, "tokens": 5, "finished": True}
    two = [answer, answer | {"finished": False}]
    return derived(two, two, KL, KL)


@pytest.fixture
def training(cfg):
    return {
        "base": {"name": TRAP, "revision": None}, "config": cfg.identity() | {"data": TRAP}, "seconds": 1.0,
        "versions": {}, "hardware": {},
    }  # fmt: skip


@pytest.mark.end_to_end
def test_in_a_browser_a_hostile_report_is_only_text(cfg, comparison, training, tmp_path):
    report.save(run_folder.Run(cfg, tmp_path / "out"), training, RECORDS, comparison)
    dom = rendered(tmp_path / "out" / "report.html", tmp_path)
    assert "<title>Before and after DPO: " in dom, "the title is still ours: nothing ran"
    assert not re.search(
        r"<script|<a |onerror=[^&]*>(?!.*&gt;)", re.sub(r"<title>.*?</title>", "", dom, flags=re.DOTALL)
    )
    assert len(re.findall("<img", dom)) == 5 == len(re.findall('<img alt="[^"]+" src="data:image/png', dom))
    assert dom.count("&lt;script&gt;document.title") >= 10


@pytest.mark.end_to_end
def test_the_browser_check_can_fail(tmp_path):
    page = tmp_path / "unsafe.html"
    page.write_text(f"<!doctype html><title>ours</title><p>{RUNS}</p>")
    assert "<title>ran</title>" in rendered(page, tmp_path)


@pytest.mark.end_to_end
def test_in_a_browser_every_view_shows_a_hostile_answer_as_text(comparison, tokenizer, tmp_path):
    prompt, answer = [{"role": "user", "content": TRAP}], {"text": TRAP, "tokens": 3, "finished": True}
    ballot = vote.BlindVote([prompt], [answer], [answer | {"text": "b"}], 1).widget
    views = [
        show.table([{TRAP: TRAP}], TRAP).data,
        show.conversation(prompt).data,
        show.answers([prompt], [answer], [answer]).data,
        show.heat_map(comparison["token_rewards"][0]).data,
        show.tokens(tokenizer, [5], tokenizer(TRAP, add_special_tokens=False)["input_ids"]).data,
        "".join(shown.value for shown in widgets_of(ballot)),
    ]
    assert all("&lt;" in view for view in views)
    page = tmp_path / "views.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><title>ours</title>{''.join(views)}", encoding="utf-8")
    dom = rendered(page, tmp_path)
    assert "<title>ours</title>" in dom and not re.search("<script|<img|<a ", dom)


def widgets_of(box):
    for child in getattr(box, "children", ()):
        yield from widgets_of(child)
    if hasattr(box, "value") and isinstance(box.value, str):
        yield box


def test_files_and_page_hold_the_numbers_of_the_comparison_and_how_they_were_made(cfg, comparison, training, tmp_path):
    training["base"]["name"] = "base-of-test"
    paths = report.save(run_folder.Run(cfg, tmp_path / "out"), training, RECORDS, comparison)
    assert [p.name for p in paths] == ["records.json", "comparison.json", "report.html"]
    saved = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert saved["adapter"]["config"]["beta"] == cfg.beta and saved["versions"]["torch"] == version("torch")
    assert "cores" in saved["hardware"]
    assert json.loads((tmp_path / "out" / "records.json").read_text()) == RECORDS
    html = (tmp_path / "out" / "report.html").read_text()
    assert "<h1>Before and after DPO: base-of-test</h1>" in html and 'lang="en"' in html
    text = Page(type("View", (), {"data": html})).text
    held_out = comparison["held_out"]["after"]
    for words in (
        show.share(held_out["accuracy"]), show.average(held_out["margin"]), "chosen: reward +0.50 over 2 tokens",
        "policy minus judge", "rejected answer", "against the style", "chosen answers", "corrected p",
        "followed: ", "not followed: ", "1 of 4 margins", *comparison["verdict"],
    ):  # fmt: skip
        assert words in text, words


def test_before_and_after_and_both_distances_keep_their_places_as_far_as_the_page(training, monkeypatch):
    monkeypatch.setattr(report, "_picture", lambda figure: "")
    before = [{"text": "Sure! One, two, one, two.", "tokens": 9, "finished": False}] * 2
    after = [{"text": "Three it is.", "tokens": 4, "finished": True}] * 2
    other = {"per_answer": stats.mean([7.0, 8.0]), "per_token": stats.mean([0.7, 0.8]), "tokens": 30}
    found = derived(before, after, KL, other)
    for part in ("rules", "same_length"):
        assert [found[part][when]["no opener"]["rate"] for when in ("before", "after")] == [0, 1], part
    assert [found["form"][when]["tokens"]["mean"] for when in ("before", "after")] == [9, 4]
    assert [found["same_form"][when]["finished"]["rate"] for when in ("before", "after")] == [0, 1]
    assert found["kl"] == {"inside": KL, "outside": other}
    html = report.page(RECORDS, found | {"adapter": training, "data": "", "versions": {}, "hardware": {}})
    rows = Page(type("View", (), {"data": html})).text
    assert rows.index("after DPO") < rows.index("Sure! One") < rows.index("Three it is.")
