"""Is this machine ready for a profile? `dpo-tutorial doctor` says what is ok, odd or broken, and the mend."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
from collections.abc import Callable, Sequence

from . import checks, environment, versions
from . import config as configs
from .config import Config
from .errors import Finding, TutorialError, exit_code, first_line


def examine(config: Config) -> list[Finding]:
    """Check this machine against what `config` needs. Takes seconds; a check that breaks is a finding, not an error."""
    return _run(versions.CHECKS) + _run(checks.CHECKS, config)


def _run(functions: Sequence[Callable], *arguments) -> list[Finding]:
    findings = []
    for check in functions:
        try:
            result = check(*arguments)
        except TutorialError as error:
            result = Finding(check.__name__, "fail", error.cause, error.mend)
        except Exception as error:  # a doctor that dies of what it looks for helps nobody
            mend = "Mend the lines above first, then run the doctor again; if it stays, report this line."
            result = Finding(check.__name__, "fail", f"the check itself stopped: {first_line(error)}", mend)
        findings += [result] if isinstance(result, Finding) else result
    return [dataclasses.replace(f, found=plain(f.found), mend=plain(f.mend)) for f in findings]


def plain(text: str) -> str:
    """The text without secrets and the paths of project and home: what a doctor says is pasted into issues."""
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search("TOKEN|KEY|SECRET|PASSWORD", name, re.IGNORECASE):  # a shorter one: a switch
            text = text.replace(value, "…")
    return environment.without_paths(re.sub(r"\bhf_\w{8,}", "…", re.sub(r"://[^/\s]*@", "://", text)))


def text(findings: Sequence[Finding]) -> str:
    """One line a finding, its mend below; the last line sums up."""
    width = max(len(f.name) for f in findings)
    lines = []
    for f in findings:
        lines.append(f"{f.status:<5} {f.name:<{width}}  {f.found}")
        lines += [f"      {'':<{width}}  mend: {f.mend}"] if f.mend else []
    counts = ", ".join(f"{sum(f.status == s for f in findings)} {s}" for s in ("ok", "warn", "fail"))
    return "\n".join([*lines, f"{'not ready: mend what failed' if _failed(findings) else 'ready'} ({counts})"])


def _failed(findings: Sequence[Finding]) -> bool:
    return any(f.status == "fail" for f in findings)


def _doctor(options: argparse.Namespace, findings: list[Finding]) -> None:
    record, said = {"profile": None, "hardware": None}, io.StringIO()
    with contextlib.redirect_stdout(said):  # with --json, standard output is JSON and nothing else
        try:
            config = configs.resolve(**configs.named(options.p))
            findings += examine(config)
            record = {"profile": config.profile, "hardware": environment.hardware()}
        except (ImportError, OSError) as error:  # torch is missing or cannot be loaded: say what can be said
            mend = "Mend the packages above, then run the doctor again for the other checks."
            findings += _run(versions.CHECKS)
            findings.append(Finding("profile", "fail", plain(f"not resolved: {first_line(error)}"), mend))
    if options.json:
        record |= {"versions": environment.versions(), "findings": [dataclasses.asdict(f) for f in findings]}
        print(json.dumps(record, indent=2))
    else:
        print(plain(said.getvalue()) + text(findings))


def main(argv: list[str] | None = None) -> int:
    """Check python, packages, GPU, 4-bit arithmetic, memory, disk, network and chat template for a profile.

    Returns:
        0 when nothing failed (a warning does not fail), else 1; a wrong parameter is 1 with its message.
    """
    parser = argparse.ArgumentParser(prog="dpo-tutorial doctor", description=main.__doc__.partition("\n")[0])
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    parser.add_argument("--json", action="store_true", help="findings, versions and hardware as JSON")
    findings: list[Finding] = []
    return exit_code(_doctor, parser.parse_args(argv), findings) or int(_failed(findings))
