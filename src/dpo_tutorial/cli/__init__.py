"""The command `dpo-tutorial`: run, train, compare, doctor."""
