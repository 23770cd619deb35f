"""Files become one table: prepared once, read again when changed, its rows placed, its columns of one type."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from sample_files import GOOD, ROWS, arrow_bytes, csv_bytes, json_lines

from accel_trainer.errors import DataError
from accel_trainer.tables import read_files


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


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
    table = read_files([tmp_path / f"{name}.csv" for name in "abc"])
    assert table.data["text"][:] == ["0", "1", "2", "3", "4", "5"]
    places = [f"{tmp_path / name}.csv, row {row}" for name, row in zip("aaabbc", (1, 2, 3, 1, 2, 1), strict=True)]
    assert [table.place(row) for row in range(6)] == places
    assert sum(origin.rows for origin in table.origins) == len(table.data)


def test_columns_in_another_order_and_wider_types_go_together(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"text": "a", "n": None}]))
    (tmp_path / "b.jsonl").write_bytes(json_lines([{"n": 1, "text": "b"}]))
    (tmp_path / "c.jsonl").write_bytes(json_lines([{"n": 1.5, "text": "c"}]))
    data = read_files([tmp_path / f"{name}.jsonl" for name in "abc"]).data
    assert data.to_list() == [{"text": "a", "n": None}, {"text": "b", "n": 1.0}, {"text": "c", "n": 1.5}]


@pytest.mark.parametrize(
    ("one", "other", "column"),
    [({"text": "a"}, {"text": "a", "id": 1}, "id"), ({"text": "a", "y": 1}, {"text": "a", "y": "b"}, "y")],
)
def test_files_of_different_columns(tmp_path, one, other, column):
    (tmp_path / "a.jsonl").write_bytes(json_lines([one]))
    (tmp_path / "b.jsonl").write_bytes(json_lines([other]))
    with pytest.raises(DataError, match=rf"a\.jsonl and .*b\.jsonl: the columns '{column}' differ.*; give"):
        read_files([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])


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


# --- the prepared files -----------------------------------------------------------------------------------------------


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
