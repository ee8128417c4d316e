"""`dpo-tutorial chat --url URL`: talk to a model that a server answers for, over the OpenAI API."""

import contextlib
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

from ..config import resolve
from ..errors import ConfigError, ServerError, first_line
from . import chat

WAIT = 300  # seconds for the next piece; a server may load its model first


def stream(url: str, model: str, turns: list[dict], max_tokens: int) -> Iterator[str]:
    """The greedy answer to a conversation, piece by piece; `model` may be "" where a server has only one.

    Raises:
        ConfigError: `url` is no address of a server.
        ServerError: no server is there, it refuses the request, or it stops half way.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url} is not an address of a server.", "Give one such as http://127.0.0.1:8000.")
    asked = {"messages": turns, "stream": True, "temperature": 0, "max_tokens": max_tokens}
    body = json.dumps(asked | ({"model": model} if model else {})).encode()
    address = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with _opener(url).open(request, timeout=WAIT) as lines:  # server-sent events
            for line in lines:
                if line.startswith((b"data: {", b"error: {")):
                    found = json.loads(line.partition(b": ")[2])
                    if "choices" not in found:
                        said = chat.plain(str(found.get("error", found)))[:500]
                        raise ServerError(f"{url} answered with an error: {said}", "Check --model and the server.")
                    (choice, *_) = found["choices"] or [{}]
                    yield choice.get("delta", {}).get("content") or ""
                    if choice.get("finish_reason"):
                        return
        raise LookupError("it stopped in the middle of the answer")
    except urllib.error.HTTPError as error:
        cause = f"{url} answered {error.code}: {chat.plain(error.read(500).decode(errors='replace'))}"
        raise ServerError(cause, "Check --model and the server.") from error
    except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
        raise ServerError(f"{url} did not answer: {first_line(error)}.", "Check --url and the server's log.") from error


def _opener(url: str) -> urllib.request.OpenerDirector:
    """What asks the server: on this machine never through a proxy, which would see the prompts."""
    host = urllib.parse.urlsplit(url).hostname or ""
    own = host in ("localhost", "::1") or host.startswith("127.")
    return urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * own)


def main(url: str, model: str, parameters: dict[str, str]) -> None:
    """Answer what is typed, by a served model."""
    with contextlib.redirect_stdout(None):  # model and data of the profile have no part in this
        config, turns = resolve(**parameters), []
    print("Greedy answers. /quit: end.")
    for question in chat.questions():
        turns.append({"role": "user", "content": question})
        columns, text, name = chat.Columns(), "", chat.plain(model or url)
        for piece in stream(url, model, turns, config.max_new_tokens):
            text += piece
            columns.show({name: text}, False)
        columns.show({name: text}, True)
        turns.append({"role": "assistant", "content": text})
