"""The command: `dpo-tutorial WORD …`, or `python -m dpo_tutorial WORD …` in a checkout that is not installed."""

from __future__ import annotations

import argparse

from . import doctor

WORDS = {"doctor": doctor.main}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dpo-tutorial")
    parser.add_argument("word", choices=WORDS, help="doctor: is this machine ready for a profile?")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="what the word takes: see `dpo-tutorial WORD --help`")
    options = parser.parse_args(argv)
    return WORDS[options.word](options.rest)


if __name__ == "__main__":
    raise SystemExit(main())
