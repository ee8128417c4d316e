"""The command: `dpo-tutorial WORD`. What a word needs is imported once it is called."""

import argparse
import os

if not __package__:
    raise SystemExit("A module of the package cannot be run by its path: run `python -m dpo_tutorial` instead.")

from .. import config
from ..errors import ConfigError, exit_code


def run(options: argparse.Namespace, given: dict[str, str]) -> None:
    from . import run

    run.run_all(given)


def train(options: argparse.Namespace, given: dict[str, str]) -> int:
    from ..training import processes

    return processes.train(given, options.processes)


def compare(options: argparse.Namespace, given: dict[str, str]) -> None:
    from ..comparing import compare

    compare.write_report(options.adapter, options.data, options.out, given)


def doctor(options: argparse.Namespace, given: dict[str, str]) -> int:
    from . import doctor

    return doctor.main(given)


def pairs(options: argparse.Namespace, given: dict[str, str]) -> None:
    from ..using import new_pairs

    how = dict(n=options.n, rank=options.rank, seed=options.seed)
    new_pairs.main(options.adapter, options.prompts, options.out, given, **how)


def export(options: argparse.Namespace, given: dict[str, str]) -> int:
    from ..using import export

    if options.kind and options.to == "merged":
        raise ConfigError("--kind is the type of a GGUF file, and --to merged writes none.", "Take --store.")
    how = dict(into=options.into, store=options.store, kind=options.kind or "q8_0", pairs=options.pairs)
    return export.main(options.adapter, options.to, options.out, given, **how)


def publish(options: argparse.Namespace, given: dict[str, str]) -> None:
    from ..using import publish

    how = dict(what=options.what, report=options.report, dry_run=options.dry_run, private=options.private)
    publish.main(options.adapter, options.to, given, **how)


def chat(options: argparse.Namespace, given: dict[str, str]) -> None:
    from ..using import chat, served

    if options.model and not options.url:
        raise ConfigError("--model names a model of a server, and no --url is given.", "Leave --model out.")
    served.main(options.url, options.model, given) if options.url else chat.main(options.adapter, options.merged, given)


def demo(options: argparse.Namespace, given: dict[str, str]) -> None:
    from ..using import demo

    demo.main(options.adapter, options.host, options.port, given)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="dpo-tutorial")
    words = top.add_subparsers(required=True, metavar="run|train|compare|pairs|export|publish|chat|demo|doctor")

    def word(action, what: str, adapter: bool = False) -> argparse.ArgumentParser:
        made = words.add_parser(action.__name__, help=what, description=what)
        made.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
        if adapter:
            made.add_argument("--adapter", required=True, metavar="DIR", help="folder that training saved")
        made.set_defaults(action=action)
        return made

    word(run, "run all six notebooks")
    training = word(train, "train without a notebook, in one process or several")
    training.add_argument("--processes", type=int, metavar="N", help="on this machine, one for each GPU (default: 1)")
    comparing = word(compare, "judge a trained adapter: comparison.json, records.json and one page, report.html", True)
    comparing.add_argument("--data", default="", help="hub id[@revision], folder or file; default: what it trained on")
    comparing.add_argument("--out", default="report", metavar="DIR", help="folder for the report (default: report)")
    pairing = word(pairs, "write new pairs for a further round: best and worst of the policy's own answers", True)
    pairing.add_argument("--prompts", default="", help="hub id, folder or file; default: what it trained on")
    pairing.add_argument("--out", required=True, help="a new folder, or a new file.jsonl")
    pairing.add_argument("--n", type=int, default=4, help="answers drawn for each prompt (default: 4)")
    pairing.add_argument("--rank", default="house-style", metavar="JUDGE", help="house-style, a program, or a server")
    pairing.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    exporting = word(export, "write the trained model for other programs, and check that it still is that one", True)
    exporting.add_argument("--to", required=True, choices=["merged", "gguf", "ollama"])
    exporting.add_argument("--out", default="", metavar="DIR", help="default: beside the adapter, named as --to")
    exporting.add_argument("--into", default="4bit", choices=["4bit", "16bit"], help="which weights of the base")
    exporting.add_argument("--store", default="fp16", choices=["fp16", "bf16", "fp32"], help="type of merged weights")
    exporting.add_argument("--kind", choices=["f16", "q8_0", "q4_k_m"], help="of the GGUF weights (default: q8_0)")
    exporting.add_argument("--pairs", type=int, default=16, help="test pairs scored again (default: 16)")
    publishing = word(publish, "put a trained adapter on a hub, with a card of what was measured", True)
    publishing.add_argument("--to", required=True, metavar="OWNER/NAME", help="repository; made if it is new")
    publishing.add_argument("--what", default="adapter", choices=["adapter", "merged"], help="default: adapter")
    publishing.add_argument("--report", default="", metavar="DIR", help="folder that compare wrote; default: the run's")
    publishing.add_argument("--private", action="store_true", help="make a new repository private; take no public one")
    publishing.add_argument("--dry-run", action="store_true", help="upload nothing: list the files, print the card")
    chatting = word(chat, "talk to base and policy side by side, to a merged model, or to a served one")
    with_what = chatting.add_mutually_exclusive_group(required=True)
    with_what.add_argument("--adapter", metavar="DIR", help="folder that training saved")
    with_what.add_argument("--merged", metavar="DIR", help="folder that export --to merged wrote")
    with_what.add_argument("--url", help="a server with the OpenAI API, such as http://127.0.0.1:8000")
    chatting.add_argument("--model", default="", metavar="NAME", help="with --url: the server's name of the model")
    showing = word(demo, "a page on this machine: two blind answers, a vote, and the token rewards", True)
    showing.add_argument("--host", default="127.0.0.1", help="address it is shown at (default: this machine alone)")
    showing.add_argument("--port", type=int, default=7860, help="default: 7860")
    word(doctor, "is this machine ready for a profile?")
    return top


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; 1 where the work failed, with its message; 2 where the words make no sense."""
    options = parser().parse_args(argv)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # for notebooks too; it is read when huggingface_hub is imported
    return exit_code(lambda: options.action(options, config.named(options.p)))  # a wrong name is found before imports
