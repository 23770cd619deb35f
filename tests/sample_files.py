"""Recipes and tables that several test files write."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from accel_trainer.recipe import DatasetSection

MINIMAL = """\
dataset: {path: org/data, splits: {train: train, validation: validation}}
model: {checkpoint: org/model}
training: {global_batch_size: 8, max_steps: 10, learning_rate: 1e-5}
"""

# YAML scalars and what they are by the core schema of YAML 1.2.
SCALARS: list[tuple[str, object]] = [
    ("2e-5", 2e-5), ("1e5", 1e5), (".5", 0.5), ("1.", 1.0), ("-1.5E+3", -1500.0), ("+.5", 0.5),
    ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("NO", "NO"), ("y", "y"), ("n", "n"),
    ("010", 10), ("0o10", 8), ("0x1F", 31), ("-3", -3), ("+3", 3), ("1_000", "1_000"), ("0b1", "0b1"), ("1:30", "1:30"),
    ("2024-01-01", "2024-01-01"), ("~", None), ("null", None), ("Null", None), ("NULL", None), ("", None),
    ("true", True), ("True", True), ("TRUE", True), ("False", False), ("tRue", "tRue"), ("nUll", "nUll"),
    (".inf", float("inf")), ("-.INF", float("-inf")), ("inf", "inf"), (".", "."), ("e5", "e5"), ("=", "="), ("1e", "1e"),
    ("'2e-5'", "2e-5"), ('"no"', "no"), ("١", "١"),
]  # fmt: skip

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
GOOD = "text,label\na,1\nb,0\n"


def section(**keys) -> DatasetSection:
    return DatasetSection(splits={"train": "train"}, **keys)


def csv_bytes(rows, encoding="utf-8", delimiter=",", lineterminator="\n") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=lineterminator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(encoding)


def json_lines(rows, encoding="utf-8") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(encoding)


def arrow_bytes(table, new) -> bytes:
    sink = pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def parquet_bytes(table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def write_texts(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        file = folder / name.replace("__", "/").replace("_csv", ".csv")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text\n{text}\n")
    return folder


def texts(source) -> dict[str, list[str]]:
    return {split: table.data["text"][:] for split, table in source.tables.items()}


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
