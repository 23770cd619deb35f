"""What a recipe names is looked at from outside, and only what is certain is told."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_trainer.draft import shown
from accel_trainer.errors import DataError, Mistake
from accel_trainer.on_disk import report_files
from accel_trainer.recipe_file import examine_recipe
from accel_trainer.tables import read_files

RECIPE = """\
dataset:
  path: PATH
  splits: {train: 0.9, test: 0.1}
  text_column: text
model: {checkpoint: org/model}
training: {global_batch_size: 8, max_steps: 10, learning_rate: 1e-5}
"""


def told(folder: Path, text: str) -> list[Mistake]:
    """What is reported beyond what the recipe alone tells."""
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    recipe, draft = examine_recipe(folder / "recipe.yaml")
    before = len(draft.mistakes)
    report_files(recipe, draft)
    return draft.mistakes[before:]


def told_of_columns(folder: Path, name: str, content: bytes, column: str, encoding: str = "null") -> list[str]:
    (folder / name).write_bytes(content)
    text = RECIPE.replace("PATH", f"{name}\n  encoding: {encoding}").replace("column: text", f"column: {column}")
    return [mistake.key for mistake in told(folder, text)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,label\n".encode("utf-8-sig")),
        ("a.csv", "text,标签,label\n好,1,2\n".encode()),
        ("a.csv", b"\n\ntext,label\n"),
        ("a.csv", b'"text","label"\n"no end'),
        ("a.csv", b"text,label"),
        ("a.tsv", b"text\tlabel\n"),
        ("a.csv.gz", gzip.compress(b"text,label\n", mtime=0)),  # else the name of the test changes every second
    ],
)
def test_a_header_tells_the_columns(tmp_path: Path, name: str, content: bytes) -> None:
    assert told_of_columns(tmp_path, name, content, "text") == []
    assert told_of_columns(tmp_path, name, content, "nowhere") == ["dataset.text_column"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("a.csv.gz", b"no archive"), ("a.csv", b'"never closed\n'), ("a.csv", b"\xff\xff\n"), ("a.csv", b"")),
        ("a.csv", "text,标签,label\n好,1,2\n".encode("gb18030")),
        ("a.csv", "評論,標籤\n好,1\n".encode("big5")),
        ("a.csv", b"x" * 2**17 + b",text\n"),
        ("a.csv", "text,label\n".encode("utf-16-le")),
        *(("a.jsonl", b"{}\n"), ("a.parquet", b"PAR1"), ("a.csv.zst", b"text\n"), ("a.csv.zip", b"text\n")),
    ],
)
def test_what_is_not_certain_is_left_to_reading(tmp_path: Path, name: str, content: bytes) -> None:
    assert told_of_columns(tmp_path, name, content, "nowhere") == []


@pytest.mark.parametrize(
    ("encoding", "column"),
    [
        *(("utf-8", "文本"), ("utf-16", "文本"), ("gb18030", "文本"), ("big5", "評論"), ("shift_jis", "感想")),
        *(("latin-1", "größe"), ("utf-8", "größe")),
    ],
)
def test_an_encoding_is_used_for_the_header(tmp_path: Path, encoding: str, column: str) -> None:
    content = f"{column},label\n".encode("utf-8-sig" if encoding == "utf-8" else encoding)
    assert told_of_columns(tmp_path, "a.csv", content, column, encoding) == []
    assert told_of_columns(tmp_path, "a.csv", content, "nowhere", encoding) == ["dataset.text_column"]


@pytest.mark.parametrize("encoding", ["hex", "rot13", "no-such", "utf-8 "])
def test_what_is_no_encoding_is_left_to_reading(tmp_path: Path, encoding: str) -> None:
    assert told_of_columns(tmp_path, "a.csv", "größe,label\n".encode("latin-1"), "nowhere", f"'{encoding}'") == []


TABLES = st.builds(
    lambda columns, encoding: "\n".join([",".join(columns)] * 2).encode(encoding, errors="ignore"),
    st.lists(st.text("ab文評論標籤größe", min_size=1, max_size=5), min_size=2, max_size=4),
    st.sampled_from(["utf-8", "utf-8-sig", "gb18030", "big5", "latin-1", "utf-16"]),
)


@given(st.binary(max_size=200) | TABLES, st.sampled_from(["a.csv", "a.tsv", "a.csv.gz", "a.csv.bz2", "a.csv.xz"]))
def test_no_content_is_too_strange(tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / name).write_bytes(content)
    text = RECIPE.replace("PATH", name).replace("column: text", "column: x\n  label_column: y")
    said = [mistake.remedy.rpartition("it has ")[2] for mistake in told(folder, text)]
    try:
        content.decode()
        columns = read_files([folder / name]).data.column_names
    except UnicodeDecodeError:
        assert said == []  # nobody knows yet what it is
    except DataError:  # in a later row, perhaps
        assert len(set(said)) <= 1
    else:
        assert said == [", ".join(map(shown, columns))] * 2


def test_the_columns_of_long_tables_are_read_from_their_beginning(tmp_path: Path) -> None:
    content = "text,label\n" + "好" * 150_000 + ",1\n"
    for encoding in ("utf-8", "gb18030"):
        told = told_of_columns(tmp_path, "a.csv", content.encode(encoding), "nowhere", encoding)
        assert told == ["dataset.text_column"]


@pytest.mark.parametrize(
    ("files", "clean"),
    [([], False), (["notes.md"], False), (["a/b/c.csv"], True), (["state.json"], True), (["x.parquet.zst"], True)],
)
def test_a_folder_holds_data_or_does_not(tmp_path: Path, files: list[str], clean: bool) -> None:
    (tmp_path / "data").mkdir()
    for file in files:
        (tmp_path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / file).touch()
    assert [mistake.key for mistake in told(tmp_path, RECIPE.replace("PATH", "data"))] == ["dataset.path"] * (not clean)


def test_a_hub_id_is_no_path_unless_something_like_it_lies_here(tmp_path: Path) -> None:
    text = RECIPE.replace("PATH", "org/data")
    assert told(tmp_path, text) == []
    (tmp_path / "org").mkdir()
    assert told(tmp_path, text) == []
    (tmp_path / "org" / "modle").mkdir()
    (mistake,) = told(tmp_path, text)
    assert (mistake.key, mistake.line) == ("model.checkpoint", 5)
    assert mistake.remedy.startswith("did you mean org/modle?")
    assert told(tmp_path, text.replace("org/model", "orgs/model")) == []  # the owner is no folder here


def test_a_test_file_may_lack_labels_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("text\n", encoding="utf-8")
    files = "path: null\n  data_files: {train: a.csv, test: b.csv, validation: b.csv}"
    text = RECIPE.replace("path: PATH", files).replace("train: 0.9, test: 0.1", "train: train, test: test")
    assert told(tmp_path, text) == []
    (mistake,) = told(tmp_path, text.replace("test: test", "validation: validation"))
    assert (mistake.key, mistake.what) == ("dataset.label_column", f"{tmp_path}/b.csv has no column 'label'")
    assert [m.key for m in told(tmp_path, text.replace("column: text", "column: x"))] == ["dataset.text_column"]
