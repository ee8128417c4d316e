"""Watch a training from outside: a tracker that keeps its curves, and a strip of samples, written as it goes."""

import functools
import importlib.util
import json
import os
from collections.abc import Sequence

import torch
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from trl import DPOTrainer

from .. import run_folder
from ..errors import ConfigError
from ..knobs import Config
from ..loading import models
from . import scoring

PROJECT, TOKENS = "dpo-tutorial", 48


def check_installed(config: Config) -> None:
    """Raises ConfigError: the package of `config.report_to` is not there."""
    name = config.report_to
    if name != "none" and importlib.util.find_spec(name) is None:
        what = "wandb" if name == "wandb" else f"'dpo-tutorial[{name}]'"
        raise ConfigError(f"REPORT_TO={name} needs a package that is not installed.", f"Run `pip install {what}`.")


def arguments(config: Config) -> dict:
    """Arguments of `DPOConfig` for `config.report_to`. What a tracker writes lies in the run's folder, in `tracker`.

    Trackers take their folder from the environment, so it is set there. Nothing is sent anywhere, unless the user's own
    WANDB_MODE or TRACKIO_SPACE_ID says so. Trackio reads its folder once a process.

    Raises:
        ConfigError: as `check_installed`.
    """
    check_installed(config)
    name = config.report_to
    if name == "none":
        return {"report_to": "none"}
    folder = str(config.run_dir / "tracker")
    os.environ |= {"TENSORBOARD_LOGGING_DIR": folder, "TRACKIO_DIR": folder, "WANDB_DIR": folder}
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    if name == "trackio":
        import trackio

        trackio.init = functools.partial(trackio.init, embed=False)  # no dashboard, on Colab behind a public address
    return {"report_to": name, "run_name": f"{config.profile}-seed{config.seed}", "project": PROJECT}


class Samples(TrainerCallback):
    """Answer the same prompts greedily, at the start and at each checkpoint, into `samples.jsonl` of the run's folder.

    A line is `{"step", "prompt", "answer", "finished"}`; `prompt` is the last message of a conversation, `finished` is
    False where the answer was cut at 48 tokens. A resumed training keeps the lines up to its checkpoint. Training
    itself is left as it is: greedy decoding draws no random numbers, and `models.load_base` has switched off what an
    evaluation would do to 4-bit weights. Without prompts a training that begins removes the file of an earlier one.
    """

    def __init__(self, config: Config, run: run_folder.Run, trainer: DPOTrainer, prompts: Sequence[list[dict]]) -> None:
        self.config, self.run, self.trainer, self.prompts = config, run, trainer, prompts
        self.lines: list[dict] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not self.prompts and not state.global_step and state.is_world_process_zero:
            (self.run.dir / "samples.jsonl").unlink(missing_ok=True)
        earlier = read_samples(self.run) if state.global_step else []
        self.lines = [line for line in earlier if line["step"] <= state.global_step]
        if not self.lines:
            self.on_save(args, state, control, **kwargs)

    def on_save(self, args, state, control, **kwargs) -> None:
        if not self.prompts or not state.is_world_process_zero:
            return
        texts = [self.answer(prompt) for prompt in self.prompts]
        for prompt, (text, finished) in zip(self.prompts, texts, strict=True):
            asked = {"step": state.global_step, "prompt": prompt[-1]["content"]}
            self.lines.append(asked | {"answer": text, "finished": finished})
        self.run.write_text("samples.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))
        logs = {f"sample {number}": text for number, (text, _) in enumerate(texts, 1)}
        kinds = tuple(get_reporting_integration_callbacks(args.report_to))
        for tracker in self.trainer.callback_handler.callbacks:
            if isinstance(tracker, kinds):
                tracker.on_log(args, state, control, logs=dict(logs), model=self.trainer.model)

    @torch.no_grad()
    def answer(self, prompt: list[dict]) -> tuple[str, bool]:
        """(text, whether it ended by itself) of the policy's answer to a conversation."""
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        training = model.training
        model.eval()
        always = models.generate_arguments(model, tokenizer)
        with scoring.autocast(self.config):
            out = model.generate(**ids.to(model.device), **always, do_sample=False, max_new_tokens=TOKENS)
        model.train(training)
        answer = out[0, ids["input_ids"].shape[1] :].tolist()
        finished = answer[-1] in always["eos_token_id"]
        return tokenizer.decode(answer[:-1] if finished else answer, skip_special_tokens=True).strip(), finished


def watch(config: Config, run: run_folder.Run, trainer: DPOTrainer) -> None:
    """Have the trainer answer the first `config.watch_prompts` prompts of its validation pairs as it trains."""
    prompts = trainer.eval_dataset[: config.watch_prompts]["prompt"] if config.watch_prompts else []
    trainer.add_callback(Samples(config, run, trainer, prompts))


def read_samples(run: run_folder.Run) -> list[dict]:
    """The lines that `Samples` wrote for this run, in order; none where it did not."""
    path = run.dir / "samples.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
