"""`dpo-tutorial publish --adapter DIR --to owner/name`: a trained model on a hub, with a card of what was measured."""

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData

from .. import knobs, run_folder, show
from ..comparing.report import markdown_table
from ..errors import ArtifactError, ConfigError
from ..knobs import Config
from ..loading import embedded, hub
from ..pairs import reader
from ..training import card, save
from . import gate, merge

Files = dict[str, bytes | Path]  # name in the repository → content, or the file that holds it

#: Ends of the names that go: weights, settings, tokenizer, digests of the training pairs. No pickle does.
_KINDS = {".safetensors", ".json", ".jinja", ".txt", ".model"}
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_LOCAL = "local pairs"
#: Hub id and licence of the embedded base.
_EMBEDDED = ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
_LICENCES = {knobs.EMBEDDED: "CC0-1.0", knobs.ULTRAFEEDBACK[0]: "MIT", _LOCAL: "not published"}


def publish(
    adapter: Path, to: str, *, what: str = "adapter", report: Path | None = None, dry_run: bool = False,
    private: bool = False,
) -> Files:  # fmt: skip
    """Upload a trained adapter, or the merged model beside it, with its card; the repository is made if it is new.

    Args:
        to: owner/name; what: "adapter" or "merged".
        report: folder with `comparison.json`; default: the run's, where it has one.
        dry_run: upload nothing, and ask no network.
        private: make a new repository private, and take no public one.

    Returns:
        What was, or would be, uploaded.

    Raises:
        ConfigError: `to` is malformed, or there is no token.
        ArtifactError: adapter, merged model or report is missing or of another training; the gate has refused the
            merged model; a file would give a folder of this machine or the token away; the repository is public and
            must not be, or holds the other kind of model; the hub cannot be reached, or refuses.
    """
    if not _HUB_NAME.fullmatch(to):
        raise ConfigError(f"--to {to} is no name of a repository.", "Give owner/name, as on the hub.")
    files = collect(adapter, to, what, report)
    if dry_run:
        return files
    if not huggingface_hub.get_token():
        raise ConfigError("There is no token of the hub on this machine.", "Run `hf auth login`, or set HF_TOKEN.")
    try:
        HfApi().create_repo(to, private=private or None, exist_ok=True)
        _check_repository(HfApi().model_info(to), what, private)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        HfApi().create_commit(to, operations, commit_message=f"Publish {what}")
    except ArtifactError:
        raise
    except Exception as error:  # of the hub, of its client, of the disk
        why, fix = hub.why(error)
        if getattr(getattr(error, "response", None), "status_code", None) == 403:
            why, fix = "this token may not write there", "Take a token that may, or another --to."
        raise ArtifactError(f"{to} could not be published: {why}.", fix) from error
    return files


def _check_repository(there: huggingface_hub.ModelInfo, what: str, private: bool) -> None:
    other, name = {"adapter": ("a merged model", "config.json"), "merged": ("an adapter", "adapter_config.json")}[what]
    if any(file.rfilename == name for file in there.siblings or []):
        raise ArtifactError(
            f"{there.id} holds {other}. Of a repository with both, transformers puts the adapter on another base.",
            "Give --to a repository of its own.",
        )
    if private and not there.private:
        raise ArtifactError(f"{there.id} is public already.", "Make it private on the hub, or give --to another name.")


def collect(adapter: Path, to: str, what: str, report: Path | None) -> Files:
    """All that `publish` uploads, the card as `README.md`. Of local pairs neither name nor text is in it.

    That holds for those trained on and for those it was judged or gated on, which may be others.
    """
    record, run = save.read_training_record(adapter), adapter.absolute().parent
    config, comparison = record["config"], _comparison(report or run, record, bool(report))
    places = save.read_places(adapter)
    local = "data" in places or not _published(config["data"])
    same = (comparison or {}).get("data") == config["data"]
    gated = _gated(run / "merged", adapter) if what == "merged" else None
    folder = run / "merged" if gated else adapter
    words = {huggingface_hub.get_token() or "", str(run), *places.values()} - {"", run.anchor}  # all lies below a root
    private = {form for w in words for form in (w, json.dumps(w)[1:-1], json.dumps(w, ensure_ascii=False)[1:-1])}
    config |= {"start_from": Path(config["start_from"]).name} | ({"data": _LOCAL} if local else {})
    found = [*folder.glob("*"), *folder.glob("ref/*")]  # ref: the adapter that this one went on from
    files: Files = {p.relative_to(folder).as_posix(): p for p in sorted(found) if p.suffix in _KINDS}
    files["training.json"] = run_folder.json_text(record).encode()
    if gated:
        gated["greedy"]["differs"] = None  # it quotes a prompt, and nothing says of which pairs
        files["GATE.json"] = run_folder.json_text(gated).encode()
    page = (report or run) / "report.html"
    if same and page.is_file() and not local:  # it quotes prompts and answers
        files["report.html"] = page
    files["README.md"] = written(record, to, comparison, gated).encode()
    for name, content in files.items():
        text = b"" if name.endswith(".safetensors") else content.read_bytes() if isinstance(content, Path) else content
        if any(word.encode() in text for word in private):
            raise ArtifactError(f"{name} has a folder of this machine in it, or the token.", "Take it out of there.")
    return files


def _published(data: str) -> bool:
    """Is DATA, as a record names it, the repository's own or a hub id? `private/pairs.jsonl`, now gone, is neither."""
    named = _HUB_NAME.fullmatch(data) and not data.lower().endswith(reader.SUFFIXES)
    return data == knobs.EMBEDDED or bool(named)


def _comparison(folder: Path, record: dict, wanted: bool) -> dict | None:
    path = folder / "comparison.json"
    again = "Run `dpo-tutorial compare` on this adapter, and give its --out as --report."
    if not path.is_file():
        if wanted:
            raise ArtifactError(f"There is no comparison.json in {folder}.", again)
        return None
    found: Any = run_folder.read_json(path)
    if any(found["adapter"][name] != record[name] for name in ("config", "base", "seconds")):
        raise ArtifactError(f"{path} is of another training.", again)
    return found


def _gated(folder: Path, adapter: Path) -> dict:
    """What the gate found in the merged folder, which must be of this adapter and the trained model."""
    path = folder / "GATE.json"
    found: Any = run_folder.read_json(path) if path.is_file() else {}
    if found.get("adapter_sha256") != embedded.sha256(adapter / "adapter_model.safetensors"):
        why = "was not exported from this adapter" if found else "holds no merged model"
    elif found["why"]:
        why = f"is not the trained model: {' '.join(found['why']).rstrip('.')}"
    else:
        return found
    raise ArtifactError(f"{folder} {why}.", "Run `dpo-tutorial export --adapter DIR --to merged`.")


def written(record: dict, to: str, comparison: dict | None, gated: dict | None) -> str:
    """The card: metadata for the hub, what the model is, what was measured, what it cost, how to load it.

    Of `training.json`, of `comparison.json` where it was judged, and of `GATE.json` where the model is merged.
    """
    config = Config(**{name: v for name, v in record["config"].items() if name in Config.__dataclass_fields__})
    base, own = record["base"], config.model == knobs.EMBEDDED
    page, licence = _EMBEDDED if own else (base["name"] if "/" in base["name"] else None, None)
    about = ModelCardData(
        base_model=page, base_model_relation=page and ("finetune" if gated else "adapter"), license=licence,
        library_name="transformers" if gated else "peft", pipeline_tag="text-generation", tags=["dpo", "qlora", "trl"],
        datasets=[config.data] if "/" in config.data else None,
    )  # fmt: skip
    rows = card.rows(config, record) + [
        ("Base, before", "DPO on UltraFeedback, by its makers" if own else "as its own page says"),
        ("Licence of the data", _LICENCES.get(config.data, "as its own page says")),
        ("Cost", f"{record['seconds'] / 60:.1f} minutes, {record.get('peak_memory_gib', 'unknown')} GiB at the peak"),
    ]
    lines = ["---", about.to_yaml(), "---", f"# {to.split('/')[1]}", "", markdown_table(["", ""], rows), ""]
    lines += ["## Measured", ""]
    if comparison:
        accuracy = comparison["held_out"]["after"]["accuracy"]
        judges = [("this model", show.share(accuracy), "")] + [
            (name, show.share(row["share"]), show.change(row["difference"]))
            for name, row in comparison["against"].items()
        ]
        head = ["judge", f"accuracy on {accuracy['n']} held-out pairs, 95% interval", "this model minus judge"]
        lines += [markdown_table(head, judges), "", "What changed and what did not:", ""]
        lines += [f"- {line}" for line in comparison["verdict"]]
    else:
        lines += ["Not judged. `dpo-tutorial compare --adapter DIR` judges it on held-out pairs."]
    if gated:
        table = markdown_table(["measure", "adapter", "merged", "limit"], [list(r.values()) for r in gate.rows(gated)])
        lines += ["", "## Is it what was trained?", "", table]
    load = card.MERGED.format(to=to) if gated else card.loading_lines(config, base, to)
    return "\n".join([*lines, "", "## Load", "", load])


def main(adapter: str, to: str, parameters: dict[str, str], *, report: str, dry_run: bool, **how) -> None:
    merge.config_of(adapter, parameters)  # refuses an adapter of another base
    files = publish(Path(adapter), to, report=Path(report) if report else None, dry_run=dry_run, **how)
    for name, content in files.items():
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        print(f"{name:32}{size / 1e3:12,.1f} kB")
    card_text = files["README.md"]
    assert isinstance(card_text, bytes)
    print(f"Nothing was uploaded. The card:\n\n{card_text.decode()}" if dry_run else f"published {to}")
