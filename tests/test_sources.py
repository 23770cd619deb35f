"""Rows come back as they were written, whatever the format; what is broken is named with file, place and remedy."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel_trainer import sources
from accel_trainer.errors import DataError
from accel_trainer.recipe import DatasetSection
from accel_trainer.sources import Origin, read_files, read_source

ROWS = [
    {"text": "plain", "label": "007"},
    {"text": 'said "hi", left', "label": "NA"},
    {"text": "two\nlines\r\nand three", "label": "null"},
    {"text": "😀 差评，不好吃", "label": "None"},
    {"text": "  spaces  ", "label": "nan"},
    {"text": "", "label": "1.50"},
    {"text": "2020-01-01", "label": "true"},
    {"text": "tab\there", "label": ""},
    {"text": "x" * 1_000_000, "label": "long"},
]
SINGLE_LINES = ["one", "", '"', "  NA ", "😀 差评", "", "1,2"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "downloads")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return cache


def section(**keys) -> DatasetSection:
    return DatasetSection(splits={"train": "train"}, **keys)


def csv_bytes(rows, encoding="utf-8", delimiter=",", lineterminator="\n") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=lineterminator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(encoding)


def arrow_bytes(table, new) -> bytes:
    sink = pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def parquet_bytes(table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def zip_bytes(data: bytes, *names: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names or ("member",):
            archive.writestr(name, data)
    return sink.getvalue()


def json_lines(rows, encoding="utf-8") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(encoding)


TABLE = pa.Table.from_pylist(ROWS)
FORMATS = {
    "csv": lambda encoding: csv_bytes(ROWS, encoding),
    "tsv": lambda encoding: csv_bytes(ROWS, encoding, "\t", "\r\n"),
    "json": lambda encoding: json.dumps(ROWS, ensure_ascii=False, indent=1).encode(encoding),
    "jsonl": lambda encoding: json_lines(ROWS, encoding),
    "ndjson": lambda encoding: json_lines(ROWS, encoding),
    "txt": lambda encoding: "\n".join(SINGLE_LINES).encode(encoding),
    "parquet": lambda _: parquet_bytes(TABLE),
    "arrow": lambda _: arrow_bytes(TABLE, pa.ipc.new_stream),
}
COMPRESSIONS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zip": zip_bytes,
    ".zst": lambda data: zstandard.compress(data[:1000]) + zstandard.compress(data[1000:]),  # two frames
}


def test_the_formats_tried_are_all_there_are():
    assert set(FORMATS) == set(sources.FORMATS)
    assert {key.lstrip(".") for key in COMPRESSIONS} == {"", *sources.COMPRESSIONS}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("form", FORMATS)
def test_rows_come_back_as_written(tmp_path, form, compression):
    file = tmp_path / f"reviews.{form}{compression}"
    file.write_bytes(COMPRESSIONS[compression](FORMATS[form]("utf-8")))
    table = read_files([file])
    expected = [{"text": line} for line in SINGLE_LINES] if form == "txt" else ROWS
    assert table.data.to_list() == expected
    assert table.origins == (Origin(str(file), len(expected)),)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
@pytest.mark.parametrize("form", sources.TEXT_FORMATS)
def test_every_encoding(tmp_path, form, encoding):
    file = tmp_path / f"reviews.{form}"
    file.write_bytes(FORMATS[form](encoding))
    named = encoding if encoding == "utf-16" else None
    expected = [{"text": line} for line in SINGLE_LINES] if form == "txt" else ROWS
    assert read_files([file], named).data.to_list() == expected


def test_a_byte_order_mark_is_no_part_of_the_header_even_if_utf8_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes(csv_bytes(ROWS, "utf-8-sig"))
    assert read_files([tmp_path / "a.csv"], "UTF8").data.column_names == ["text", "label"]


def test_utf8_that_ends_in_other_bytes_is_not_decided_by_its_head(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ascii\n" * 500_000 + "差".encode("gb18030"))
    assert read_files([tmp_path / "a.txt"]).data[-1] == {"text": "差"}


def test_arrow_file_format_and_one_file_zip_named_by_its_member(tmp_path):
    (tmp_path / "a.arrow").write_bytes(arrow_bytes(TABLE, pa.ipc.new_file))
    (tmp_path / "b.zip").write_bytes(zip_bytes(csv_bytes(ROWS), "inner.csv"))
    for name in ("a.arrow", "b.zip"):
        assert read_files([tmp_path / name]).data.to_list() == ROWS


CELLS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "NA",
        "null",
        "None",
        "nan",
        "007",
        "",
        '"',
        '""',
        "a,b",
        "\r",
        "\n",
        "\r\n",
        "\t",
        "😀",
        " x ",
        "\ufeff",
        "\u2028",
    ]
)
ONCE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ONCE
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), tabs=st.booleans())
def test_any_cell_survives_csv(tmp_path, rows, tabs):
    expected = [{"text": text, "label": label} for text, label in rows]
    file = tmp_path / ("a.tsv" if tabs else "a.csv")
    file.write_bytes(csv_bytes(expected, delimiter="\t" if tabs else ",", lineterminator="\r\n"))
    assert read_files([file]).data.to_list() == expected


JSON_COLUMNS = st.sampled_from(
    [
        CELLS,
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.booleans(),
        st.lists(CELLS, max_size=3),
    ]
)


@ONCE
@given(data=st.data(), ascii_only=st.booleans())
def test_any_value_survives_json(tmp_path, data, ascii_only):
    column = data.draw(JSON_COLUMNS)
    values = data.draw(st.lists(st.none() | column, min_size=1, max_size=5))
    rows = [{"text": value, "n": number} for number, value in enumerate(values)]
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8", newline="")
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    for name in ("a.jsonl", "a.json"):
        read = read_files([tmp_path / name]).data.to_list()
        assert read == rows
        assert [type(row["text"]) for row in read] == [type(row["text"]) for row in rows]


def test_types_known_only_at_the_end_of_a_json_file(tmp_path):
    rows = [{"a": None, "b": 1}] * 2500 + [{"a": "x", "b": 0.5, "c": True}]
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows))
    data = read_files([tmp_path / "a.jsonl"]).data
    assert data[-1] == rows[-1]
    assert data[0] == {"a": None, "b": 1.0, "c": None}


def test_missing_trailing_cells_are_null_and_blank_lines_no_rows(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n\na\nb,\n\n")
    assert read_files([tmp_path / "a.csv"]).data.to_list() == [
        {"text": "a", "label": None},
        {"text": "b", "label": ""},
    ]


def test_class_names_are_kept_and_categories_read(tmp_path):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
    named = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features)
    named.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.arrow").write_bytes(arrow_bytes(named.data.table, pa.ipc.new_stream))
    assert read_files([tmp_path / "a.parquet", tmp_path / "b.arrow"]).data.features == features
    pd.DataFrame({"text": ["a", "b"], "label": pd.Categorical(["x", "y"])}).to_parquet(tmp_path / "c.parquet")
    assert read_files([tmp_path / "c.parquet"]).data["label"][:] == ["x", "y"]


def test_rows_are_placed_in_their_file(tmp_path):
    for name, numbers in {"a.csv": range(3), "b.csv": range(3, 5), "c.csv": range(5, 6)}.items():
        (tmp_path / name).write_bytes(csv_bytes([{"text": str(number)} for number in numbers]))
    table = read_source(section(path=str(tmp_path), data_files="*.csv")).tables["train"]
    assert table.data["text"][:] == ["0", "1", "2", "3", "4", "5"]
    places = [f"{tmp_path / name}.csv, row {row}" for name, row in zip("aaabbc", (0, 1, 2, 0, 1, 0), strict=True)]
    assert [table.place(row) for row in range(6)] == places
    assert sum(origin.rows for origin in table.origins) == len(table.data)


def test_columns_in_another_order_and_wider_types_go_together(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"text": "a", "n": None}]))
    (tmp_path / "b.jsonl").write_bytes(json_lines([{"n": 1, "text": "b"}]))
    (tmp_path / "c.jsonl").write_bytes(json_lines([{"n": 1.5, "text": "c"}]))
    data = read_files([tmp_path / f"{name}.jsonl" for name in "abc"]).data
    assert data.to_list() == [{"text": "a", "n": None}, {"text": "b", "n": 1.0}, {"text": "c", "n": 1.5}]


# Caching ----------------------------------------------------------------------------------------------------------


def test_other_content_of_equal_size_and_time_is_read_again(tmp_path):
    file = tmp_path / "a.csv"
    for text in ("one", "two"):
        file.write_text(f"text\n{text}\n")
        os.utime(file, (1, 1))
        assert read_files([file]).data["text"][:] == [text]


def test_readers_at_once_leave_one_whole_file(tmp_path, own_cache):
    (tmp_path / "a.csv").write_bytes(csv_bytes(ROWS))
    with ThreadPoolExecutor(8) as pool:
        for table in pool.map(read_files, [[tmp_path / "a.csv"]] * 8):
            assert table.data.to_list() == ROWS
    assert [file.suffix for file in own_cache.rglob("*") if file.is_file()] == [".arrow"]


def test_a_damaged_copy_is_named(tmp_path, own_cache):
    (tmp_path / "a.csv").write_text(GOOD)
    read_files([tmp_path / "a.csv"])
    (copy,) = own_cache.rglob("*.arrow")
    copy.write_bytes(b"damaged.")
    with pytest.raises(DataError, match=f"^{copy}: .*delete it"):
        read_files([tmp_path / "a.csv"])


def test_a_broken_file_leaves_nothing_behind(tmp_path, own_cache):
    (tmp_path / "a.csv").write_text("text\n" + "x\n" * 3000 + 'a,"b\n')
    with pytest.raises(DataError):
        read_files([tmp_path / "a.csv"])
    assert not [file for file in own_cache.rglob("*") if file.is_file()]


# Faults -----------------------------------------------------------------------------------------------------------

GOOD = "text,label\na,1\nb,0\n"
FAR = b"x" * (2**20 - 1) + "差".encode()  # begins in one chunk and ends in the next
NO_UTF8 = pa.table({"text": pa.array([b"caf\xe9"]).view(pa.string())})
FAULTS = {  # name: file, content, what the message holds
    "ragged": ("a.csv", GOOD + "a,b,c\n", ["line 4", "3 cells for 2 columns", "quotes"]),
    "ragged after lines in cells": ("a.csv", 'text,label\n"a\nb",1\na,b,c\n', ["line 4", "3 cells"]),
    "unclosed": ("a.csv", GOOD + 'c,"d\ne,1\n', ["line 4", "not closed", "double those inside"]),
    "stray quote": ("a.csv", GOOD + '"c"d,1\n', ["line 4", "not closed", "double those inside"]),
    "tsv quote": ("a.tsv", 'text\tlabel\n"Good" film\t1\n', ["line 2", "not closed", "double those inside"]),
    "NUL": ("a.csv", GOOD + "c\0,1\n", ["line 4", "NUL", "remove it"]),
    "utf-16 without mark": ("a.txt", "ab\n".encode("utf-16-le"), ["line 1", "NUL", "dataset.encoding"]),
    "column twice": ("a.csv", "text,text\na,b\n", ["line 1", "'text' is named twice", "once"]),
    "column unnamed": ("a.csv", ",text\n0,b\n", ["line 1", "column 1 has no name", "index=False"]),
    "empty csv": ("a.csv", "", ["empty", "leave it out"]),
    "empty text": ("a.txt", "", ["empty", "leave it out"]),
    "empty gz": ("a.csv.gz", gzip.compress(b""), ["empty", "leave it out"]),
    "blank csv": ("a.csv", "\n\n", ["no header", "name the columns"]),
    "header only": ("a.csv", "text,label\n", ["line 1", "nothing follows", "add rows"]),
    "not decodable": ("a.csv", b"text\n" + b"caf\xe9\xff\n", ["byte 8", "not UTF-8", "dataset.encoding: latin-1"]),
    "not decodable after mark": ("a.csv", b"\xef\xbb\xbftext\n\xff", ["byte 8", "dataset.encoding"]),
    "not decodable far on": ("a.txt", FAR + b"\xff", [f"byte {2**20 + 2}", "dataset.encoding"]),
    "utf-16": ("a.csv", GOOD.encode("utf-16"), ["byte 0", "dataset.encoding: utf-16"]),
    "broken line": ("a.jsonl", '{"text": "a"}\n\n{"text": \n', ["line 3", "not JSON", "one record per line"]),
    "broken list": ("a.json", '[{"text": "a"},\n{"text" "b"}]', ["line 2", "not JSON", "list of records"]),
    "dictionary over lines": ("a.json", '{\n"text": ["a"]\n}', ["line 1", "not JSON", "list of records"]),
    "no record": ("a.jsonl", '{"text": "a"}\n"b"\n', ["line 2", "no record", "write {"]),
    "no record in a list": ("a.json", '[{"text": "a"}, 3]', ["row 1", "no record", "write {"]),
    "empty list": ("a.json", "[]", ["no records", "add rows"]),
    "mixed types": ("a.jsonl", '{"label": 1}\n{"label": "b"}\n', ["line 2", "'label'", "one type"]),
    "mixed types far apart": (
        "a.jsonl",
        '{"label": 1}\n' * 1000 + '{"label": null}\n{"label": "b"}\n',
        ["line 1002", "'label'", "one type"],
    ),
    "booleans and numbers": ("a.jsonl", '{"y": 0.5}\n{"y": true}\n', ["line 2", "'y'", "one type"]),
    "integer too large": ("a.jsonl", '{"y": 0}\n{"y": 99999999999999999999}\n', ["line 2", "'y'", "one type"]),
    "half a character": ("a.jsonl", '{"text": "\\ud83d"}\n', ["line 1", "'text'", "surrogates"]),
    "csv named parquet": ("a.parquet", GOOD, ["no parquet file", "rename"]),
    "csv named arrow": ("a.arrow", GOOD, ["no arrow file", "rename"]),
    "empty parquet": ("a.parquet", "", ["no parquet file", "rename"]),
    "cut parquet": ("a.parquet", parquet_bytes(TABLE)[:-9], ["damaged", "write it again"]),
    "cut arrow file": ("a.arrow", arrow_bytes(TABLE, pa.ipc.new_file)[:-9], ["damaged", "write it again"]),
    "cut arrow": ("a.arrow", arrow_bytes(TABLE, pa.ipc.new_stream)[:-99], ["damaged", "write it again"]),
    "text that is no UTF-8": ("a.parquet", parquet_bytes(NO_UTF8), ["a.parquet", "damaged"]),
    "csv named gz": ("a.csv.gz", GOOD, ["no csv gz file", "rename"]),
    "unknown extension": ("a.xlsx", "x", ["extension", ".csv", ".parquet", ".zst"]),
    "no extension": ("reviews", "x", ["extension", ".csv", ".parquet", ".zst"]),
    "tar": ("a.tar.gz", "x", ["extension", ".csv", ".parquet", ".zst"]),
    "two in a zip": ("a.csv.zip", zip_bytes(b"text\na\n", "a.csv", "b.csv"), ["2 files", "unpack"]),
    "zip of something": ("a.zip", zip_bytes(b"text\na\n", "a.doc"), ["inside", ".csv"]),
} | {
    f"cut {suffix}": (f"a.csv{suffix}", compress(random.Random(0).randbytes(5000).hex().encode())[:-20], ["a.csv", "damaged"])
    for suffix, compress in COMPRESSIONS.items()
    if suffix
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_with_file_place_and_remedy(tmp_path, fault):
    name, content, needles = FAULTS[fault]
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_files([file])
    message = str(caught.value)
    assert message.startswith(str(file))
    assert [needle for needle in needles if needle not in message] == [], message
    assert ";" in message, "no remedy"


def test_what_is_no_readable_file(tmp_path, monkeypatch):
    (tmp_path / "folder.csv").mkdir()
    for path, needles in {
        str(tmp_path / "folder.csv"): ["folder", "name the files"],
        str(tmp_path / "missing.csv"): ["no such file", "correct the path"],
    }.items():
        with pytest.raises(DataError, match=path) as caught:
            read_files([path])
        assert all(needle in str(caught.value) for needle in needles)
    with pytest.raises(DataError, match="no data files are named"):
        read_files([])

    def deny(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "a.csv").write_text(GOOD)
    monkeypatch.setattr(Path, "open", deny)  # root, who runs tests in containers, is denied nothing
    with pytest.raises(DataError, match=r"a\.csv: permission is denied; "):
        read_files([tmp_path / "a.csv"])


def test_encodings_that_are_wrong(tmp_path):
    (tmp_path / "a.csv").write_bytes("text\n差\n".encode())
    with pytest.raises(DataError, match=r"a\.csv: byte 5 does not decode as ascii; correct `dataset.encoding`"):
        read_files([tmp_path / "a.csv"], "ascii")
    for wrong in ("no-such", "hex"):
        with pytest.raises(DataError, match=f"'{wrong}' is no text encoding; write one"):
            read_files([tmp_path / "a.csv"], wrong)


@pytest.mark.parametrize(
    ("one", "other", "column"),
    [({"text": "a"}, {"text": "a", "id": 1}, "id"), ({"text": "a", "y": 1}, {"text": "a", "y": "b"}, "y")],
)
def test_files_of_different_columns(tmp_path, one, other, column):
    (tmp_path / "a.jsonl").write_bytes(json_lines([one]))
    (tmp_path / "b.jsonl").write_bytes(json_lines([other]))
    with pytest.raises(DataError, match=rf"a\.jsonl and .*b\.jsonl: the columns '{column}' differ.*; give"):
        read_files([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])


# What `path` and `data_files` name --------------------------------------------------------------------------------


def write_texts(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        file = folder / name.replace("__", "/").replace("_csv", ".csv")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text\n{text}\n")
    return folder


def texts(source) -> dict[str, list[str]]:
    return {split: table.data["text"][:] for split, table in source.tables.items()}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train_csv", "dev_csv", "test_csv"], {"train": 1, "validation": 1, "test": 1}),
        (["reviews_csv", "more_csv"], {"train": 2}),
        (["reviews_csv", "test_csv"], {"train": 1, "test": 1}),
        (["train_csv", "test_csv", "notes_csv"], {"train": 1, "test": 1}),
        (["train__a_csv", "train__b_csv", "test__a_csv"], {"train": 2, "test": 1}),
        (["a_csv", ".hidden_csv", ".git__b_csv"], {"train": 1}),
        (["data__train-00000-of-00002_csv", "data__train-00001-of-00002_csv", "data__extra-00000-of-00001_csv"],
         {"train": 2, "extra": 1}),
    ],
)  # fmt: skip
def test_files_of_a_folder_are_grouped_by_name(tmp_path, files, expected):
    folder = write_texts(tmp_path / "reviews [1]", **dict.fromkeys(files, "x"))
    (folder / "notes.md").write_text("no data")
    source = read_source(section(path=str(folder)))
    assert {split: len(table.data) for split, table in source.tables.items()} == expected
    assert source.revision is None


def test_a_name_that_tells_of_two_splits_is_refused(tmp_path):
    write_texts(tmp_path, train_csv="a", **{"train_test_csv": "b"})
    with pytest.raises(DataError, match=r"train_test\.csv: .*train and test; name the files"):
        read_source(section(path=str(tmp_path)))


def test_only_the_splits_asked_for_are_read(tmp_path):
    write_texts(tmp_path, train_csv="a", test_csv="b")
    (tmp_path / "test.csv").write_text("")
    assert texts(read_source(section(path=str(tmp_path)), only={"train"})) == {"train": ["a"]}
    with pytest.raises(DataError, match="no split 'dev', only train, test; correct"):
        read_source(section(path=str(tmp_path)), only={"dev"})


def test_data_files(tmp_path, monkeypatch):
    folder = write_texts(tmp_path, a1_csv="1", a2_csv="2", b_csv="3", **{"odd[1]_csv": "4"})
    monkeypatch.chdir(tmp_path)
    named = {"train": ["a*.csv", "a1.csv"], "dev": str(folder / "b.csv"), "odd": "odd[1].csv"}
    expected = {"train": ["1", "2"], "dev": ["3"], "odd": ["4"]}
    assert texts(read_source(section(path=str(folder), data_files=named))) == expected
    assert texts(read_source(section(data_files=named))) == expected
    assert texts(read_source(section(path="b.csv"))) == {"train": ["3"]}
    for wrong, match in {"c*.csv": "no file is found.*; correct", "c.csv": "no such file; correct"}.items():
        with pytest.raises(DataError, match=match):
            read_source(section(path=str(folder), data_files=wrong))


def test_folders_without_data(tmp_path):
    with pytest.raises(DataError, match=r"holds no data files; known are \.csv"):
        read_source(section(path=str(tmp_path)))
    with pytest.raises(DataError, match="no such file; correct"):
        read_source(section(path=str(tmp_path / "missing")))


def test_saved_to_disk(tmp_path):
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    data.with_format("numpy").save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "two")
    assert texts(read_source(section(path=str(tmp_path / "one")))) == {"train": ["a", "b"]}
    source = read_source(section(path=str(tmp_path / "two")))
    assert texts(source) == {"train": ["a", "b"], "test": ["b"]}
    assert source.tables["test"].place(0) == f"{tmp_path / 'two' / 'test'}, row 0"
    next((tmp_path / "two" / "test").glob("*.arrow")).write_bytes(b"")
    assert texts(read_source(section(path=str(tmp_path / "two")), only=["train"])) == {"train": ["a", "b"]}
    with pytest.raises(DataError, match=r"saved dataset is damaged.*; save it again"):
        read_source(section(path=str(tmp_path / "two")))


README = """---
configs:
- config_name: first
  data_files: [{split: train, path: first.parquet}]
- config_name: second
  data_files: [{split: train, path: second.parquet}, {split: test, path: first.parquet}]
---
"""


def write_configs(folder: Path, mark: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(README)
    for name in ("first", "second"):
        (folder / f"{name}.parquet").write_bytes(parquet_bytes(pa.table({"text": [f"{mark} {name}"]})))
    return folder


def test_configs_of_a_folder(tmp_path):
    folder = write_configs(tmp_path / "glue", "local")
    source = read_source(section(path=str(folder), name="second"))
    assert texts(source) == {"train": ["local second"], "test": ["local first"]}
    assert source.tables["train"].place(0) == f"{folder} train, row 0"
    for name in ("third", None):
        with pytest.raises(DataError, match=r"\['first', 'second'\].*`dataset.name`"):
            read_source(section(path=str(folder), name=name))


# The Hub, without a network ---------------------------------------------------------------------------------------

OLD, NEW = "a" * 40, "b" * 40


def hub_cache(home: Path) -> None:
    repository = home / "hub" / "datasets--org--reviews"
    write_configs(repository / "snapshots" / OLD, "old")
    write_configs(repository / "snapshots" / NEW, "new")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(NEW)
    (repository / "refs" / "v1").write_text(OLD)
    broken_off = home / "hub" / "datasets--org--partial"
    write_texts(broken_off / "snapshots" / NEW, **{"data__train-00000-of-00002_csv": "half"})
    (broken_off / "refs").mkdir()
    (broken_off / "refs" / "main").write_text(NEW)


def prepared_cache(home: Path, tmp_path: Path) -> None:
    """What `load_dataset("org/prepared")` leaves."""
    folder = write_texts(tmp_path / "prepared", train_csv="whole")
    built = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "built"))["train"]
    target = home / "datasets" / "org___prepared" / "default" / "0.0.0" / OLD
    shutil.copytree(Path(built.cache_files[0]["filename"]).parent, target)
    next(target.glob("*.arrow")).rename(target / "prepared-train.arrow")
    info = json.loads((target / "dataset_info.json").read_text())
    info |= {"dataset_name": "prepared", "config_name": "default"}
    for split in info["splits"].values():
        split["dataset_name"] = "prepared"
    (target / "dataset_info.json").write_text(json.dumps(info))


READ = """
import json, sys
from accel_trainer.errors import DataError
from accel_trainer.recipe import DatasetSection
from accel_trainer.sources import read_source
for keys in json.loads(sys.argv[1]):
    try:
        source = read_source(DatasetSection(splits={"train": "train"}, **keys), only=["train"])
        table = source.tables["train"]
        print(json.dumps([table.data["text"][:], source.revision, table.place(0)]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


def test_hub_caches_offline(tmp_path):
    home = tmp_path / "home"
    hub_cache(home)
    prepared_cache(home, tmp_path)
    cases = [
        ({"path": "org/reviews", "name": "first"}, [["new first"], NEW, "org/reviews train, row 0"]),
        ({"path": "org/reviews", "name": "second"}, [["new second"], NEW, "org/reviews train, row 0"]),
        ({"path": "org/reviews", "name": "first", "revision": "v1"}, [["old first"], OLD, "org/reviews train, row 0"]),
        ({"path": f"hf://datasets/org/reviews@{OLD}", "name": "first"}, [["old first"], OLD, "org/reviews train, row 0"]),
        ({"path": "org/reviews", "data_files": "second.parquet"}, [["new second"], NEW, "org/reviews train, row 0"]),
        ({"path": "org/prepared"}, [["whole"], OLD, "org/prepared train, row 0"]),
        ({"path": "org/prepared", "revision": OLD}, [["whole"], OLD, "org/prepared train, row 0"]),
        ({"path": "org/prepared", "revision": NEW}, ["revision " + OLD, NEW, "connect once"]),
        ({"path": "org/prepared", "name": "other"}, ["org/prepared", "default"]),
        ({"path": "org/reviews", "name": "third"}, ["['first', 'second']", "`dataset.name`"]),
        ({"path": "org/reviews"}, ["['first', 'second']", "`dataset.name`"]),
        ({"path": "org/partial"}, ["org/partial", "connect once"]),
        ({"path": "org/unknown"}, ["org/unknown", "connect once"]),
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    run = subprocess.run(
        [sys.executable, "-c", READ, json.dumps([keys for keys, _ in cases])],
        env=environment | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == "", "progress bars or log lines"
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    for (keys, expected), answer in zip(cases, answers, strict=True):
        if isinstance(answer, str):
            assert [needle for needle in expected if needle not in answer] == [], (keys, answer)
        else:
            assert answer == expected, keys


def hub_error(kind, status):
    import httpx2 as client

    return kind("refused", response=client.Response(status, request=client.Request("GET", "https://huggingface.co")))


@pytest.mark.parametrize(
    ("kind", "status", "remedy"),
    [
        ("GatedRepoError", 403, "hf auth login"),
        ("RepositoryNotFoundError", 404, "correct `dataset.path`"),
        ("RevisionNotFoundError", 404, "correct `dataset.revision`"),
    ],
)
def test_answers_of_the_hub(monkeypatch, kind, status, remedy):
    def refuse(*_, **__):
        raise hub_error(getattr(sources.huggingface_hub.errors, kind), status)

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    with pytest.raises(DataError) as caught:
        read_source(section(path="org/reviews", revision="v9"))
    assert remedy in str(caught.value)


def test_what_is_asked_of_the_hub(monkeypatch):
    asked = {}

    def load_dataset(*args, **keys):
        asked[args] = keys
        return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]}))

    monkeypatch.setattr(sources, "_commit", lambda *_: NEW)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = read_source(section(path="org/reviews", name="first", revision="v1", data_files={"train": "a.csv"}))
    assert asked == {("org/reviews", "first"): {"revision": NEW, "data_files": {"train": "a.csv"}}}
    assert source.revision == NEW
    assert source.tables["train"].origins == (Origin("org/reviews train", 1),)


def test_a_hub_out_of_reach_is_no_error_where_a_snapshot_is_cached(tmp_path, monkeypatch, caplog):
    def time_out(*_, **__):
        raise TimeoutError("no answer")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", time_out)
    snapshot = write_configs(tmp_path / NEW, "cached")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    source = read_source(section(path="org/reviews", name="first"))
    assert texts(source) == {"train": ["cached first"]}
    assert source.revision == NEW
    assert "the Hub is not reached (TimeoutError)" in caplog.text


def test_datasets_that_need_a_script(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported, but found reviews.py")

    monkeypatch.setattr(sources, "_commit", lambda *_: NEW)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"org/reviews: .*; export the dataset to parquet"):
        read_source(section(path="org/reviews"))


# Addresses --------------------------------------------------------------------------------------------------------


class Server(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses_are_read_again_when_changed_and_never_show_secrets(tmp_path, served):
    url = f"http://user:secret@{served}/a.csv?token=hidden"
    for text in ("one", "two"):
        write_texts(tmp_path, a_csv=text)
        table = read_source(section(path=url)).tables["train"]
        assert table.data["text"][:] == [text]
        assert table.origins == (Origin(f"http://{served}/a.csv", 1),)
    (tmp_path / "a.csv").write_text("text\n")
    for address in (url, url.replace("a.csv", "b.csv"), url.replace("a.csv", "c.doc")):
        with pytest.raises(DataError) as caught:
            read_source(section(data_files=address))
        assert str(caught.value).startswith("http://127.0.0.1")
        assert "secret" not in str(caught.value)
        assert "hidden" not in str(caught.value)


def test_folders_and_patterns_of_any_file_system(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    memory = fsspec.filesystem("memory")
    for name in ("train_1", "train_2", "test"):
        memory.pipe(f"/reviews/{name}.csv", f"text\n{name}\n".encode())
    expected = {"train": ["train_1", "train_2"], "test": ["test"]}
    assert texts(read_source(section(path="memory://reviews"))) == expected
    assert texts(read_source(section(path="memory://reviews", data_files="tr*.csv"))) == {"train": expected["train"]}
    assert texts(read_source(section(data_files="memory://reviews/test.csv"))) == {"train": ["test"]}
    with pytest.raises(DataError, match=r"memory://reviews/x\*: no file is found.*; correct"):
        read_source(section(data_files="memory://reviews/x*"))
