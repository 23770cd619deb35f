"""Rows come back as they were written, whatever the format; what is broken is named with file, place and remedy."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import zipfile

import pyarrow as pa
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_files import GOOD, ROWS, arrow_bytes, csv_bytes, json_lines, parquet_bytes

from accel_trainer import file_names
from accel_trainer.errors import DataError
from accel_trainer.tables import Origin, read_files

SINGLE_LINES = ["one", "", '"', "  NA ", "😀 差评", "", "1,2"]


def zip_bytes(data: bytes, *names: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names or ("member",):
            archive.writestr(name, data)
    return sink.getvalue()


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
    assert set(FORMATS) == set(file_names.FORMATS)
    assert {key.lstrip(".") for key in COMPRESSIONS} == {"", *file_names.COMPRESSIONS}


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
@pytest.mark.parametrize("form", file_names.TEXT_FORMATS)
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
ONCE = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


# --- faults -----------------------------------------------------------------------------------------------------------

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
    "not decodable": ("a.csv", b"text\n" + b"caf\xe9\xff\n", ["line 2", "byte 8", "not UTF-8", "no gb18030", "dataset.encoding", "cp1252"]),
    "not decodable after mark": ("a.csv", b"\xef\xbb\xbftext\n\xff", ["line 2", "byte 8", "dataset.encoding"]),
    "not decodable far on": ("a.txt", FAR + b"\xff", ["line 1", f"byte {2**20 + 2}", "dataset.encoding"]),
    "utf-16": ("a.csv", GOOD.encode("utf-16"), ["UTF-16", "dataset.encoding: utf-16"]),
    "two encodings": (
        "a.csv",
        "text\n很好吃\n太慢了\n".encode() + "很差\n凉了\n".encode("gb18030"),
        ["line 4", "2 of its 4 lines beyond ASCII are not UTF-8", "mixed", "as UTF-8"],
    ),
    "letters with accents alone": ("a.csv", "text\nétés\n".encode("latin-1"), ["line 2", "cp1252"]),
    "Big5": ("a.csv", "text\n這家餐廳的服務非常好\n".encode("cp950"), ["Big5", "cp950", "else `dataset.encoding: gb18030`"]),
    "semicolons": ("a.csv", "text;label\nHello, you;1\n", ["line 1", "separated by ';'", "sep=';'"]),
    "tabs in a csv": ("a.csv", "text\tlabel\na\t1\n", ["line 1", "separated by '\\t'", "end its name in .tsv"]),
    "commas in a tsv": ("a.tsv", "text,label\na,1\n", ["line 1", "separated by ','", "end its name in .csv"]),
    "bars": ("a.tsv.gz", gzip.compress(b"text|label\na|1\n"), ["line 1", "separated by '|'", "sep='|'"]),
    "broken line": ("a.jsonl", '{"text": "a"}\n\n{"text": \n', ["line 3", "not JSON", "one record per line"]),
    "broken list": ("a.json", '[{"text": "a"},\n{"text" "b"}]', ["line 2", "not JSON", "list of records"]),
    "dictionary over lines": ("a.json", '{\n"text": ["a"]\n}', ["line 1", "not JSON", "list of records"]),
    "no record": ("a.jsonl", '{"text": "a"}\n"b"\n', ["line 2", "no record", "write {"]),
    "no record in a list": ("a.json", '[{"text": "a"}, 3]', ["row 2", "no record", "write {"]),
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


def test_encodings_that_are_wrong(tmp_path):
    (tmp_path / "a.csv").write_bytes("text\n差\n".encode())
    with pytest.raises(DataError, match=r"a\.csv: byte 5 does not decode as ascii; correct `dataset.encoding`"):
        read_files([tmp_path / "a.csv"], "ascii")
    for wrong in ("no-such", "hex"):
        with pytest.raises(DataError, match=f"'{wrong}' is no text encoding; write one"):
            read_files([tmp_path / "a.csv"], wrong)


@pytest.mark.parametrize("text", ["這家餐廳的服務非常好，食物很新鮮", "很快，好吃，味道足，量大", "café, 很好"])
def test_gb18030_is_not_taken_for_big5_or_latin(tmp_path, text):
    (tmp_path / "a.txt").write_bytes(text.encode("gb18030"))
    assert read_files([tmp_path / "a.txt"]).data["text"][:] == [text]


def test_big5_is_read_where_it_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("這家餐廳的服務非常好".encode("cp950"))
    assert read_files([tmp_path / "a.txt"], "cp950").data["text"][:] == ["這家餐廳的服務非常好"]


@pytest.mark.parametrize("header", ["text", "text;", ";text", "C|"])
def test_one_column_is_one_column(tmp_path, header):
    (tmp_path / "a.csv").write_text(f"{header}\na;b\n")
    assert read_files([tmp_path / "a.csv"]).data.to_list() == [{header: "a;b"}]
