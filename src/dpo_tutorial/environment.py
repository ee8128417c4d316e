"""What this machine is, which 16-bit type it can use, seeds, and the record kept beside every result."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import platform
import random
import re
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from packaging.version import InvalidVersion, Version

from .errors import SessionError

DTYPES = ("bf16", "fp16", "fp32")
PACKAGES = (
    "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "papermill", "numpy",
)  # fmt: skip

#: Module → distribution, of packages that cannot run half old and half new.
_WHOLE = {
    name: name
    for name in (
        "torch", "numpy", "pandas", "pyarrow", "scipy", "matplotlib", "statsmodels", "transformers", "tokenizers",
        "safetensors", "huggingface_hub", "datasets", "accelerate", "peft", "trl", "bitsandbytes",
    )
} | {"PIL": "pillow", "sklearn": "scikit-learn"}  # fmt: skip


def project_root() -> Path:
    """The checkout this process works in, or the current folder (papermill and nbval start in different ones)."""
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if (folder / "notebooks" / "01_setup.ipynb").exists() and (folder / "pyproject.toml").exists():
            return folder
    return here


def cache_dir() -> Path:
    """Folder for converted weights: `DPO_TUTORIAL_CACHE`, else the platform's user cache."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("DPO_TUTORIAL_CACHE") or user_cache_dir("dpo-tutorial")).expanduser()


def without_paths(text: str) -> str:
    """The text with the folders of project, cache and home as `.`, `<cache>` and `~`: what is shown to others."""
    for folder, name in ((project_root(), "."), (cache_dir(), "<cache>"), (Path.home(), "~")):
        if folder.is_absolute() and len(folder.parts) > 1:  # the root of the file system is nobody's home
            # between two parts of a Windows path stands one backslash, in a repr or in JSON two, in a URL a slash
            written = r"(?:\\\\?|/)".join(re.escape(part.rstrip("\\/")) for part in folder.parts)
            same = re.IGNORECASE if "\\" in str(folder) else 0  # Windows knows one file by its name in any case
            text = re.sub(rf"(?<![\w.-]){written}(?![\w-]|\.\w)", name, text, flags=same)
    return text


def hardware() -> dict:
    """Describe the machine: CPU, memory and, where there is one, the first CUDA device."""
    import psutil
    import torch

    record = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "cuda": torch.cuda.is_available(),
    }
    if not record["cuda"]:
        record["cpu_bf16"] = cpu_bf16()
    else:
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "gpu": properties.name,
            "gpu_count": torch.cuda.device_count(),
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": list(torch.cuda.get_device_capability(0)),
        }
    return record


def cpu_bf16() -> str | None:
    """The instructions with which this CPU multiplies bfloat16 matrices, "AVX512-BF16 and AMX-BF16"; None without.

    Asked of the processor, not timed: load on the machine would change the answer, and with it the run. Arm processors
    with bfloat16, Apple's among them, count as without: nothing here was measured on one, and float32 is right on all.
    """
    import torch

    flags = torch.cpu.get_capabilities()  # by CPUID, so on Windows too; public since torch 2.11
    names = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
    return " and ".join(name for flag, name in names.items() if flags.get(flag)) or None


def pick_dtype(hardware: dict) -> tuple[str, str]:
    """Choose the compute type from the hardware.

    `torch.cuda.is_bf16_supported()` is not asked: on a T4 it counts slow emulation as support.

    Returns:
        (`"bf16"`, `"fp16"` or `"fp32"`, the reason in words).
    """
    if hardware["cuda"]:
        major, minor = hardware["capability"]
        if major >= 8:
            return "bf16", f"compute capability {major}.{minor} computes in bfloat16"
        return "fp16", f"compute capability {major}.{minor} has no native bfloat16"
    found = hardware["cpu_bf16"]
    if not found:
        return "fp32", "this CPU has neither AVX512-BF16 nor AMX-BF16"
    if "AMX" not in found:  # about twice as fast on some processors, half as fast on others (benchmarks/cpu_step.md)
        found += ", but no AMX: if it is slow, try DTYPE=fp32"
    return "bf16", f"this CPU has {found}"


def torch_dtype(name: str):
    """`"bf16"` → `torch.bfloat16`, and so on."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def tune_allocator() -> bool:
    """Have glibc keep freed memory instead of returning it to the kernel after every tensor.

    On a CPU each training step frees and takes gigabytes; by default every one of those pages is mapped and zeroed
    anew. Measured in `benchmarks/cpu_step.md`. Logits go back all the same: pieces as large as theirs leave holes in
    the heap that nothing else fits into (`benchmarks/memory_plan.md`). Returns False where the C library is not glibc.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(m_mmap_threshold, 2**24) and libc.mallopt(m_trim_threshold, 2**31 - 1))
    except (OSError, AttributeError):
        return False


def release_free_memory() -> None:
    """Hand memory that was freed back to the kernel; a C library other than glibc decides for itself."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def device() -> str:
    """Where weights are loaded, trained and run: "cuda" where there is a CUDA device, else "cpu".

    Apple's GPUs ("mps") and Intel's ("xpu") are left alone: nothing here was tried on one. Libraries that would look
    for one themselves are told this device, so that nothing is loaded on one device and trained on another.
    """
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def processes():
    """accelerate's record of the processes that train together, on `device()`; made on the first call."""
    from accelerate import PartialState

    return PartialState(cpu=device() == "cpu")


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Python and package versions, "missing" where there is none: the record kept beside every result."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def check_session() -> None:
    """Stop before a notebook runs on packages that are half old, in memory, and half new, on disk.

    The package calls it when it is imported, which every notebook does before it needs anything else.

    Raises:
        SessionError: pip replaced a package that this process had already imported.
    """
    replaced = []
    for module, distribution in _WHOLE.items():
        held = getattr(sys.modules.get(module), "__version__", None)
        if held is None:  # not imported yet: nothing to look up
            continue
        try:  # base versions, because the local part (+cu128) may be missing on one side
            there = importlib.metadata.version(distribution)
            if Version(Version(held).base_version) != Version(Version(there).base_version):
                replaced.append(f"{distribution} {there} (this session still holds {held})")
        except (importlib.metadata.PackageNotFoundError, InvalidVersion):
            continue
    if replaced:
        raise SessionError(
            f"pip installed {', '.join(replaced)}.",
            "Restart, then run from the top (Colab: Runtime > Restart session; Kaggle: Run > Restart & clear cell "
            "outputs; Jupyter: Kernel > Restart).",
        )


def free_memory_gib() -> float:
    """Memory that a model could still take: of the GPU where there is one, else of the machine."""
    import psutil
    import torch

    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    return free / 2**30


def synchronize() -> None:
    """Wait for the GPU: without it a clock sees only how fast work was queued."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_gib() -> float:
    """What torch has allocated on the GPU at most since the last reset, or, without a GPU, this process's memory.

    A `PeakMemory` block resets the first. The second is the resident set since the process began: nothing resets it.
    """
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    return _resident_peak_gib("RUSAGE_SELF")


def children_peak_memory_gib() -> float | None:
    """Resident set peak of the largest process that this one started and saw end: of a run, its largest notebook.

    None on Windows, which keeps no such record of processes that have ended.
    """
    return None if sys.platform == "win32" else _resident_peak_gib("RUSAGE_CHILDREN")


def _resident_peak_gib(whose: str) -> float:
    import resource  # not on Windows

    peak = resource.getrusage(getattr(resource, whose)).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, Linux KiB


class PeakMemory:
    """Measure how far memory rises in a block (`gib`), and to what (`total_gib`): `with PeakMemory() as peak: …`.

    CUDA: the allocator's own peak. CPU: resident set size, sampled every few milliseconds after freed memory was
    handed back, so it is right to a few megabytes.
    """

    gib: float = 0.0
    total_gib: float = 0.0

    def __enter__(self) -> PeakMemory:
        import torch

        self._cuda = torch.cuda.is_available()
        if self._cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        import psutil

        release_free_memory()
        process = psutil.Process()
        self._before = self._peak = process.memory_info().rss
        self._done = threading.Event()

        def watch() -> None:
            while not self._done.wait(0.005):
                self._peak = max(self._peak, process.memory_info().rss)

        self._watcher = threading.Thread(target=watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_) -> None:
        import torch

        if self._cuda:
            self._peak = torch.cuda.max_memory_allocated()
        else:
            self._done.set()
            self._watcher.join()
        self.gib, self.total_gib = (self._peak - self._before) / 2**30, self._peak / 2**30


def peak_memory_in_words() -> str:
    """`peak_memory_gib`, and what it is the peak of."""
    if device() == "cuda":
        return f"{peak_memory_gib():.1f} GiB allocated by torch on the GPU, since the count was last reset"
    return f"{peak_memory_gib():.1f} GiB of main memory, since this process began"
