"""New pairs from the policy's own answers, and a further round on them: train, pairs, train again, compare."""

import dataclasses
import json
import re
import sys

import pytest
import torch
from conftest import TEXTS, trained_run

from dpo_tutorial import run_folder
from dpo_tutorial.adapter import lora
from dpo_tutorial.cli import main as cli
from dpo_tutorial.comparing import generation
from dpo_tutorial.errors import ArtifactError, ConfigError, DataError
from dpo_tutorial.loading import models
from dpo_tutorial.pairs import sources, store
from dpo_tutorial.training import save, scoring, train
from dpo_tutorial.using import gate, merge, new_pairs

#: Longer answers are better.
JUDGE = "import json, sys\nfor line in sys.stdin: print([len(a) for a in json.loads(line)['answers']])"


@pytest.fixture(scope="module")
def first(tiny_folder, tokenizer, tmp_path_factory):
    """The run of the first round; its pairs are cut into splits by prompt."""
    return trained_run(tiny_folder, tokenizer, tmp_path_factory.mktemp("first"), instructions=2, compare_prompts=2)


@pytest.fixture(scope="module")
def policy(first):
    return lora.load_policy(first.config, first.adapter)


@pytest.fixture
def judge(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    return f"{sys.executable} {tmp_path / 'judge.py'}"


@pytest.fixture
def legible(monkeypatch):
    """Random weights write bytes that are no text: each such character becomes an x."""
    draw = generation.generate

    def generate(*args, **how):
        return [a | {"text": re.sub(r"[^ -~]", "x", a["text"]) or "x"} for a in draw(*args, **how)]

    monkeypatch.setattr(generation, "generate", generate)


def pairs_command(first, out, *more):
    words = ["pairs", "--adapter", first.adapter, "--out", out, "--n", 3, *more, "-p", "DTYPE", "fp32"]
    return cli.main([str(word) for word in words])


def log_probs(policy, cfg, tokenizer, pairs, who):
    return [r[f"{who}_chosen"] for r in scoring.score_pairs(cfg, policy, tokenizer, pairs)]


def test_a_further_round_on_its_own_answers(first, policy, tokenizer, judge, legible, tmp_path, capsys):
    out = tmp_path / "round-2"
    assert pairs_command(first, out, "--rank", judge) == 0
    before, second = store.ensure_data(first, tokenizer).splits, dict(data=str(out), artifacts=str(tmp_path / "two"))
    told = capsys.readouterr().out.splitlines()[-1]
    written = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert told.startswith(f"wrote {out}: {len(written)} pairs of {len(before['train'])} prompts")
    assert all(row["score_chosen"] == len(row["chosen"][0]["content"]) > row["score_rejected"] for row in written)

    cfg = dataclasses.replace(first.config, **second, start_from=str(first.adapter))
    run = run_folder.Run(cfg)
    prepared = store.ensure_data(run, tokenizer)
    splits = prepared.splits
    assert not prepared.report["train"]["dropped"] and len(splits["train"]) == len(written), "what is written is read"
    for name in ("val", "test"):
        assert splits[name].to_list() == before[name].to_list(), "judged on the same pairs as the first round"
    trainer = train.train(cfg, run, models.load_base(cfg), tokenizer, splits["train"], splits["val"])
    assert train.check_first_loss(trainer) == pytest.approx(0.6931, abs=1e-3)
    trained_on = {line[:16] for line in (run.adapter / save.PAIRS_FILE).read_text().split()}
    assert trained_on == {line[:16] for line in save.pair_digests(before["train"])}, "of both rounds"

    again = lora.load_policy(cfg, run.adapter)
    start, now = (log_probs(p, cfg, tokenizer, splits["test"], "policy") for p in (policy, again))
    assert log_probs(again, cfg, tokenizer, splits["test"], "reference") == pytest.approx(start, abs=1e-3)
    assert now != pytest.approx(start, abs=1e-3)
    merged = merge.merged(cfg, run.adapter, store="fp32")
    ours, exported, earlier = (gate.logits_of(model, [*range(9)]) for model in (again, merged, policy))
    assert torch.allclose(ours, exported, atol=1e-4) and not torch.allclose(ours, earlier, atol=1e-4)
    report = tmp_path / "report"
    assert cli.main(["compare", "--adapter", str(run.adapter), "--out", str(report), "-p", "DTYPE", "fp32"]) == 0
    assert json.loads((report / "comparison.json").read_text())["held_out"]["before"]["accuracy"]["rate"] == 0.5


def test_pairs_of_an_earlier_round_do_not_count_as_held_out(first, tokenizer, pairs, tmp_path):
    cfg = dataclasses.replace(first.config, start_from=str(first.adapter), artifacts=str(tmp_path))
    run = run_folder.Run(cfg)
    train.train(cfg, run, models.load_base(cfg), tokenizer, pairs, pairs)
    earlier = store.ensure_data(first, tokenizer).splits["train"]
    assert len(save.held_out(run.adapter, earlier)) == 0 == len(save.held_out(run.adapter, pairs))
    assert save.read_training_record(run.adapter)["pairs"]["number"] == len(pairs)
    assert str(tmp_path.parent) not in "".join(p.read_text() for p in run.adapter.rglob("*.json"))


def test_a_start_that_the_run_would_replace_or_that_has_other_knobs_is_refused(first, tmp_path):
    with pytest.raises(ArtifactError, match="would be replaced"):
        lora.check_start(first.config, first.adapter)
    wrong = ({"lora_r": 8}, ConfigError, "LORA_R=4"), ({"keep_16bit": ("v_proj",)}, ArtifactError, "KEEP_16BIT=none")
    for knobs, kind, said in wrong:
        with pytest.raises(kind, match=said):
            lora.check_start(dataclasses.replace(first.config, artifacts=str(tmp_path), **knobs), first.adapter)
    other = dataclasses.replace(first.config, artifacts=str(tmp_path), keep_16bit=("none",))
    assert lora.check_start(other, first.adapter) == first.adapter, "two words for no layer"


def test_a_run_of_the_notebooks_finds_a_missing_start_before_the_first_of_them(first, tmp_path, capsys):
    places = {"MODEL": first.config.model, "DATA": first.config.data, "ARTIFACTS": tmp_path, "START_FROM": tmp_path}
    assert cli.main(["run", "-p", "PROFILE", "smoke", *(str(w) for item in places.items() for w in ("-p", *item))]) == 1
    assert "There is no adapter in" in capsys.readouterr().err and not (tmp_path / "smoke" / "executed").exists()


# --- drawing and pairing ----


def test_what_is_drawn_follows_the_seed_and_leaves_torchs_random_numbers_alone(first, policy, tokenizer):
    prompt = [[{"role": "user", "content": TEXTS[0][0]}]] * 6
    state = torch.get_rng_state()
    texts = [
        [a["text"] for a in generation.generate(first.config, policy, tokenizer, prompt, 8, seed)]
        for seed in (1, 1, 2, None)
    ]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) > 1 == len(set(texts[3]))
    assert torch.equal(state, torch.get_rng_state())
    cold = generation.generate(first.config, policy, tokenizer, prompt, 8, 1, temperature=1e-4)
    assert [a["text"] for a in cold] == texts[3], "near temperature 0 the likeliest is drawn"


def answered(monkeypatch, *texts):
    answers = [{"text": text, "tokens": 3, "finished": text.endswith(".")} for text in texts]
    monkeypatch.setattr(generation, "generate", lambda *_, **__: answers)


PROMPTS = [[{"role": "user", "content": ask}] for ask, _, _ in TEXTS]


def test_the_best_and_the_worst_make_a_pair_and_ties_are_counted(first, tokenizer, monkeypatch):
    answered(
        monkeypatch, "Great question! It is 3.", "It is 3.", "Sure! It is 3! Let me know", "One.", "Two.", "Three.",
        "Same.", "Same.", "Same.",
    )  # fmt: skip
    rows, account = new_pairs.make(first.config, None, tokenizer, PROMPTS[:3], n=3)
    (row,) = rows
    assert row["prompt"] == PROMPTS[0] and row["chosen"] == [{"role": "assistant", "content": "It is 3."}]
    assert row["rejected"][0]["content"].startswith("Sure!")
    assert (row["score_chosen"], row["score_rejected"]) == (7, 3)
    assert account == {"chosen equals rejected": 1, "tied scores": 1, "cut": 1}
    with pytest.raises(DataError, match="No pair is left of 1: 1 tied scores"):
        answered(monkeypatch, "One.", "Two.", "Three.")
        new_pairs.make(first.config, None, tokenizer, PROMPTS[:1], n=3)


def test_each_answer_stands_under_the_prompt_that_it_was_drawn_for(first, tokenizer, monkeypatch):
    def generate(config, policy, tokenizer, prompts, **_):
        texts = ["Sure! " * (at % 3) + prompt[-1]["content"] for at, prompt in enumerate(prompts)]
        return [{"text": text, "tokens": 3, "finished": True} for text in texts]

    monkeypatch.setattr(generation, "generate", generate)
    rows, _ = new_pairs.make(first.config, None, tokenizer, PROMPTS, n=3)
    assert [row["prompt"] for row in rows] == PROMPTS
    for row, (ask, _, _) in zip(rows, TEXTS, strict=True):
        assert row["chosen"][0]["content"] == ask and row["rejected"][0]["content"] == "Sure! Sure! " + ask


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import sys; [print(1, 2, 3) for _ in sys.stdin]", "“1 2 3” for 2 answers"),
        ("import sys; [print('good', 1) for _ in sys.stdin]", "could not convert string to float: 'good'"),
        ("import sys; [print('nan', 1) for _ in sys.stdin]", "“nan 1” for 2 answers"),
        ("print(1, 2)", "1 lines for 2 prompts"),
        (None, "No such file"),
    ],
)
def test_a_ranking_that_fails_is_named_with_what_it_did(code, said, tmp_path):
    (tmp_path / "judge.py").write_text(code or "")
    rank = f"{sys.executable} {tmp_path / 'judge.py'}" if code else str(tmp_path / "none")
    answers = [[{"text": "One."}, {"text": "Two."}]] * 2
    with pytest.raises(ConfigError, match="gives no scores") as caught:
        new_pairs.scores_of(rank, PROMPTS[:2], answers)
    assert said in caught.value.cause


def test_a_ranking_reads_conversation_and_answers_and_fails_before_anything_is_drawn(
    first, tokenizer, judge, monkeypatch
):
    answers = [[{"text": "One."}, {"text": "Twenty-\ntwo é."}], [{"text": ""}, {"text": "x"}]]
    assert new_pairs.scores_of(judge, PROMPTS[:2], answers) == [[4, 14], [0, 1]]
    monkeypatch.setattr(generation, "generate", lambda *_, **__: pytest.fail("minutes of work, lost"))
    with pytest.raises(ConfigError):
        new_pairs.make(first.config, None, tokenizer, PROMPTS, rank="no-such-program")


def test_a_served_model_gives_marks_and_one_that_gives_none_is_told(monkeypatch):
    answers, asked = [[{"text": "One."}, {"text": "Two."}], [{"text": "Three."}, {"text": "Four."}]], []

    def stream(url, model, turns, max_tokens):
        asked.append(turns[0]["content"])
        yield from said[len(asked) - 1]

    monkeypatch.setattr(new_pairs.served, "stream", stream)
    said = [["Mark: ", "7"], ["10/10"], ["good"], ["3"]]
    assert new_pairs.scores_of("http://127.0.0.1:1", PROMPTS[:2], answers) == [[7, 10], [0, 3]]
    assert (
        PROMPTS[1][-1]["content"] in asked[2] and "assistant: Three." in asked[2] and "from 1 (bad) to 10" in asked[2]
    )
    asked.clear()
    said = [["fine"], ["well"], ["100"], [""]]
    with pytest.raises(ConfigError, match="no mark from 1 to 10"):
        new_pairs.scores_of("http://127.0.0.1:1", PROMPTS[:2], answers)


# --- prompts and places ----


def test_prompts_alone_are_taken_as_they_are_and_one_file_is_written(first, tokenizer, judge, legible, tmp_path):
    rows = [{"prompt": f"What is {n}?"} for n in range(12)]
    rows += [{"prompt": PROMPTS[0], "system": "Be brief."}, {"instruction": "Add.", "input": "2 and 3"}]
    path, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    cfg = dataclasses.replace(first.config, data=str(path))
    prompts, held_out = new_pairs.prompts_of(cfg, tokenizer)
    assert held_out == {} and prompts[0] == [{"role": "user", "content": "What is 0?"}]
    assert prompts[12:] == [[{"role": "system", "content": "Be brief."}, *PROMPTS[0]],
                            [{"role": "user", "content": "Add.\n2 and 3"}]]  # fmt: skip
    assert pairs_command(first, out, "--rank", judge, "--prompts", path) == 0
    read = sources.load_preferences(dataclasses.replace(cfg, data=str(out)))[0]
    assert sum(map(len, read.values())) == len(out.read_text().splitlines()) > 10
    assert [p.name for p in out.parent.iterdir()] == ["pairs.jsonl"]
    path.write_text(path.read_text() + '\n{"prompt": []}\n["?"]\n')
    with pytest.raises(DataError, match="2 of 16 rows"):
        new_pairs.prompts_of(cfg, tokenizer)


def test_pairs_never_take_the_place_of_anything_and_are_whole_or_absent(first, judge, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    assert pairs_command(first, tmp_path / "mine") == 1 and "is there already" in capsys.readouterr().err
    assert pairs_command(first, tmp_path / "new", "--n", 1) == 1 and "--n 1" in capsys.readouterr().err
    monkeypatch.setattr(new_pairs, "_lines", lambda rows: "\ud800")  # cannot be written
    monkeypatch.setattr(new_pairs, "make", lambda *_, **__: ([], {"cut": 0}))
    with pytest.raises(UnicodeEncodeError):
        pairs_command(first, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["judge.py", "mine"]
