"""The form of one answer, in numbers: its length, whether it came to an end, and how much it repeats itself."""

from collections.abc import Callable


def distinct(text: str, n: int = 2) -> float:
    """distinct-n (Li et al. 2016): different n-grams of words over all n-grams; 1.0 means no repetition."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_repeat(text: str) -> int:
    """Words in the longest run of words that comes at least twice; 0 where no word does."""
    words = text.split()
    n = 0
    while len({tuple(words[i : i + n + 1]) for i in range(len(words) - n)}) < len(words) - n:
        n += 1
    return n


#: Form of an answer → its value, one number per answer.
FORM: dict[str, Callable[[dict], float]] = {
    "tokens": lambda a: a["tokens"],
    "finished": lambda a: float(a["finished"]),
    "distinct-2": lambda a: distinct(a["text"]),
    "longest repeat (words)": lambda a: longest_repeat(a["text"]),
}
