"""Where things lie on this machine, and how to print a text without naming its folders."""

import contextlib
import os
import re
from pathlib import Path

from ..errors import ConfigError


def project_root() -> Path:
    """The checkout this process works in, or the current folder (papermill and nbval start in different ones)."""
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if (folder / "notebooks" / "01_setup.ipynb").exists() and (folder / "pyproject.toml").exists():
            return folder
    return here


def cache_dir() -> Path:
    """Folder for converted weights: `DPO_TUTORIAL_CACHE`, else the platform's user cache.

    Raises:
        ConfigError: the user has no home folder, as in some containers, and the variable is not set.
    """
    from platformdirs import user_cache_dir

    try:
        return Path(os.environ.get("DPO_TUTORIAL_CACHE") or user_cache_dir("dpo-tutorial")).expanduser()
    except RuntimeError:  # of either: a user without a home
        fix = "Set HF_HOME and DPO_TUTORIAL_CACHE to folders."
        raise ConfigError("This user has no home folder to cache in.", fix) from None


def without_paths(text: str) -> str:
    """The text with the folders of project, cache and home as `.`, `<cache>` and `~`: what is shown to others."""
    home = Path.home() if os.path.expanduser("~") != "~" else Path("~")  # a user without one: home() would raise
    folders = [(project_root(), "."), (home, "~")]
    with contextlib.suppress(ConfigError):
        folders.insert(1, (cache_dir(), "<cache>"))
    for folder, name in folders:
        if folder.is_absolute() and len(folder.parts) > 1:  # the root of the file system is nobody's home
            # between two parts of a Windows path stands one backslash, in a repr or in JSON two, in a URL a slash
            written = r"(?:\\\\?|/)".join(re.escape(part.rstrip("\\/")) for part in folder.parts)
            same = re.IGNORECASE if "\\" in str(folder) else 0  # Windows knows one file by its name in any case
            text = re.sub(rf"(?<![\w.-]){written}(?![\w-]|\.\w)", name, text, flags=same)
    return text


def plain(text: str) -> str:
    """The text without secrets and the paths of project and home: what the doctor says is pasted into issues."""
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search("TOKEN|KEY|SECRET|PASSWORD", name, re.IGNORECASE):  # a shorter one: a switch
            text = text.replace(value, "…")
    return without_paths(re.sub(r"\bhf_\w{8,}", "…", re.sub(r"://[^/\s]*@", "://", text)))
