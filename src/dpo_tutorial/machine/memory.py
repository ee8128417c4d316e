"""Memory of this machine: what is free, what was used at most, and how little of it to hold on to."""

import contextlib
import ctypes
import gc
import sys
import threading
from typing import Self

from . import hardware


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


def free_memory_gib() -> float:
    """Memory that a model could still take: of the GPU where there is one, else of the machine."""
    import psutil
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what torch keeps for later is free too
        return torch.cuda.mem_get_info()[0] / 2**30
    return psutil.virtual_memory().available / 2**30


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

    def __enter__(self) -> Self:
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
    if hardware.device() == "cuda":
        return f"{peak_memory_gib():.1f} GiB allocated by torch on the GPU, since the count was last reset"
    return f"{peak_memory_gib():.1f} GiB of main memory, since this process began"
