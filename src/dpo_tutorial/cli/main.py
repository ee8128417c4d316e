"""The command: `dpo-tutorial run|train|compare|doctor`. What a word needs is imported once it is called."""

from __future__ import annotations

import argparse

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


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="dpo-tutorial")
    words = top.add_subparsers(required=True, metavar="run|train|compare|doctor")

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
    word(doctor, "is this machine ready for a profile?")
    return top


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; 1 where the work failed, with its message; 2 where the words make no sense."""
    options = parser().parse_args(argv)
    return exit_code(options.action, options)
