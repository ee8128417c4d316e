"""The page with two blind answers: what it says, that only loopback is asked, and that no answer becomes markup."""

import random
import socket

import pytest
from test_report import browser

from dpo_tutorial.cli import main as cli
from dpo_tutorial.using import demo

HOSTILE = "<script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\"> {{value}} ${1+1} **b**"
ALONE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


class Talk:
    """In place of `chat.Chat`: two answers that are traps."""

    def __init__(self, *_):
        pass

    def ask(self, question):
        yield {"base": "…", "policy": "…"}, False
        yield {"base": f"base {HOSTILE}", "policy": f"policy {HOSTILE}"}, True

    def heat(self):
        return {who: [(f"{who} ", 0.5), (HOSTILE, -0.25)] for who in ("base", "policy")}


def test_the_outcome_names_both_counts_the_votes_and_shows_answers_as_text():
    said = demo.told(Talk().heat(), ["policy", "base"], ["policy", "tie", "policy", "base"])
    assert "A was the policy, B the base. So far the policy won 2, lost 1 and tied 1." in said
    assert "policy: reward +0.25 over 2 tokens" in said and "base: reward +0.25" in said
    assert "<script" not in said and "<img" not in said and said.count("&lt;script&gt;") >= 2


def test_without_gradio_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo", "--adapter", "nowhere"]) == 1
    assert "pip install 'dpo-tutorial[demo]'" in capsys.readouterr().err


def test_a_port_in_use_or_none_is_one_sentence_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(demo.merge, "config_of", lambda *_: pytest.fail("loaded for nothing"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for more in (("--port", str(taken.getsockname()[1])), ("--port", "99999"), ("--host", "192.0.2.1")):
            assert cli.main(["demo", "--adapter", "nowhere", *more]) == 1
            said = capsys.readouterr().err
            assert "ConfigError: Nothing can listen at" in said and more[1] in said and "--port" in said


@pytest.fixture
def shown(cfg, monkeypatch):
    """The address of the page, as the command shows it."""
    gradio = pytest.importorskip("gradio", reason="the extra demo is not installed")
    monkeypatch.setattr(demo.chat, "Chat", Talk)
    for module, name in ((demo.merge, "config_of"), (demo.lora, "load_policy"), (demo.models, "load_tokenizer")):
        monkeypatch.setattr(module, name, lambda *_: cfg)
    launched, launch = [], gradio.Blocks.launch

    def starts(self, **how):
        launched.append((self, *launch(self, **how | {"server_port": None}, prevent_thread_lock=True, quiet=True)))

    monkeypatch.setattr(gradio.Blocks, "launch", starts)
    cli.main(["demo", "--adapter", "any"])
    ((blocks, _, url, shared),) = launched
    assert url.startswith("http://127.0.0.1:") and shared is None
    yield url
    blocks.close()


@pytest.mark.end_to_end
def test_in_a_browser_a_vote_tells_who_was_who_and_no_answer_runs(shown, cfg):
    """The page has no other address to ask, and asks none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = random.Random(cfg.seed).sample(("base", "policy"), 2)
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser(), args=["--no-sandbox", ALONE])
        page = chromium.new_page()
        asked = []
        page.on("request", lambda request: request.url.startswith((shown, "data:")) or asked.append(request.url))
        page.goto(shown)
        assert page.get_by_role("button", name="A is better").is_disabled()
        page.get_by_label("Question").fill("Why?")
        page.get_by_label("Question").press("Enter")
        page.get_by_role("button", name="A is better").click()
        page.get_by_text("So far the policy").wait_for()
        assert [page.get_by_label(letter, exact=True).input_value() for letter in "AB"] == [
            f"{name} {HOSTILE}" for name in names
        ]
        told = page.get_by_text("So far the policy").inner_text()
        assert f"A was the {names[0]}" in told and f"won {int(names[0] == 'policy')}" in told
        heat = page.locator(".dpo-tokens").all_inner_texts()
        assert sum(HOSTILE in text for text in heat) == 2, heat
        assert page.title() == "Base and policy" and page.locator("img[src=x]").count() == 0
        assert page.get_by_role("button", name="A is better").is_disabled(), "one vote an answer"
        assert asked == []
        chromium.close()
