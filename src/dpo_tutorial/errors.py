"""What can be wrong: each error names the cause and the fix."""

import errno
import sys
from collections.abc import Callable, Iterator


class TutorialError(Exception):
    """Base of every error this package raises on purpose.

    `cause` is what is wrong, in one sentence that names the value found; `fix` is what to do about it.
    """

    def __init__(self, cause: str, fix: str) -> None:
        self.cause = cause
        self.fix = fix
        super().__init__(f"{cause}\n  Fix: {fix}")

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the message alone. IPython asks for it; plain Python prints its traceback."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(TutorialError):
    """An unknown profile or parameter, or a value out of range."""


class SessionError(TutorialError):
    """This process has, or would have, something else than the installed package: an older one, or a file beside it."""


class ModelFetchError(TutorialError):
    """Weights cannot be fetched: no network, wrong id, or no access."""


class ModelCorruptError(TutorialError):
    """Weights are present but are not the bytes they should be."""


class ModelUnsuitableError(TutorialError):
    """The model or tokenizer lacks something DPO needs, such as a chat template."""


class DataError(TutorialError):
    """A preference file is missing, has another schema, or leaves no usable row."""


class TrainingError(TutorialError):
    """The loss is no number, or does not begin where it must: what is being trained means nothing."""


class ArtifactError(TutorialError):
    """A file of the run is missing, stale, or cannot be written."""


class ServerError(TutorialError):
    """A model that is served elsewhere does not answer."""


class NotebookError(TutorialError):
    """A notebook stopped; names the cell and the partial notebook."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line; with its type where that is a word or nothing."""
    line = next((line for line in str(error).strip().splitlines() if line.strip()), "")
    return line if " " in line else f"{type(error).__name__}: {line}".removesuffix(": ")


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def disk_error(error: BaseException) -> str | None:
    """What the disk refused, where that is why writing failed; torch and safetensors have errors of their own."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _DISK else None
    words = first_line(error)
    return words if "I/O error" in words or "inline_container" in words else None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those it came from: libraries wrap the reason in errors that say only that something failed."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_SMALLER = (
    "Free the GPU of other programs. Export and chat: -p DTYPE fp16 takes half of float32's memory. Training: "
    "-p BATCH_SIZE 1, and GRAD_ACCUM times the old one; then a smaller MAX_TOKENS or MODEL."
)


def exit_code(action: Callable, *arguments) -> int:
    """Run what a command does. The code is what it returns, else 0; 130 after Ctrl-C.

    After a `TutorialError`, and where the GPU's memory is not enough, it is 1.
    """
    for stream in (sys.stdout, sys.stderr):  # on Windows a file or pipe is written in an old code page without "→"
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return action(*arguments) or 0
    except TutorialError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for a message
            raise
        print(f"\n{first_line(error)}\n  Fix: {_SMALLER}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
