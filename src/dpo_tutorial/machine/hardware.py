"""What this machine is: its devices, the type it computes in, one process among several, seeds."""

import os
import platform
import re
from datetime import timedelta

DTYPES = ("bf16", "fp16", "fp32")


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

    flags = getattr(torch.cpu, "get_capabilities", dict)()  # by CPUID, so on Windows too; public since torch 2.11
    names = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
    return " and ".join(name for flag, name in names.items() if flags.get(flag)) or None


def runs_on(capability: list[int], built: list[str]) -> bool:
    """Whether a torch built for these holds code for a GPU: binary of its generation (sm), or one to compile (compute).

    A list without either, as of AMD's cards, says nothing.
    """
    known = [(kind, [int(n[:-1]), int(n[-1])]) for kind, n in re.findall(r"(sm|compute)_(\d+)", " ".join(built))]
    return not known or any(at <= capability and (kind == "compute" or at[0] == capability[0]) for kind, at in known)


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


def device() -> str:
    """Where weights are loaded, trained and run: "cuda" where there is a CUDA device, else "cpu".

    Apple's GPUs ("mps") and Intel's ("xpu") are left alone: nothing here was tried on one. Libraries that would look
    for one themselves are told this device, so that nothing is loaded on one device and trained on another.
    """
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def processes():
    """accelerate's record of the processes that train together, on `device()`; made on the first call.

    The others wait up to 12 hours for the first, which prepares the pairs.
    """
    from accelerate import PartialState

    return PartialState(cpu=device() == "cpu", timeout=timedelta(hours=12))


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices): transformers' `set_seed`."""
    from transformers import set_seed

    set_seed(seed)
