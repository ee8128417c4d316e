"""`python -m dpo_tutorial WORD …`: the command dpo-tutorial, also for `accelerate launch -m dpo_tutorial train …`."""

from .cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
