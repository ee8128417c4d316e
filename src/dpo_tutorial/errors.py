"""What can be wrong, as an error or as a finding of the doctor: each names the cause and the mend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass


class TutorialError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        cause: what is wrong, in one sentence that names the value found.
        mend: what to do about it.
    """

    def __init__(self, cause: str, mend: str) -> None:
        self.cause = cause
        self.mend = mend
        super().__init__(f"{cause}\n  Mend: {mend}")


class ConfigError(TutorialError):
    """An unknown profile or parameter, or a value out of range."""


class ModelFetchError(TutorialError):
    """Weights cannot be fetched: no network, wrong id, or no access."""


class ModelCorruptError(TutorialError):
    """Weights are present but are not the bytes they should be."""


class ModelUnsuitableError(TutorialError):
    """The model or tokenizer lacks something DPO needs, such as a chat template."""


class DataError(TutorialError):
    """A preference file is missing, has another schema, or leaves no usable row."""


class ArtifactError(TutorialError):
    """A file of the run is missing, stale, or cannot be written."""


class JudgeError(TutorialError):
    """A judge cannot be reached, or answers with something that is no verdict."""


class NotebookError(TutorialError):
    """A notebook stopped; names the cell and the partial notebook."""


@dataclass(frozen=True)
class Finding:
    """What one check found: `status` is "ok", "warn" or "fail"; `mend` is empty where there is nothing to do."""

    name: str
    status: str
    found: str
    mend: str = ""


def first_line(error: BaseException) -> str:
    """An error of a library in one line: its type, and what it says first."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def exit_code(action: Callable, *arguments) -> int:
    """Run what a command does; a `TutorialError` becomes its message on standard error and exit code 1."""
    try:
        action(*arguments)
    except TutorialError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0
