"""The library calls that stand in the notebooks' cells give what the package gives to a headless run."""

import dataclasses
import json
import random
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from conftest import TEXTS, code_cells, pair
from peft import get_peft_model
from transformers import set_seed

from dpo_tutorial import knobs, run_folder, show
from dpo_tutorial.adapter import lora
from dpo_tutorial.comparing import baselines, compare, generation, stats
from dpo_tutorial.loading import models
from dpo_tutorial.machine import hardware, memory
from dpo_tutorial.pairs import encoding, house_style, prepare, row_checks, sources, splits, store
from dpo_tutorial.training import scoring
from dpo_tutorial.using import engines

#: What the notebooks' own cells import, by the names they give it.
MODULES = [
    baselines, compare, encoding, generation, hardware, house_style, lora, memory, models, prepare, row_checks,
    scoring, show, sources, splits, stats, store,
]  # fmt: skip
FOLDER = Path(__file__).parents[2] / "notebooks"


def execute(number: str, *calls: str, **names) -> dict:
    """Run the cells of notebook `number` in which these calls stand, with `names` defined; returns all names."""
    (path,) = FOLDER.glob(f"{number}_*.ipynb")
    sources = [cell.source for cell in code_cells(path)]
    for call in calls:
        (source,) = [s for s in sources if call in s]
        exec(compile(source, f"{path.name}: {call}", "exec"), names)
    return names


def test_01_seeds_as_the_package_does():
    def draws(seed):
        seed(7)
        return random.random(), np.random.rand(), torch.rand(3).tolist()

    assert draws(set_seed) == draws(hardware.seed_everything)


@pytest.fixture
def package(cfg):
    return {"cfg": cfg} | {module.__name__.split(".")[-1]: module for module in MODULES}


def test_02_loads_the_tokenizer_that_the_package_loads(cfg, package):
    ours = execute("02", "AutoTokenizer.from_pretrained(", source=models.source(cfg), **package)["tokenizer"]
    theirs = models.load_tokenizer(cfg)
    assert ours.get_vocab() == theirs.get_vocab() and ours.chat_template == theirs.chat_template
    assert (ours.pad_token, ours.eos_token) == (theirs.pad_token, theirs.eos_token)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_02_loads_the_base_that_the_package_loads(cfg, package, dtype):
    package["cfg"] = cfg = dataclasses.replace(cfg, dtype=dtype)
    calls = ("= BitsAndBytesConfig(", "AutoModelForCausalLM.from_pretrained(")
    ours = execute("02", *calls, source=models.source(cfg), **package)["base_nf4"]
    theirs = models.load_base(cfg)
    assert ours.config.use_cache is theirs.config.use_cache is False
    left, right = ours.state_dict(), theirs.state_dict()  # 4-bit weights with their scales
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name
    layers = [m for m in ours.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == sum(isinstance(m, bnb.nn.Linear4bit) for m in theirs.modules()) > 0
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers), "a CPU could repack them"


def test_03_attaches_the_adapter_that_the_package_attaches(cfg, package):
    ours = execute("03", "= LoraConfig(", base=models.load_base(cfg), **package)["policy"]
    theirs = get_peft_model(models.load_base(cfg), lora.lora_config(cfg))
    assert [(n, p.shape, p.requires_grad) for n, p in ours.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in theirs.named_parameters()
    ]
    assert ours.get_nb_trainable_parameters() == lora.trainable_share(ours)


SOUND = [pair(f"{text} ({n})", chosen, rejected) for n in range(6) for text, chosen, rejected in TEXTS]
BAD = [
    pair("A tie?", "Yes.", "No.", score_rejected=8.0),
    pair("Long?", "word " * 200, "No."),
    pair("Silent?", "", "No."),
    SOUND[0] | {"chosen": SOUND[0]["rejected"], "rejected": SOUND[0]["chosen"]},
]


@pytest.fixture(params=["clean", "dirty"])
def rows(request, tmp_path):
    """A file of pairs; the dirty one has a tie, a pair too long, an empty answer and a twin as well."""
    path = tmp_path / f"{request.param}.jsonl"
    lines = SOUND if request.param == "clean" else [*BAD, *SOUND]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def test_04_loads_what_the_package_loads(cfg, package, rows):
    for source in (str(rows), str(rows.parent), knobs.EMBEDDED):
        package["cfg"] = here = dataclasses.replace(cfg, data=source)
        package |= execute("04", 'load_dataset("json", data_files=', **package)
        found = execute("04", "sources.load_preferences(cfg)", **package)
        raw, choices = sources.load_preferences(here)
        assert found["choices"] == choices
        assert {k: v.to_list() for k, v in found["raw"].items()} == {k: v.to_list() for k, v in raw.items()}


def test_04_prepares_by_hand_what_the_package_prepares(cfg, package, rows, tokenizer):
    package["cfg"] = cfg = dataclasses.replace(cfg, data=str(rows), max_train=9)
    raw, _ = sources.load_preferences(cfg)
    calls = ("remove_columns=", ".shuffle(seed=cfg.seed)", "prepared = prepare.prepare(")  # the last one compares
    made = execute("04", *calls, raw=raw, tokenizer=tokenizer, **package)
    assert len(made["by_hand"]) == len(made["prepared"].splits["train"]) == 9
    assert (made["prepared"].report["train"]["kept"] < len(raw["train"])) is (rows.stem == "dirty")


@pytest.fixture
def compared(cfg, package, tokenizer, tmp_path):
    """The names of notebook 06 once an adapter that changes the base is loaded and the pair is scored by hand."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, SOUND)), encoding="utf-8")
    package["cfg"] = cfg = dataclasses.replace(cfg, data=str(path))
    trained = get_peft_model(models.load_base(cfg), lora.lora_config(cfg))
    torch.manual_seed(1)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    trained.peft_config["default"].base_model_name_or_path = models.source(cfg).name
    trained.save_pretrained(tmp_path / "adapter")
    calls = ("policy = PeftModel.from_pretrained(", ".log_softmax(", "(by_package,) = ")
    return execute("06", *calls, folder=tmp_path / "adapter", beta=0.1, tokenizer=tokenizer, **package)


def test_06_loads_the_policy_that_the_package_loads(compared):
    ours, theirs = compared["policy"], lora.load_policy(compared["cfg"], compared["folder"])
    assert not ours.training and not theirs.training
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_06_rewards_answers_and_merges(compared):
    """The cells of the reward hold asserts of their own: by hand and by the package."""
    assert compared["rewards"].abs().max() > 0.01, "an adapter that does nothing would pass"
    made = execute("06", "policy.generate(", "for ids in (by_base, by_policy)", **compared)
    given = (made[name] for name in ("cfg", "policy", "tokenizer"))
    by_package = generation.answers_of_both(*given, [made["example"]["prompt"]])
    assert [[a["text"] for a in answers] for answers in made["both"]] == [[a["text"] for a in b] for b in by_package]
    made["test"] = prepare.prepare(made["cfg"], made["tokenizer"]).splits["test"]
    made["run"] = run_folder.Run(made["cfg"])
    made = execute("06", "merged = policy.merge_and_unload(", "import gc", "gate.measure(trained, exported)", **made)
    policy = lora.load_policy(made["exact"], made["folder"])
    assert made["found"]["pairs"] == min(2, len(made["test"])) and made["found"]["engine"] == "transformers"
    gated = json.loads((made["run"].dir / "merged" / "GATE.json").read_text())
    assert gated["pairs"] == made["found"]["pairs"], "else `export` would refuse to replace the folder"
    exported = engines.opened(made["run"].dir / "merged", made["exact"]).model
    assert torch.allclose(made["log_probs"](exported), made["log_probs"](policy), atol=0.02), "merged, and unchanged"
