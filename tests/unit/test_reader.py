"""Files of rows: every format end to end, exactly the named path, and what one bad row costs."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import re
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import pair
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from dpo_tutorial.errors import DataError
from dpo_tutorial.pairs import prepare, reader, shapes, sources, store
from dpo_tutorial.run_folder import Run

#: Texts that a guess at types would change: dates, numbers, booleans, white space, what looks like JSON.
ODD_TEXTS = [
    "2024-01-01",
    "007",
    "true",
    "1e3",
    " two  spaces\t",
    '{"a": 1}',
    "a\r\nb\u2028c",
    "null",
    "é 漢 🙂",
    "NaN",
]
ROWS = [pair(f"{text} question {i}?", text, f"{text} no", prompt_id=text) for i, text in enumerate(ODD_TEXTS)]
ROWS += [pair(f"Question {i}?", f"Yes {i}.", f"No {i}.") for i in range(20)]

SHAPE = shapes.to_pair(ROWS[0])[1]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zipped(name, data):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("__MACOSX/._it", "")
        archive.writestr(name, data)
    return packed.getvalue()


def encrypted(packed):
    """The same archive with the flags of one that asks for a password."""
    data = bytearray(packed)
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for found in re.finditer(re.escape(mark), bytes(packed)):
            data[found.start() + at] |= 1
    return bytes(data)


def zstd(data):
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(data)
    return packed.getvalue().to_pybytes()


def arrow(rows, new):
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


FORMATS = {
    "pairs.jsonl": jsonl,
    "pairs.JSONL": lambda rows: b"\xef\xbb\xbf" + jsonl(rows).replace(b"\n", b"\r\n\r\n"),
    "pairs.ndjson": lambda rows: jsonl(rows).removesuffix(b"\n"),
    "array.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "array.jsonl": lambda rows: b"\n" + json.dumps(rows).encode(),
    "object.json": lambda rows: json.dumps({"version": 1, "tags": ["a"], "data": rows}).encode(),
    "lines.json": jsonl,
    "pairs.jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
    "pairs.json.Zst": lambda rows: zstd(json.dumps(rows).encode()),
    "pairs.zip": lambda rows: zipped("inner/rows.jsonl", jsonl(rows)),
    "pairs.parquet": parquet,
    "pairs.parquet.gz": lambda rows: gzip.compress(parquet(rows)),
    "stream.arrow": lambda rows: arrow(rows, pa.ipc.new_stream),
    "file.arrow": lambda rows: arrow(rows, pa.ipc.new_file),
}


def at(cfg, path, **changes):
    return dataclasses.replace(cfg, data=str(path), data_revision=None, max_tokens=512, **changes)


def texts(splits):
    """Prompt and answers of every row of the splits, sorted."""
    return sorted((r["chosen"][0]["content"], r["chosen"][-1]["content"], r["rejected"][-1]["content"]) for r in splits)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def every_row(cfg, path):
    splits, said = sources.load_preferences(at(cfg, path), judge=True)
    return list(splits["test"]), said


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_prepared_end_to_end_and_no_text_is_changed(cfg, tokenizer, tmp_path, name):
    path = write(tmp_path / name, FORMATS[name](ROWS))
    rows, said = every_row(cfg, path)
    assert texts(rows) == texts(ROWS) and [row["prompt_id"] for row in rows] == [row["prompt_id"] for row in ROWS]
    assert f"read as: {SHAPE}: {len(ROWS)} rows" in said
    made = prepare.prepare(at(cfg, path), tokenizer)
    assert sum(split["kept"] for split in made.report.values()) == len(ROWS)


def test_blank_lines_before_the_header_of_a_table_are_no_header(cfg, tmp_path):
    path = write(tmp_path / "a.csv", b"\r\n\nprompt,chosen,rejected\na,b,c\n")
    assert [list(row.values()) for row, _, _ in sources.read(at(cfg, path))] == [["a", "b", "c"]]


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.TSV", "pairs.csv.gz"])
def test_a_table_of_text_keeps_each_cell_but_makes_its_scores_numbers(cfg, tmp_path, name):
    cells = [[text, text + "\nsecond line", str(i), "N/A"] for i, text in enumerate(ODD_TEXTS)]
    table = io.StringIO(newline="")
    writer = csv.writer(table, delimiter="\t" if "TSV" in name else ",")
    writer.writerows([["question", "good", "points", "score_rejected"], *cells])
    data = b"\xef\xbb\xbf" + table.getvalue().encode()
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    found = list(sources.read(at(cfg, path, data_columns="score_chosen=points")))
    assert [list(row.values()) for row, _, _ in found] == [[q, a, float(s), no] for q, a, s, no in cells]
    assert [pair["place"] for _, pair, _ in found][:2] == [f"{name}, line 2", f"{name}, line 4"]


@pytest.mark.parametrize("names", shapes.SCORES, ids=", ".join)
def test_the_scores_of_a_table_of_text_are_numbers_under_each_known_name(cfg, tmp_path, names):
    head, cells = ["prompt", "chosen", "rejected", *names], ["Why?", "So.", "No.", "8.5", "3"][: 3 + len(names)]
    path = write(tmp_path / "pairs.csv", f"{','.join(head)}\n{','.join(cells)}\n".encode())
    ((_, pair, _),) = sources.read(at(cfg, path))
    assert (pair["problem"], pair["score_chosen"]) == ("", 8.5)
    assert pair["score_rejected"] == (3 if names[1:] else 0)


def test_a_folder_that_datasets_saved_is_read_by_its_splits(cfg, tmp_path):
    parts = {"train": ROWS[:20], "test": ROWS[20:]}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(tmp_path / "saved")
    write(tmp_path / "saved" / "train" / "cache-0123.arrow", b"left by map()")
    splits, said = sources.load_preferences(at(cfg, tmp_path / "saved"))
    assert texts(splits["test"]) == texts(ROWS[20:]) and len(splits["train"]) + len(splits["val"]) == 20
    assert any("train/cache-0123.arrow" in sentence for sentence in said if sentence.startswith("left alone"))
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "alone", num_shards=2)
    assert texts(every_row(cfg, tmp_path / "alone")[0]) == texts(ROWS)


# --- one row costs one row ----------------------------------------------------------------------------------------

SOUND = jsonl(ROWS)


def lines(*odd):
    """`ROWS`, with these lines before the last."""
    *first, last = SOUND.splitlines(keepends=True)
    return b"".join([*first, *(line + b"\n" for line in odd), last])


ODD = json.dumps(pair("Odd?", "Yes.", "No.")).encode()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (ODD.replace(b"Yes.", b"\\ud800"), "invalid text"),
        (ODD.replace(b"8.0", b'"N/A"'), "wrong type"),
        (ODD.replace(b"8.0", b"null"), "missing column"),
        (ODD.replace(b'"Yes."', b"null"), "wrong type"),
        (ODD.replace(b"8.0", b"1" + b"0" * 400), "wrong type"),
        (ODD[:-20], "unreadable line"),
        (b"{not json", "unreadable line"),
        (ODD.replace(b"Yes.", b"caf\xe9"), "unreadable line"),
        (b"[" * 100_000, "unreadable line"),
        (b'"text"', "wrong type"),
    ],
)
def test_an_odd_line_costs_its_row_by_name_and_place_and_no_other(cfg, tokenizer, tmp_path, line, reason):
    path = write(tmp_path / "pairs.jsonl", lines(line))
    rows, said = every_row(cfg, path)
    place = f"pairs.jsonl, line {len(ROWS)}"
    assert [(row["problem"], row["place"]) for row in rows if row["problem"]] == [(reason, place)]
    assert texts(row for row in rows if not row["problem"]) == texts(ROWS)
    assert any(s.startswith(f"{reason}: 1 rows, first {place}: ") for s in said)
    report = prepare.prepare(at(cfg, path), tokenizer).report["train"]  # what holds no prompt is not held out
    assert report["dropped"] == {reason: 1} and report["examples"] == {reason: [place]}


@pytest.mark.parametrize(
    "changes",
    [
        {"score_chosen": 8.5},
        {"score_chosen": 8},
        {"extra": {"nested": [1, "a", None]}},
        {"prompt_id": None},
        {"chosen": [m | {"name": None, "weight": 1} for m in ROWS[-1]["chosen"]]},
    ],
)
def test_an_extra_key_or_another_kind_of_number_costs_nothing(cfg, tmp_path, changes):
    rows, _ = every_row(cfg, write(tmp_path / "pairs.jsonl", lines(json.dumps(ROWS[-1] | changes).encode())))
    assert len(rows) == len(ROWS) + 1 and not any(row["problem"] for row in rows)


def test_a_row_of_another_kind_changes_no_text_of_the_others(cfg, tmp_path):
    """The text of a file was once made JSON source by one row of it whose content is a list of parts."""
    parts = [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": "hi"}]}]
    odd = json.dumps(pair("q", "hi", "ho") | {"chosen": parts}).encode()
    for name, data in (("one.jsonl", lines(odd)), ("late.jsonl", SOUND * 40 + odd + b"\n")):
        rows, _ = every_row(cfg, write(tmp_path / name, data))
        others = [row for row in rows if row["prompt"] != "q" and not row["problem"]]
        assert len(others) == len(rows) - 1 and set(texts(others)) == set(texts(ROWS))


def test_an_array_that_was_cut_costs_the_row_where_it_breaks_off(cfg, tmp_path):
    whole = json.dumps(ROWS).encode()
    rows, said = every_row(cfg, write(tmp_path / "cut.json", whole[:-30]))
    assert texts(row for row in rows if not row["problem"]) == texts(ROWS[:-1])
    assert [row["place"] for row in rows if row["problem"]] == [f"cut.json, row {len(ROWS)}"]


def test_a_table_row_with_other_cells_than_the_header_costs_itself(tmp_path):
    path = write(tmp_path / "a.csv", b'prompt,chosen\na,b\nc\n"d"x,e\nf,g\nh,"i\n')
    found = list(reader.rows(path))
    assert [row for _, row in found if isinstance(row, dict)] == [
        {"prompt": "a", "chosen": "b"},
        {"prompt": "f", "chosen": "g"},
    ]
    assert [place for place, row in found if isinstance(row, shapes.NotAPair)] == [
        f"a.csv, line {n}" for n in (3, 4, 6)
    ]


def test_arrow_text_that_is_not_utf8_costs_its_own_row(tmp_path):
    column = pa.array([b"a", b"\xe9", b"c"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": column}), tmp_path / "a.parquet")
    found = dict(reader.rows(tmp_path / "a.parquet"))
    assert found["a.parquet, row 1"] == {"prompt": "a"} and found["a.parquet, row 3"] == {"prompt": "c"}
    assert found["a.parquet, row 2"].reason == "unreadable line"


@given(data=st.binary(max_size=60), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow"]))
def test_any_bytes_are_rows_or_an_error_with_cause_and_fix(tmp_path, data, suffix):
    path = write(tmp_path / f"any{suffix}", data)
    try:
        assert all(place.startswith(path.name) for place, _ in reader.rows(path))
    except DataError as error:
        assert error.cause and error.fix


# --- what is no data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "cause"),
    [
        ("pairs.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "pointer of Git LFS"),
        ("pairs.json", b"\n<!DOCTYPE html><html>Sign in</html>", "web page"),
        ("pairs.jsonl", SOUND.decode().encode("utf-16"), "UTF-16"),
        ("pairs.csv", "prompt,chosen\na,b\n".encode("utf-16-le"), "UTF-16-LE"),
        ("pairs.jsonl.gz", gzip.compress(SOUND.decode().encode("utf-16-be")), "UTF-16-BE"),
        ("pairs.jsonl", b"", "is empty"),
        ("pairs.csv", b"\xef\xbb\xbf\n \n", "is empty"),
        ("pairs.csv", b"prompt,chosen\n", "holds no row"),
        ("pairs.csv", b"prompt,chosen,prompt\na,b,c\n", "two columns of one name: prompt."),
        ("pairs.json", b"[]", "holds no row"),
        ("pairs.json", b'{"a": 1, "b": [1]}', "0 lists of objects"),
        ("pairs.json", b'{"a": [{}], "b": [{}]}', "2 lists of objects"),
        ("pairs.parquet", parquet(ROWS)[:-9], "could not be read"),
        ("pairs.arrow", b"ARROW1 and no more", "could not be read"),
        ("pairs.jsonl.gz", gzip.compress(SOUND)[:-20], "could not be read"),
        ("pairs.jsonl.gz", SOUND, "could not be read"),
        ("pairs.zip", b"PK and no more", "could not be read"),
        ("pairs.zip", zipped("a.txt", b"a"), "no known format"),
        ("pairs.zip", encrypted(zipped("a.jsonl", SOUND)), "could not be read"),
        ("pairs.xlsx", b"PK", "no known format"),
        ("pairs", SOUND, "no known format"),
        ("pairs.jsonl", b"{not json\n" * 3, "3 unreadable line. pairs.jsonl, line 1: no JSON"),
        ("pairs.csv", zipped("xl/workbook.xml", b"a"), "packed or a binary table"),
        ("pairs.jsonl", gzip.compress(SOUND), "packed or a binary table"),
        ("pairs.json", parquet(ROWS), "packed or a binary table"),
        ("pairs.csv", "prompt,chosen,rejected\na,é,b\n".encode("latin-1"), "1 invalid text. pairs.csv, line 2: a lone"),
        ("pairs.jsonl", b'{"prompt":"a","chosen":["b"],"rejected":["c"]}', "line 1: chosen is a list of text"),
        (
            "pairs.jsonl",
            b'{"prompt":"a","chosen":"b","rejected":"c","margin":"d"}',
            "margin is text, not a finite number",
        ),
    ],
)
def test_a_file_that_is_no_data_is_refused_with_its_true_cause(cfg, tmp_path, monkeypatch, name, data, cause):
    monkeypatch.setattr(sources, "load_dataset", None)  # no hub is asked
    with pytest.raises(DataError) as caught:
        sources.load_preferences(at(cfg, write(tmp_path / name, data)))
    assert cause in caught.value.cause and name in caught.value.cause and caught.value.fix


@pytest.mark.parametrize(
    "header",
    ["prompt;chosen;rejected", "prompt\tchosen\trejected", "prompt, chosen,rejected ", "prompt,chosen,rejected,,"],
)
def test_a_table_as_spreadsheets_export_it_is_read(tmp_path, header):
    mark = next(mark for mark in ";\t," if mark in header)
    body = mark.join(["Why, then?", '"So; it, is."', "No.", *[""] * header.count(",,") * 2])
    text = f"\ufeff{header}\r\n{body}\r\n".replace("Why, then?", '"Why, then?"')
    ((place, row),) = reader.rows(write(tmp_path / "pairs.csv", text.encode()))
    assert place == "pairs.csv, line 2"
    assert {"prompt": "Why, then?", "chosen": "So; it, is.", "rejected": "No."}.items() <= row.items()


@pytest.mark.parametrize("after", [b'[{"prompt": "b"}]', b"x", b"]"])
def test_what_follows_an_array_is_counted(tmp_path, after):
    found = [row for _, row in reader.rows(write(tmp_path / "pairs.json", b'[{"prompt": "a"}]\n' + after))]
    assert found[0] == {"prompt": "a"} and [row.reason for row in found[1:]] == ["unreadable line"]


def test_a_zip_of_two_files_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.jsonl", "{}")
        archive.writestr("b.jsonl", "{}")
    with pytest.raises(DataError, match="2 files"):
        reader.kind(tmp_path / "two.zip")


# --- exactly the named path ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "beside"),
    [("pairs[1].jsonl", "pairs1.jsonl"), ("a?.jsonl", "ab.jsonl"), ("star*/train.jsonl", "start/train.jsonl"),
     ("sub::x.jsonl", "x.jsonl"), ("sub::x/train.jsonl", "x/train.jsonl")],
)  # fmt: skip
def test_exactly_the_named_path_is_read(cfg, tmp_path, monkeypatch, name, beside):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / beside, jsonl(ROWS))
    data = name.partition("/")[0]
    with pytest.raises(DataError, match="does not exist"):
        sources.load_preferences(at(cfg, data))
    write(tmp_path / name, jsonl(ROWS[:12]))
    assert texts(every_row(cfg, data)[0]) == texts(ROWS[:12])


def test_the_name_of_a_source_is_no_part_of_what_prepared_data_depends_on(cfg, tmp_path):
    one, other = write(tmp_path / "a.jsonl", SOUND), write(tmp_path / "else" / "b.jsonl", SOUND)
    third = write(tmp_path / "c.jsonl", lines(ODD))
    identities = [store.source_identity(at(cfg, path)) for path in (one, other, third)]
    assert identities[0] == identities[1] != identities[2]
    assert store.source_identity(at(cfg, one, data_columns="prompt=question")) != identities[0]
    for name in ("one", "two"):
        write(tmp_path / name / "train.jsonl", SOUND)
        write(tmp_path / name / f"README-{name}.md", b"not read")
    folders = [store.data_dir(Run(at(cfg, tmp_path / name))) for name in ("one", "two")]
    assert folders[0] == folders[1]


def test_the_first_pair_is_shown_before_and_after(cfg, tmp_path):
    path = write(tmp_path / "pairs.jsonl", b"{bad\n" + SOUND)
    before, after, shape = sources.before_and_after(at(cfg, path))
    assert before == ROWS[0] and after["chosen"] == ROWS[0]["chosen"] and shape == SHAPE
    assert after["place"] == "pairs.jsonl, line 2"
    with pytest.raises(DataError, match="no preference pair"):
        sources.before_and_after(at(cfg, write(tmp_path / "none.jsonl", b"{}\n")))
