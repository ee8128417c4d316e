"""Align a language model with Direct Preference Optimization on one GPU, or on none."""

import logging
import sys
import warnings

from .errors import SessionError
from .machine.session import check_session

try:
    check_session()  # in Colab, pip may just have replaced what this notebook had imported before
except SessionError as error:
    if sys.argv[0] != "-m":
        raise
    raise SystemExit(f"SessionError: {error}") from None  # `python -m dpo_tutorial` would print a traceback

# Two notices that a reader can do nothing about: TRL 1.16 still says gradient_checkpointing where transformers 5.23
# would say activation_checkpointing, and bitsandbytes looks for an optional CPU kernel that is not on the index.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*is deprecated", category=FutureWarning)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
