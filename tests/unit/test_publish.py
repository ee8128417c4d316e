"""Publishing, to a hub that is a small server on this machine: what is in the card, and what never leaves."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import yaml
from conftest import TEXTS, pair
from huggingface_hub import ModelCard
from test_using import trained, words  # noqa: F401

from dpo_tutorial import knobs
from dpo_tutorial.cli import main as cli
from dpo_tutorial.loading import models
from dpo_tutorial.using import publish

TOKEN = "hf_sentinelOfTheEnvironment"


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does to a client that makes a repository and commits to it; keeps every byte it is sent."""

    sent: list[tuple[str, bytes]] = []
    refuse: dict[str, int] = {}
    there: dict | None = {}  # what the repository holds already, and whether it is private; None: no such one

    def do_GET(self):
        if self.there is None:
            return self.answer(404, {"error": "Repository not found"})
        names = [{"rfilename": name} for name in self.there.get("files", [])]
        self.answer(200, {"id": "some/one", "private": self.there.get("private", False), "siblings": names})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.sent.append((self.path, body))
        status = next((code for part, code in self.refuse.items() if part in self.path), 200)
        here = f"http://{self.headers['Host']}/some/one"
        if self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        else:
            answer = {"url": here, "name": "some/one", "success": True, "commitOid": "0" * 40, "commitUrl": here}
        self.answer(status, answer)

    def answer(self, status, answer):
        answer = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(Hub, "sent", [])
    monkeypatch.setattr(Hub, "refuse", {})
    monkeypatch.setattr(Hub, "there", {})
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def judged(trained):  # noqa: F811
    """The run of `trained` with a report beside its adapter."""
    few = ["-p", "MAX_NEW_TOKENS", "4", "-p", "COMPARE_PROMPTS", "2", "-p", "INSTRUCTIONS", "2"]
    assert cli.main(words("compare", trained, "--out", trained.dir, *few)) == 0
    return trained


@pytest.fixture
def run_copy(judged, tmp_path):
    """A copy of the run to harm: its folder."""
    for name in ("adapter", "comparison.json", "report.html", "places.json"):
        copy = shutil.copytree if name == "adapter" else shutil.copy
        copy(judged.dir / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def public_run(run_copy):
    """The same, as if the pairs it was trained on were the hub's."""
    for path in (run_copy / "comparison.json", run_copy / "adapter" / "training.json"):
        record = json.loads(path.read_text())
        record.get("adapter", record)["config"]["data"] = "some/pairs"
        path.write_text(json.dumps(record | ({"data": "some/pairs"} if "data" in record else {})))
    places = json.loads((run_copy / "places.json").read_text())
    (run_copy / "places.json").write_text(json.dumps({"model": places["model"]}))
    return run_copy


@pytest.fixture
def acme(tmp_path_factory):
    """A file of pairs that nobody else may see."""
    path = tmp_path_factory.mktemp("private") / "acme-secret.jsonl"
    path.write_text("\n".join(json.dumps(pair(f"How is acme {i} made?", *TEXTS[i % 4][1:])) for i in range(16)))
    return path


def command(folder, *more):
    return cli.main(["publish", "--adapter", str(folder / "adapter"), "--to", "some/one", *map(str, more)])


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def committed(hub):
    """Name → bytes of the one commit that was sent."""
    (body,) = [body for path, body in hub.sent if path.endswith("/commit/main")]
    lines = [json.loads(line) for line in body.splitlines()]
    return {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}


# --- what is uploaded ----


def test_what_is_sent_is_what_the_dry_run_lists_and_no_byte_of_it_is_private(judged, hub, capsys, tmp_path_factory):
    assert command(judged.dir, "--dry-run") == 0
    listed = capsys.readouterr().out
    assert hub.sent == []
    assert command(judged.dir) == 0
    sent = committed(hub)
    assert {"README.md", "adapter_model.safetensors", "tokenizer.json", "training.json"} <= set(sent)
    assert "report.html" not in sent, "it quotes local pairs"
    for name, content in sent.items():
        assert f"{name:32}{len(content) / 1e3:12,.1f} kB" in listed
    data = judged.config.data
    folders = (str(judged.dir), str(tmp_path_factory.getbasetemp()))
    for private in (*folders, data.rpartition("/")[2], TOKEN, "boil an egg"):
        assert not [path for path, body in hub.sent if private.encode() in body]
        assert not [name for name, content in sent.items() if private.encode() in content], private
    assert json.loads(sent["training.json"])["config"]["data"] == "local pairs"
    assert sent["README.md"].decode() in listed


def test_other_files_in_the_adapters_folder_stay_there(run_copy):
    others = {"optimizer.bin", "rows.jsonl", "notes.md", "state.pt", "ref/notes.md"}
    (run_copy / "adapter" / "ref").mkdir()
    for name in others:
        (run_copy / "adapter" / name).write_text("mine")
    files = publish.publish(run_copy / "adapter", "some/one", dry_run=True)
    assert "adapter_model.safetensors" in files and not others & set(files)


def test_a_public_report_goes_along(public_run):
    files = publish.publish(public_run / "adapter", "some/one", dry_run=True)
    assert files["report.html"].read_bytes() and b"datasets:\n- some/pairs" in files["README.md"]


def test_of_private_pairs_that_a_public_model_was_judged_on_nothing_is_sent(public_run, acme, hub):
    adapter, report = public_run / "adapter", public_run / "report"
    few = [word for name in ("MAX_NEW_TOKENS", "COMPARE_PROMPTS", "INSTRUCTIONS") for word in ("-p", name, "2")]
    assert cli.main(["compare", "--adapter", str(adapter), "--data", str(acme), "--out", str(report), *few]) == 0
    assert "acme" in (report / "report.html").read_text()
    assert command(public_run, "--report", report) == 0
    sent = committed(hub)
    assert b"accuracy on 16 held-out pairs" in sent["README.md"] and "report.html" not in sent
    assert not [name for name, content in sent.items() if b"acme" in content]


def test_of_private_pairs_that_a_merged_model_was_gated_on_nothing_is_sent(public_run, acme, hub):
    adapter, gate = public_run / "adapter", public_run / "merged" / "GATE.json"
    assert cli.main(["export", "--adapter", str(adapter), "--to", "merged", "-p", "DATA", str(acme)]) == 0
    differs = dict(prompt="How is acme's product made?", token=1, after="acme", adapter="a", exported="b")
    change(gate, greedy={"prompts": 4, "equal": 3, "differs": differs})
    assert command(public_run, "--what", "merged") == 0
    sent = committed(hub)
    assert json.loads(sent["GATE.json"])["greedy"] == {"prompts": 4, "equal": 3, "differs": None}
    assert b"3 of 4" in sent["README.md"]
    assert not [name for name, content in sent.items() if b"acme" in content]


@pytest.mark.parametrize(
    "data", ["private/acme.jsonl", "acme/all.JSONL.gz", "acme/pairs.parquet", "my/own/acme", "./acme", "~/acme"]
)
def test_a_path_of_pairs_that_is_gone_is_no_hub_id(data, public_run):
    training = public_run / "adapter" / "training.json"
    change(training, config=json.loads(training.read_text())["config"] | {"data": data})
    (public_run / "comparison.json").unlink()
    files = publish.publish(public_run / "adapter", "some/one", dry_run=True)
    assert json.loads(files["training.json"])["config"]["data"] == "local pairs"
    assert b"acme" not in files["README.md"] and b"datasets:" not in files["README.md"]


def test_the_card_has_the_measured_numbers_and_valid_metadata(judged):
    text = publish.publish(judged.adapter, "some/one", dry_run=True)["README.md"].decode()
    found = json.loads((judged.dir / "comparison.json").read_text())
    accuracy = found["held_out"]["after"]["accuracy"]
    assert f"{accuracy['rate']:.2f} ({accuracy['low']:.2f} to {accuracy['high']:.2f})" in text
    assert all(f"| {name} | {row['share']['rate']:.2f}" in text for name, row in found["against"].items())
    assert all(f"- {line}" in text for line in found["verdict"]) and "local pairs" in text
    record = json.loads((judged.adapter / "training.json").read_text())
    assert f"{record['seconds'] / 60:.1f} minutes" in text and "ADAPTER = 'tiny-llama', \"some/one\"" in text
    about = ModelCard(text).data.to_dict()
    assert about["library_name"] == "peft" and "dpo" in about["tags"]
    assert about == yaml.safe_load(text.split("---")[1]), "nothing that the hub would not read"


def test_of_the_embedded_model_the_card_says_what_it_was_and_its_licence(judged):
    record = json.loads((judged.adapter / "training.json").read_text())
    record["config"] |= {"model": knobs.EMBEDDED, "data": knobs.EMBEDDED}
    record["base"] |= {"name": models._EMBEDDED_NAME}
    text = publish.written(record, "some/one", None, None)
    about = ModelCard(text).data
    assert about.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and about.license == "apache-2.0"
    assert "DPO on UltraFeedback" in text and "CC0-1.0" in text and "pip download" in text


def test_without_a_report_the_card_says_that_it_was_not_judged(run_copy):
    (run_copy / "comparison.json").unlink()
    files = publish.publish(run_copy / "adapter", "some/one", dry_run=True)
    assert b"Not judged. `dpo-tutorial compare" in files["README.md"] and "report.html" not in files


def test_a_merged_model_goes_with_what_the_gate_found_or_not_at_all(judged, hub, capsys):
    assert command(judged.dir, "--what", "merged") == 1
    assert "holds no merged model" in capsys.readouterr().err
    assert cli.main(words("export", judged, "--to", "merged")) == 0
    assert command(judged.dir, "--what", "merged") == 0
    sent = committed(hub)
    assert "model.safetensors" in sent and "adapter_model.safetensors" not in sent
    about = ModelCard(sent["README.md"].decode()).data
    assert about.library_name == "transformers" and b"KL per token, nats" in sent["README.md"]
    template = judged.dir / "merged" / "chat_template.jinja"
    kept = template.read_text()
    template.write_text(kept + TOKEN)
    assert command(judged.dir, "--what", "merged") == 1
    assert "chat_template.jinja has" in capsys.readouterr().err
    template.write_text(kept)
    gate = judged.dir / "merged" / "GATE.json"
    kept = gate.read_text()
    for values, why in (
        ({"why": ["KL is high."]}, "is not the trained model: KL is high."),
        ({"adapter_sha256": "0"}, "was not exported from this adapter"),
    ):
        change(gate, **values)
        assert command(judged.dir, "--what", "merged") == 1
        assert why in capsys.readouterr().err
        gate.write_text(kept)


@pytest.mark.parametrize(
    ("there", "more", "why"),
    [
        ({"files": ["config.json"]}, [], "holds a merged model"),
        ({"files": ["adapter_config.json"]}, ["--what", "merged"], "holds an adapter"),
        ({"files": ["README.md"], "private": False}, ["--private"], "is public already"),
    ],
)
def test_a_repository_that_would_mix_two_models_or_show_what_must_not_be_is_left_alone(
    there, more, why, judged, hub, capsys
):
    hub.there = there
    if "merged" in more:
        assert cli.main(words("export", judged, "--to", "merged")) == 0
    assert command(judged.dir, *more) == 1 and why in capsys.readouterr().err
    assert not [path for path, _ in hub.sent if path.endswith("/commit/main")]


def test_a_new_repository_is_private_where_that_is_asked_for(judged, hub):
    hub.there = {"private": True}
    assert command(judged.dir, "--private") == 0 and committed(hub)
    (made,) = [json.loads(body) for path, body in hub.sent if path.endswith("/repos/create")]
    assert made.get("private") is True or made.get("visibility") == "private"


def test_an_adapter_that_went_on_from_another_is_published_too(run_copy):
    path = run_copy / "adapter" / "training.json"
    change(path, config=json.loads(path.read_text())["config"] | {"start_from": "adapter"})
    (run_copy / "comparison.json").unlink()  # of another training now
    assert "training.json" in publish.publish(run_copy / "adapter", "some/one", dry_run=True)


# --- what is refused ----


def spoil_base(folder):
    path = folder / "adapter" / "training.json"
    change(path, base=json.loads(path.read_text())["base"] | {"digest": "0" * 64})


def another_training(folder):
    change(folder / "adapter" / "training.json", seconds=-1.0)  # none takes as long


def a_folder_inside(folder):
    change(folder / "adapter" / "tokenizer_config.json", cache=str(folder / "secret"))


def a_place_as_json_writes_it(folder):
    place = str(folder.parent / "jörg.jsonl")  # outside the run, whose own folder is looked for too
    change(folder / "places.json", data=place)
    change(folder / "adapter" / "tokenizer_config.json", cache=place)


def a_place_inside(knob):
    def spoil(folder):
        place = json.loads((folder / "places.json").read_text())[knob]
        change(folder / "adapter" / "tokenizer_config.json", cache=f"{place}/cache")

    return spoil


def a_word_inside(name, word):
    def spoil(folder):
        with (folder / "adapter" / name).open("a") as file:
            file.write(f"{{# {word or folder} #}}")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "more", "said"),
    [
        (spoil_base, [], "was trained on"),
        (another_training, [], "comparison.json is of another training"),
        (a_folder_inside, [], "tokenizer_config.json has a folder of this machine in it"),
        (a_place_as_json_writes_it, [], "tokenizer_config.json has a folder of this machine in it"),
        (a_place_inside("model"), [], "tokenizer_config.json has a folder of this machine in it"),
        (a_place_inside("data"), [], "tokenizer_config.json has a folder of this machine in it"),
        (a_word_inside("chat_template.jinja", ""), [], "chat_template.jinja has a folder of this machine in it"),
        (a_word_inside("chat_template.jinja", TOKEN), [], "chat_template.jinja has a folder of this machine in it, or"),
        (a_word_inside("merges.txt", ""), [], "merges.txt has a folder of this machine in it"),
        (lambda folder: None, ["--report", "nowhere"], "There is no comparison.json in nowhere"),
        (lambda folder: None, ["--to", "no-owner"], "--to no-owner is no name of a repository"),
        (lambda folder: None, ["--to", "a/b/c"], "Give owner/name"),
        (lambda folder: shutil.rmtree(folder / "adapter"), [], "There is no trained adapter"),
    ],
)
def test_what_cannot_be_published_is_refused_before_anything_is_sent(spoil, more, said, run_copy, hub, capsys):
    spoil(run_copy)
    assert command(run_copy, *more) == 1
    assert said in capsys.readouterr().err and hub.sent == []


def test_without_a_token_nothing_is_sent_and_the_dry_run_needs_none(judged, hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert command(judged.dir, "--dry-run") == 0
    assert command(judged.dir) == 1
    assert "There is no token" in (said := capsys.readouterr().err) and "hf auth login" in said and hub.sent == []


def test_the_dry_run_does_not_fetch_the_embedded_base(run_copy, tmp_path, monkeypatch, capsys):
    adapter, cache = run_copy / "adapter", tmp_path / "cache"
    monkeypatch.setenv("DPO_TUTORIAL_CACHE", str(cache))
    monkeypatch.setenv("DPO_TUTORIAL_WHEEL", str(tmp_path / "no wheel, and no download"))
    (run_copy / "comparison.json").unlink()
    record = json.loads((adapter / "training.json").read_text())
    base = record["base"] | {"name": models._EMBEDDED_NAME, "digest": None}
    change(adapter / "training.json", config=record["config"] | {"model": knobs.EMBEDDED}, base=base)
    (run_copy / "places.json").unlink()
    assert command(run_copy, "--dry-run") == 0, capsys.readouterr().err
    assert "Nothing was uploaded" in capsys.readouterr().out and not cache.exists()


@pytest.mark.parametrize(
    ("status", "said"), [(401, "the hub refuses your token"), (403, "this token may not write there")]
)
def test_a_hub_that_refuses_is_told_in_one_sentence_without_the_token(status, said, judged, hub, capsys):
    hub.refuse["/api/repos/create"], hub.there = status, None
    assert command(judged.dir) == 1
    shown = capsys.readouterr().err
    assert said in shown and TOKEN not in shown and len(hub.sent) == 1


def test_a_hub_that_is_not_there_is_told_in_one_sentence(judged, hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert command(judged.dir) == 1
    assert "some/one could not be published: the hub cannot be reached" in capsys.readouterr().err
