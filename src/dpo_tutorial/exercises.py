"""A check for an exercise that lets the notebook go on while the exercise is still to do."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exercise(number: str) -> Iterator[None]:
    """Run the checks of one exercise, and say whether it is solved.

    Raises:
        AssertionError: a check failed: there is an answer, and it is wrong.
    """
    try:
        yield
    except NotImplementedError:
        print(f"Exercise {number}: still to do.")
    else:
        print(f"Exercise {number}: solved.")
