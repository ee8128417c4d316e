"""Why something could not be had from the hub: the network, the token, the name, the disk, told apart."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from .. import knobs
from ..errors import causes, disk_error, first_line
from . import embedded


def cache_folder(kind: str = "", name: str = "") -> Path:
    """The hub's cache, or in it the folder of this "model" or "dataset"."""
    return Path(huggingface_hub.constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}" if kind else "")


def model_here(model: str) -> bool:
    """Whether the weights of this MODEL are on this machine."""
    if model == knobs.EMBEDDED:
        return embedded.model_folder().exists()
    return Path(model).expanduser().exists() or any(cache_folder("model", model).glob("snapshots/*/*.safetensors"))


def why(error: BaseException) -> tuple[str, str]:
    """The true cause of an error of `datasets` or `huggingface_hub`, and what to do about it.

    Returns:
        (what happened, to stand behind a name and a colon; the fix, in whole sentences).
    """
    every = list(causes(error))

    def found(kind: type[BaseException]) -> bool:
        return any(isinstance(e, kind) for e in every)

    status = {getattr(getattr(e, "response", None), "status_code", None) for e in every}
    if 401 in status and huggingface_hub.get_token():
        return "the hub refuses your token, which has expired or is wrong", "Run `hf auth login`, or unset HF_TOKEN."
    if found(errors.GatedRepoError) or 403 in status:
        return "gated, and this token may not read it", "Accept its terms on the hub, then run `hf auth login`."
    if found(errors.RevisionNotFoundError):
        return "the hub has it, but not this revision", "Give another @revision, or none."
    if found(errors.RepositoryNotFoundError):
        return "the hub has no such name, or it is private", "Check the name; for a private one, run `hf auth login`."
    if refused := next(filter(None, map(disk_error, reversed(every))), None):
        return f"it could not be stored ({refused})", "Free space, or set HF_HOME to a folder you may write to."
    if found(errors.OfflineModeIsEnabled) or huggingface_hub.constants.HF_HUB_OFFLINE:
        return "not in the cache, and HF_HUB_OFFLINE forbids to ask the hub", "Unset HF_HUB_OFFLINE."
    if unreached := [e for e in every if {"ConnectionError", "TransportError"} & {k.__name__ for k in type(e).__mro__}]:
        return f"the hub cannot be reached ({first_line(unreached[-1])})", "Check the network and the proxy."
    if {429, 500, 502, 503, 504} & status:
        return "the hub is too busy to answer", "Try again in some minutes."
    if any("Config name is missing" in str(e) for e in every):
        return "it holds several data sets", "Download the files of one, and set DATA to their folder."
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error), "Check the name and the revision."
