"""Colab's case: a fresh environment with a torch and a numpy of its own, into which the bootstrap cell installs us."""

import base64
import hashlib
import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
TORCH, NUMPY = "2.9.1+cu126", "2.3.5"  # other ones than ours


def stand_in(folder: Path, name: str, version: str) -> Path:
    """A wheel with a version and nothing else: what pip sees of a torch, without its gigabytes."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"__version__ = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    sums = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip('=')},{len(text)}"
        for path, text in files.items()
    ]
    files[f"{info}/RECORD"] = "\n".join([*sums, f"{info}/RECORD,,", ""])
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def test_the_bootstrap_cell_installs_everything_and_leaves_torch_and_numpy_alone(tmp_path):
    venv.create(tmp_path / "colab", with_pip=True)
    python = tmp_path / "colab" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, stand_in(tmp_path, "torch", TORCH), f"numpy=={NUMPY}"], check=True)

    cells = nbformat.read(ROOT / "notebooks" / "05_train_dpo.ipynb", as_version=4).cells
    (cell,) = [c.source for c in cells if c.cell_type == "code" and "pip" in c.source]
    address = "git+https://github.com/dpo-tutorial/dpo-tutorial"
    assert cell.count(address) == 1
    (tmp_path / "cell.py").write_text(cell.replace(address, ROOT.as_uri()))
    for _ in range(2):  # a second run of the cell changes nothing
        subprocess.run([python, "cell.py"], cwd=tmp_path, check=True)

    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], capture_output=True, check=True)
    found = {package["name"].lower(): package["version"] for package in json.loads(listed.stdout)}
    assert (found["torch"], found["numpy"]) == (TORCH, NUMPY)
    assert {"dpo-tutorial", "trl", "peft", "transformers", "bitsandbytes", "datasets", "papermill"} <= set(found)
    imported = "import dpo_tutorial, dpo_tutorial.config as c; print(len(c.PROFILES))"
    done = subprocess.run([python, "-c", imported], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "5", sys.version
