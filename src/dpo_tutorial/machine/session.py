"""Versions of the packages, and whether this session still holds what pip has replaced."""

import importlib.metadata
import platform
import sys
from collections.abc import Iterable
from importlib.machinery import PathFinder
from pathlib import Path

from packaging.version import InvalidVersion, Version

from ..errors import SessionError

PACKAGES = (
    "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "papermill", "numpy",
)  # fmt: skip

#: Packages that cannot run half old and half new; the distribution of two has another name than the module.
_WHOLE = (
    "torch", "numpy", "pandas", "pyarrow", "scipy", "matplotlib", "statsmodels", "transformers", "tokenizers",
    "safetensors", "huggingface_hub", "datasets", "accelerate", "peft", "trl", "bitsandbytes", "PIL", "sklearn",
)  # fmt: skip
_DISTRIBUTION = {"PIL": "pillow", "sklearn": "scikit-learn"}


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
        SessionError: pip replaced a package that this process had already imported, or a file of the current folder
            is imported in place of a package.
    """
    here, replaced = Path.cwd(), []
    for module in _WHOLE:
        origin = Path(getattr(PathFinder.find_spec(module), "origin", None) or "")
        if here in (origin.parent, origin.parent.parent) and not list(here.glob("*.dist-info")):
            cause = f"{origin} would be imported in place of the package {module}."
            raise SessionError(cause, "Rename it, or work in another folder.")
        held = getattr(sys.modules.get(module), "__version__", None)
        if held is None:  # not imported yet: nothing to look up
            continue
        try:  # base versions, because the local part (+cu128) may be missing on one side
            distribution = _DISTRIBUTION.get(module, module)
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
