"""`python -m dpo_tutorial WORD …`: the command dpo-tutorial, also for `torchrun -m dpo_tutorial train …`."""

import sys
from pathlib import Path

if not __package__:  # run by its path: the package is found beside its folder, and its modules do not pass for others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dpo_tutorial.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
