"""`dpo-tutorial demo --adapter DIR`: a page on this machine with two blind answers, a vote, and the token rewards."""

import importlib.util
import os
import random
import socket
from collections import Counter
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from .. import show
from ..adapter import lora
from ..errors import ConfigError, first_line
from ..knobs import Config
from ..loading import models
from . import chat, merge


def page(config: Config, policy: PeftModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The page as `gradio.Blocks`. A and B are base and policy, in an order that only the vote gives away."""
    import gradio as gr

    draw = random.Random(config.seed)

    def ask(question: str):
        talk, names = chat.Chat(config, policy, tokenizer), draw.sample(("base", "policy"), 2)
        for texts, done in talk.ask(question):
            yield *(texts[name] for name in names), "", (talk, names), *[gr.Button(interactive=done)] * 3

    def vote(button: str, asked: tuple[chat.Chat, list[str]], votes: list[str]):
        talk, names = asked
        votes = [*votes, {"A is better": names[0], "B is better": names[1]}.get(button, "tie")]
        return told(talk.heat(), names, votes), votes, *[gr.Button(interactive=False)] * 3

    with gr.Blocks(title="Base and policy", analytics_enabled=False) as made:
        asked, votes = gr.State(), gr.State([])
        question = gr.Textbox(label="Question", submit_btn=True)
        with gr.Row():
            answers = [gr.Textbox(label=letter, lines=8, interactive=False) for letter in "AB"]
        with gr.Row():
            buttons = [gr.Button(word, interactive=False) for word in ("A is better", "B is better", "No difference")]
        outcome = gr.HTML()
        one = dict(concurrency_limit=1, concurrency_id="model")  # both switch the adapter of the same model
        question.submit(ask, question, [*answers, outcome, asked, *buttons], **one)
        for button in buttons:
            button.click(vote, [button, asked, votes], [outcome, votes, *buttons], **one)
    return made


def told(heat: dict[str, list[tuple[str, float]]], names: list[str], votes: list[str]) -> str:
    """HTML: which answer was whose, the votes so far, and the token rewards of both answers."""
    count = Counter(votes)
    words = f"A was the {names[0]}, B the {names[1]}. So far the policy won {count['policy']}, "
    words += f"lost {count['base']} and tied {count['tie']}."
    rewards = {f"reward_{who}": sum(reward for _, reward in tokens) for who, tokens in heat.items()}
    return f"<p>{words}</p>" + show.heat_map(heat | rewards).data


def main(adapter: str, host: str, port: int, parameters: dict[str, str]) -> None:
    """Show the page until it is interrupted.

    Raises:
        ConfigError: the extra is not installed, or nothing can listen at `host` and `port`.
    """
    if not importlib.util.find_spec("gradio"):
        raise ConfigError("The page needs gradio, which is not there.", "Run `pip install 'dpo-tutorial[demo]'`.")
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        cause = f"Nothing can listen at {host}, port {port}: {first_line(error)}."
        raise ConfigError(cause, "Give another --port, or an address of this machine as --host.") from error
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import; without it gradio calls home
    import gradio as gr

    config = merge.config_of(adapter, parameters)
    made = page(config, lora.load_policy(config, adapter), models.load_tokenizer(config))
    ours = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # other themes fetch fonts
    made.launch(server_name=host, server_port=port, share=False, theme=ours, footer_links=[], ssr_mode=False)
