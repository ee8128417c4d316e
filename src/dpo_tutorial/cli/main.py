"""The command: `dpo-tutorial run|train|compare|…`. What a word needs is imported once it is called."""

from __future__ import annotations

import argparse

if not __package__:
    raise SystemExit("A module of the package cannot be run by its path: run `python -m dpo_tutorial` instead.")

from .. import config
from ..errors import exit_code


def run(options: argparse.Namespace) -> None:
    from . import run

    run.run_all(config.named(options.p))


def train(options: argparse.Namespace) -> None:
    from ..training import train

    train.train_headless(config.named(options.p))


def compare(options: argparse.Namespace) -> None:
    from ..comparing import compare

    compare.write_report(options.adapter, options.data, options.out, config.named(options.p))


def doctor(options: argparse.Namespace) -> int:
    from . import doctor

    return doctor.main(config.named(options.p))


def pairs(options: argparse.Namespace) -> None:
    from ..using import new_pairs

    how = dict(n=options.n, rank=options.rank, seed=options.seed)
    new_pairs.main(options.adapter, options.prompts, options.out, config.named(options.p), **how)


def export(options: argparse.Namespace) -> int:
    from ..using import export

    how = dict(into=options.into, store=options.store, kind=options.kind, pairs=options.pairs)
    return export.main(options.adapter, options.to, options.out, config.named(options.p), **how)


def chat(options: argparse.Namespace) -> None:
    from ..using import chat

    chat.main(options.adapter, config.named(options.p))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="dpo-tutorial")
    words = top.add_subparsers(required=True, metavar="run|train|compare|pairs|export|chat|doctor")

    def word(action, what: str) -> argparse.ArgumentParser:
        made = words.add_parser(action.__name__, help=what, description=what)
        made.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
        made.set_defaults(action=action)
        return made

    word(run, "run all six notebooks")
    word(train, "train without a notebook; under accelerate: accelerate launch -m dpo_tutorial train")
    comparing = word(compare, "judge a trained adapter: comparison.json, records.json and one page, report.html")
    comparing.add_argument("--adapter", required=True, metavar="DIR", help="folder that training saved")
    comparing.add_argument("--data", default="", help="hub id[@revision], folder or file; default: what it trained on")
    comparing.add_argument("--out", default="report", metavar="DIR", help="folder for the report (default: report)")
    pairing = word(pairs, "write new pairs for a further round: best and worst of the policy's own answers")
    pairing.add_argument("--adapter", required=True, metavar="DIR", help="folder that training saved")
    pairing.add_argument("--prompts", default="", help="hub id, folder or file; default: what it trained on")
    pairing.add_argument("--out", required=True, help="a new folder, or a new file.jsonl")
    pairing.add_argument("--n", type=int, default=4, help="answers drawn for each prompt (default: 4)")
    pairing.add_argument("--rank", default="house-style", metavar="PROGRAM", help="house-style, or a program")
    pairing.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    exporting = word(export, "write the trained model for other programs, and check that it still is the trained model")
    exporting.add_argument("--adapter", required=True, metavar="DIR", help="folder that training saved")
    exporting.add_argument("--to", required=True, choices=["merged", "gguf", "ollama"])
    exporting.add_argument("--out", default="", metavar="DIR", help="default: beside the adapter, named as --to")
    exporting.add_argument("--into", default="4bit", choices=["4bit", "16bit"], help="which weights of the base")
    exporting.add_argument(
        "--store", default="fp16", choices=["fp16", "bf16", "fp32"], help="type of the merged weights"
    )
    exporting.add_argument("--kind", default="q8_0", choices=["f16", "q8_0"], help="type of the GGUF weights")
    exporting.add_argument("--pairs", type=int, default=16, help="test pairs scored again (default: 16)")
    chatting = word(chat, "talk to base and policy side by side")
    chatting.add_argument("--adapter", required=True, metavar="DIR", help="folder that training saved")
    word(doctor, "is this machine ready for a profile?")
    return top


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; 1 where the work failed, with its message; 2 where the words make no sense."""
    options = parser().parse_args(argv)
    return exit_code(options.action, options)
