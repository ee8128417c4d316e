"""Write 1,000 rows of UltraFeedback, laid out as the hub serves them: `python scripts/sample_ultrafeedback.py FOLDER`.

CI uses it where `../shared/data/ultrafeedback_binarized_sample` is not at hand. Needs the hub once.
"""

import sys
from pathlib import Path

from datasets import load_dataset

from dpo_tutorial.knobs import ULTRAFEEDBACK

folder = Path(sys.argv[1])
(folder / "data").mkdir(parents=True, exist_ok=True)
sizes = {"train_prefs": 900, "test_prefs": 100, "train_sft": 50}
for split, rows in sizes.items():
    sample = load_dataset(ULTRAFEEDBACK[0], revision=ULTRAFEEDBACK[1], split=f"{split}[:{rows}]")
    sample.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
files = "".join(f"  - split: {s}\n    path: data/{s}-*\n" for s in sizes)
(folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
