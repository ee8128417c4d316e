"""Count what UltraFeedback is, for the figure of notebook 04: `python scripts/ultrafeedback_counts.py FOLDER`.

FOLDER holds the preference splits as the hub serves them (`scripts/sample_ultrafeedback.py` writes 1,000 rows). Only
counts are kept, no text of any row.
"""

import json
import sys
from pathlib import Path

import numpy as np
from datasets import load_dataset

from dpo_tutorial.pairs import row_checks, sources

folder = sys.argv[1]
rows = [row for split in ("train_prefs", "test_prefs") for row in load_dataset(folder, split=split)]
gaps = np.array([row["score_chosen"] - row["score_rejected"] for row in rows])
words = {side: [len(row[side][-1]["content"].split()) for row in rows] for side in ("chosen", "rejected")}
edges = [*range(0, 501, 50), 10**6]
longer = np.sign(np.subtract(words["chosen"], words["rejected"]))
problems = [row_checks.row_problem(row) for row in rows]
found = {
    "rows": len(rows),
    "tied": int((gaps == 0).sum()),
    "gap_edges": list(range(11)),
    "gaps": np.histogram(gaps[gaps > 0], bins=range(11))[0].tolist(),
    "word_edges": edges[:-1],
    "words": {side: np.histogram(n, bins=edges)[0].tolist() for side, n in words.items()},
    "median_words": {side: float(np.median(n)) for side, n in words.items()},
    "chosen_longer": int((longer > 0).sum()),
    "same_length": int((longer == 0).sum()),
    "several_turns": sum(len(row["chosen"]) > 2 for row in rows),
    "problems": {reason: problems.count(reason) for reason in row_checks.REASONS if reason in problems},
}
target = Path(sources.embedded_file("train_prefs")).parent / "ultrafeedback_counts.json"
target.write_text(json.dumps(found) + "\n", encoding="utf-8")
print(json.dumps(found, indent=2))
