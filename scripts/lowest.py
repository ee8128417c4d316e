"""The dependencies of pyproject.toml at the lowest versions it admits, and the tested torch, one a line, for pip."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lowest(dependencies: list[str]) -> list[str]:
    """`trl>=1.16,<1.17` becomes `trl==1.16`; a dependency without a lower bound is an error."""
    found = [re.fullmatch(r"([\w.-]+)>=([\d.]+)(,<[\d.]+)?", line) for line in dependencies]
    assert all(found), [line for line, match in zip(dependencies, found, strict=True) if not match]
    return [f"{match[1]}=={match[2]}" for match in found]


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    print(*lowest(project["dependencies"]), sep="\n")
    print(*re.findall(r"^torch==.*$", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE))
