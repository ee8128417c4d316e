"""Why a row is dropped, and what to do where most rows are dropped for one reason."""

#: Reasons a row is dropped, in the order they are checked. One row has one reason.
REASONS = {
    "unreadable line": "this place of the source holds no row: no JSON, not UTF-8, or cut short",
    "missing column": "a needed column is absent or null; scores may be absent, but only both",
    "tool call": "a turn holds more than text: a call of a tool, what a tool said, an image",
    "wrong type": "prompt is not text, a conversation not a list of {role, content} texts, or a score not a number",
    "empty conversation": "a side has no turn at all",
    "bad role": "a role other than system, user, assistant",
    "roles out of order": "user and assistant do not alternate, starting with the user",
    "last turn not assistant": "there is no answer to prefer",
    "empty answer": "the last turn is empty or white space",
    "empty turn": "a turn before the answer is empty or white space",
    "invalid text": "control characters or broken Unicode",
    "prompts differ": "the two answers belong to different conversations",
    "chosen equals rejected": "nothing to prefer",
    "tied scores": "the annotator had no preference",
    "inverted scores": "the rejected answer has the higher score",
    "prompt in test": "the conversation is also in a held-out split",
    "control token": "a text spells a special token of this tokenizer, which would open or end a turn by itself",
    "template refuses": "the chat template stops at this conversation with an error of its own",
    "template border": "the prompt's tokens change once an answer follows: no clean cut between the two",
    "template eos": "the answer does not end in exactly one EOS (white space or the end of the text may follow it)",
    "template mask": "the answer's tokens hold a special token or the opening of the turn, which belongs to the prompt",
    "too long": "prompt and answer exceed max_tokens; never cut silently",
    "duplicate prompt": "the same conversation again in this split; the row with the smallest content hash stays",
}

NO_PAIR = "Change the rows, or name their columns in DATA_COLUMNS; docs/data.md shows each kind that is read."
_FIXES = {
    "missing column": NO_PAIR,
    "unreadable line": "Write the file anew as its name says, for example one whole JSON object a line in a .jsonl.",
    "invalid text": "Save the file as UTF-8, without control characters.",
    "too long": "Raise MAX_TOKENS, or take shorter pairs.",
} | {
    reason: "Take a model whose chat template ends an answer with the tokenizer's EOS and takes these turns."
    for reason in REASONS
    if reason.startswith("template")
}


def fix_of(reason: str) -> str:
    """What to do where most rows are dropped for this one of `REASONS`."""
    return _FIXES.get(reason, "Fix the rows in the source; docs/data.md shows what a row may look like.")
