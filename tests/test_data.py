"""Files become labelled roles: the rows that the recipe names, each once, or a message that says where and what to do."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import reviews, write_csv

from accel_trainer import order
from accel_trainer.data import load_labelled
from accel_trainer.errors import DataError
from accel_trainer.recipe import DatasetSection

NAMES = ["negative", "positive"]


@pytest.fixture
def rows():
    return reviews(100)


@pytest.fixture
def file(tmp_path, rows):
    return write_csv(tmp_path / "reviews.csv", rows)


def section(path=None, splits=None, **keys):
    return DatasetSection(path=None if path is None else str(path), splits=splits or {"train": "train"}, **keys)


def load(path=None, splits=None, **keys):
    return load_labelled(section(path, splits, **keys))


def refused(path=None, splits=None, **keys):
    """The message of the DataError; every one ends in a remedy after a semicolon."""
    with pytest.raises(DataError) as error:
        load(path, splits, **keys)
    message = str(error.value)
    assert "; " in message
    assert "\n" not in message
    return message


def contents(data, role):
    """(text, label name or None) of each row of a role."""
    held = data.roles[role]
    assert len(held) == len(held.table) == len(held.labels)
    names = [data.label_names[label] if label >= 0 else None for label in held.labels]
    return list(zip(held.table["text"], names, strict=True))


# Roles ------------------------------------------------------------------------------------------------------------


def test_slices_are_taken_in_the_order_of_the_file(file, rows):
    data = load(file, {"train": "train[:60%]", "validation": "train[60%:80]", "test": "train[-20:]"})
    assert contents(data, "train") == rows[:60]
    assert contents(data, "validation") == rows[60:80]
    assert contents(data, "test") == rows[80:]
    assert list(data.roles) == ["train", "validation", "test"]
    assert data.label_names == NAMES
    assert data.notes == []
    assert data.revision is None


def test_slices_of_several_files_are_joined(tmp_path, rows):
    files = {
        "train": str(write_csv(tmp_path / "a.csv", rows[:50])),
        "test": str(write_csv(tmp_path / "b.csv", rows[50:])),
    }
    data = load(
        splits={"train": "train[:40]+test[-10:]", "validation": "test[:30]", "test": "train[40:]"}, data_files=files
    )
    assert contents(data, "train") == rows[:40] + rows[90:]
    assert contents(data, "validation") == rows[50:80]
    assert contents(data, "test") == rows[40:50]
    assert data.roles["train"].place(0) == f"{files['train']}, row 1"
    assert data.roles["train"].place(40) == f"{files['test']}, row 41"


def test_the_file_is_shuffled_before_it_is_sliced(tmp_path, rows):
    rows = sorted(rows, key=lambda row: row[1])
    file = write_csv(tmp_path / "sorted.csv", rows)
    splits = {"train": "train[:60]", "test": "train[60:]"}
    message = refused(file, splits={"train": "train[:30]", "test": "train[60:]"})
    assert "all 30 rows have the label 'negative'" in message
    assert "shuffle_seed" in message
    assert "all 30 rows have the label 'negative'" in refused(file, {"train": "train[:30]"}, labels=NAMES)
    data = load(file, splits, shuffle_seed=7)
    shuffled = [rows[i] for i in order.shuffled(100, 7)]
    assert contents(data, "train") == shuffled[:60]
    assert contents(data, "test") == shuffled[60:]
    assert contents(load(file, splits, shuffle_seed=8), "train") != shuffled[:60]


def test_each_split_of_a_join_is_shuffled_by_itself(tmp_path, rows):
    files = {
        "train": str(write_csv(tmp_path / "a.csv", rows[:50])),
        "more": str(write_csv(tmp_path / "b.csv", rows[50:])),
    }
    data = load(splits={"train": "train[:5]+more[:5]", "test": "train[5:]"}, data_files=files, shuffle_seed=3)
    drawn = order.shuffled(50, 3)
    assert contents(data, "train") == [rows[i] for i in drawn[:5]] + [rows[50 + i] for i in drawn[:5]]
    assert data.roles["train"].place(5) == f"{files['more']}, row {drawn[0] + 1}"


@pytest.mark.parametrize(
    ("splits", "sizes"),
    [
        ({"train": 0.8, "test": 0.2}, [80, 20]),
        ({"train": 0.8, "validation": 0.1, "test": 0.1}, [80, 10, 10]),
        ({"train": 0.333, "validation": 0.333, "test": 0.333}, [33, 34, 33]),  # cut at 33.3, 66.6 and 99.9
        ({"train": 60, "validation": 20, "test": 10}, [60, 20, 10]),
        ({"train": 0.5, "test": 20}, [50, 20]),
        ({"train": 100}, [100]),
    ],
)
def test_shares_and_counts_are_drawn_stratified(file, rows, splits, sizes):
    data = load(file, splits)
    assert [len(data.roles[role]) for role in splits] == sizes
    drawn = [row for role in splits for row in contents(data, role)]
    assert len(set(drawn)) == len(drawn)  # the texts are numbered, so a row in two roles would show
    assert set(drawn) <= set(rows)
    positive = sum(label == "positive" for _, label in rows) / 100
    for role in splits:
        held = contents(data, role)
        assert abs(sum(label == "positive" for _, label in held) - positive * len(held)) <= 1
        assert held == sorted(held, key=rows.index)


def test_draws_have_a_seed_of_their_own(file):
    def drawn(**keys):
        return contents(load(file, {"train": 0.5, "test": 0.5}, **keys), "train")

    assert drawn() == drawn(shuffle_seed=42) != drawn(shuffle_seed=43)


def test_a_cap_takes_a_seeded_subset_in_order(file, rows):
    splits = {"train": "train[:50]", "validation": "train[50:80]", "test": "train[80:]"}
    data = load(file, splits, max_train_samples=20, max_eval_samples=10, max_predict_samples=99)
    assert contents(data, "train") == [rows[i] for i in order.subset(50, 20, 42)]
    assert contents(data, "validation") == [rows[50 + i] for i in order.subset(30, 10, 42)]
    assert contents(data, "test") == rows[80:]
    other = load(file, splits, max_train_samples=20, shuffle_seed=1)
    shuffled = [rows[i] for i in order.shuffled(100, 1)][:50]
    assert contents(other, "train") == [shuffled[i] for i in order.subset(50, 20, 1)]


def test_places_follow_the_rows_through_shuffle_and_cap(file, rows):
    data = load(file, {"train": "train[10:90]"}, shuffle_seed=5, max_train_samples=30)
    texts = [text for text, _ in rows]
    for i, (text, _) in enumerate(contents(data, "train")):
        assert data.roles["train"].place(i) == f"{file}, row {texts.index(text) + 1}"


# What may not be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ({"train": "train[:60]", "test": "train[59:]"}, "test and train share train[59:60];"),
        ({"train": "train", "test": "train[10:20]"}, "test and train share train[10:20];"),
        (
            {"train": "train[:50]", "validation": "train[50:]", "test": "train[-1:]"},
            "test and validation share train[99:100];",
        ),
        ({"train": "train[:10]+train[5:20]"}, "train and train share train[5:10];"),
    ],
)
def test_overlapping_slices_are_refused(file, splits, said):
    assert said in refused(file, splits)


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        (
            {"train": "train", "test": "train[100:]"},
            "dataset.splits.test: train[100:] is empty, the split 'train' has 100 rows",
        ),
        ({"train": "train[:0%]"}, "dataset.splits.train: train[:0%] is empty"),
        ({"train": 0.9, "test": 0.001}, "dataset.splits.test: 0.001 of 100 rows is no row"),
        ({"train": 90, "test": 11}, "101 rows are asked for"),
        ({"train": 0.9, "test": 11}, "101 rows are asked for"),
        ({"train": "trian"}, "there is no split 'trian'"),
    ],
)
def test_rows_that_are_not_there(file, splits, said):
    message = refused(file, splits)
    assert said in message


def test_shares_of_several_splits_are_ambiguous(tmp_path, rows):
    files = {name: str(write_csv(tmp_path / f"{name}.csv", rows)) for name in ("train", "extra")}
    assert "splits train, extra" in refused(splits={"train": 0.8, "test": 0.2}, data_files=files)


def test_one_file_cannot_play_two_roles_however_it_is_spelled(tmp_path, file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.csv").symlink_to(file)
    for other in ["reviews.csv", "./reviews.csv", str(file), "link.csv", ["link.csv"]]:
        message = refused(
            splits={"train": "train[:50]", "test": "held"}, data_files={"train": "reviews.csv", "held": other}
        )
        assert "train and test both read" in message
        assert "'train' and 'held'" in message
    load(splits={"train": "train[:50]", "test": "train[50:]"}, data_files={"train": "reviews.csv", "held": "link.csv"})


def test_one_file_cannot_be_trained_on_twice(file):
    files = {"a": str(file), "b": str(file)}
    assert "both read" in refused(splits={"train": "a+b"}, data_files=files)


def test_texts_that_two_roles_share_are_counted(tmp_path, rows):
    train = write_csv(tmp_path / "a.csv", rows[:60])
    test = write_csv(tmp_path / "b.csv", [*rows[60:], *rows[:3], rows[0]])
    held = write_csv(tmp_path / "c.csv", [*reviews(30, seed=1), rows[5]])
    files = {"train": str(train), "test": str(test), "validation": str(held)}
    roles = {role: role for role in files}
    notes = load(splits=roles, data_files=files).notes
    assert [note.split(";")[0] for note in notes] == [
        "validation: 1 text of it also in train",
        "test: 3 texts of it also in train",
    ]


def test_a_shared_pair_shares_both_texts(tmp_path):
    header = ("text", "other", "label")
    train = write_csv(tmp_path / "a.csv", [("a", "b", 0), ("c", "d", 1)], header)
    test = write_csv(tmp_path / "b.csv", [("a", "d", 0), ("c", "d", 0), ("b", "a", 1)], header)
    data = load(
        splits={"train": "train", "test": "test"},
        data_files={"train": str(train), "test": str(test)},
        text_pair_column="other",
    )
    assert ["1 text of it" in note for note in data.notes] == [True]


# Columns and cells -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["text_column", "text_pair_column", "label_column"])
def test_a_column_that_is_not_there_is_named_with_the_nearest(tmp_path, key):
    file = write_csv(tmp_path / "reviews.csv", [("a", "b", 0), ("c", "d", 1)], ("review", "reply", "stars"))
    columns = {"text_column": "review", "text_pair_column": "reply", "label_column": "stars"}
    meant = columns[key]
    message = refused(file, **columns | {key: meant[:-1] + "x"})
    assert f"dataset.{key}: {file} has no column {meant[:-1] + 'x'!r} (did you mean {meant!r}?)" in message
    assert "it has review, reply, stars" in message


@pytest.mark.parametrize("blank", ["", "   ", "\t", "\u3000"])
def test_a_row_without_text_is_named(tmp_path, rows, blank):
    rows[70] = (blank, "positive")
    rows[75] = (blank, "positive")
    file = write_csv(tmp_path / "reviews.csv", rows)
    message = refused(file, {"train": "train[:60]", "validation": "train[60:]"}, shuffle_seed=None)
    assert f"{file}, row 71 and 1 more row: column 'text' holds no text" in message
    load(file, {"train": "train[:60]", "validation": "train[80:]"})


def test_a_null_text_and_a_text_that_is_none_are_named(tmp_path):
    file = tmp_path / "reviews.parquet"
    pq.write_table(
        pa.table({"text": ["a", None, "c"], "label": [0, 1, 0], "other": ["x", "", "y"], "n": [1, 2, 3]}), file
    )
    assert f"{file}, row 2: column 'text' holds no text" in refused(file)
    assert f"{file}, row 2: column 'other' holds no text" in refused(file, text_column="other")
    message = refused(file, text_column="n")
    assert f"{file}, row 1: column 'n' holds int, not text" in message
    assert "dataset.text_column" in message


def test_a_row_without_second_text_is_named(tmp_path):
    file = write_csv(tmp_path / "p.csv", [("a", "b", 0), ("c", " ", 1)], ("text", "other", "label"))
    assert f"{file}, row 2: column 'other' holds no text" in refused(file, text_pair_column="other")


def test_pairs_come_as_pairs(tmp_path):
    header = ("premise", "hypothesis", "label")
    file = write_csv(tmp_path / "p.csv", [("a", "b", 0), ("c", "d", 1), ("e", "f", 1)], header)
    wanted = section(file, text_column="premise", text_pair_column="hypothesis")
    held = load_labelled(wanted).roles["train"]
    assert list(held.texts(wanted, batch_size=2)) == [(["a", "c"], ["b", "d"]), (["e"], ["f"])]
    single = section(file, text_column="premise")
    assert list(load_labelled(single).roles["train"].texts(single)) == [(["a", "c", "e"], None)]
    assert load_labelled(single).roles["train"].sha256 != held.sha256


def test_a_chinese_encoding_is_read(tmp_path):
    rows = [("很好吃，下次再来", "好评"), ("太慢了，凉了", "差评"), ("味道不错", "好评")]
    file = write_csv(tmp_path / "r.csv", rows)
    wanted = load(file).roles["train"].sha256
    file.write_bytes(file.read_text(encoding="utf-8").encode("gb18030"))
    data = load(file)
    assert contents(data, "train") == rows
    assert data.label_names == ["好评", "差评"]
    assert data.roles["train"].sha256 == wanted


# Labels ------------------------------------------------------------------------------------------------------------


def test_labels_of_the_recipe_order_the_classes(file, rows):
    data = load(file, labels=["positive", "negative"])
    assert data.label_names == ["positive", "negative"]
    assert contents(data, "train") == rows
    assert data.roles["train"].labels.tolist() == [int(label == "negative") for _, label in rows]


def test_abbreviated_labels_are_read_and_told(tmp_path, rows):
    file = write_csv(tmp_path / "r.csv", [(text, label[:3]) for text, label in rows])
    data = load(file, labels=["NEGATIVE", "POSITIVE"])
    assert [label.lower() for _, label in contents(data, "train")] == [label for _, label in rows]
    assert len(data.notes) == 1
    assert "neg → NEGATIVE" in data.notes[0]
    assert "pos → POSITIVE" in data.notes[0]


def test_stray_classes_are_named_where_they_are_inferred(tmp_path, rows):
    stray = [("one", "postive"), ("two", "Negative"), ("three", "Negative")]
    file = write_csv(tmp_path / "r.csv", [*rows, *stray])
    notes = load(file).notes
    assert ["few rows of 'Negative' (2 rows), 'postive' (1 row)" in note for note in notes] == [True, False]
    assert ["'Negative' and 'negative'" in note for note in notes] == [False, True]
    assert all("dataset.labels" in note for note in notes)
    assert load(file, labels=["negative", "positive", "Negative", "postive"]).notes == []


def test_a_mapping_joins_values(tmp_path):
    file = write_csv(tmp_path / "r.csv", [(f"text {i}", i % 5 + 1) for i in range(20)])
    mapping = {"1": "bad", "2": "bad", "3": "fair", "4": "good", "5": "good"}
    data = load(file, {"train": 0.5, "test": 0.5}, labels=mapping)
    assert data.label_names == ["bad", "fair", "good"]
    assert dict(contents(data, "train")) | dict(contents(data, "test")) == {
        f"text {i}": mapping[str(i % 5 + 1)] for i in range(20)
    }
    assert data.notes == []


def test_an_unknown_label_is_named_with_file_and_row(file, tmp_path, rows):
    rows[90] = (rows[90][0], "postive")
    file = write_csv(tmp_path / "r.csv", rows)
    message = refused(file, {"train": "train[:50]", "test": "train[50:]"})
    assert f"{file}, row 91: label 'postive' is none of negative, positive (did you mean 'positive'?)" in message


def test_classes_come_from_the_training_rows(tmp_path, rows):
    files = {
        "train": str(write_csv(tmp_path / "a.csv", rows[:50])),
        "test": str(write_csv(tmp_path / "b.csv", rows[50:])),
    }
    assert load(splits={"train": "train", "test": "test"}, data_files=files).label_names == NAMES
    write_csv(tmp_path / "b.csv", [("one more", "mixed")])
    assert "b.csv, row 1: label 'mixed'" in refused(splits={"train": "train", "test": "test"}, data_files=files)


def test_the_data_name_their_classes(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a", "c"])}
    )
    file = tmp_path / "r.parquet"
    datasets.Dataset.from_dict({"text": list("wxyz"), "label": [0, 1, 2, 1]}, features=features).to_parquet(file)
    assert contents(load(file), "train") == [("w", "b"), ("x", "a"), ("y", "c"), ("z", "a")]
    # Ids stay ids under any names: these are stars 1 to 3, and the id 1 is two stars.
    data = load(file, labels=["1", "2", "3"])
    assert data.roles["train"].labels.tolist() == [0, 1, 2, 1]
    assert load(file, {"train": "train[1:]"}, labels=["1", "2", "3"]).roles["train"].labels.tolist() == [1, 2, 1]
    assert "2 names, but the data have 3 classes (b, a, c)" in refused(file, labels=["x", "y"])
    assert load(file, labels={"0": "x", "1": "y", "2": "x"}).roles["train"].labels.tolist() == [0, 1, 0, 1]


def test_ratings_counted_from_zero_are_not_read_as_names(tmp_path):
    file = write_csv(tmp_path / "r.csv", [(f"text {i}", i % 5) for i in range(50)])
    data = load(file, labels=["1", "2", "3", "4", "5"])
    assert data.roles["train"].labels.tolist() == [i % 5 for i in range(50)]


def test_a_test_split_may_be_wholly_unlabelled(tmp_path, rows):
    train = str(write_csv(tmp_path / "a.csv", rows))
    hidden = str(write_csv(tmp_path / "b.csv", [(text + "?", -1) for text, _ in rows]))
    bare = str(write_csv(tmp_path / "c.csv", [(text + "!",) for text, _ in rows], ("text",)))
    for file in (hidden, bare):
        data = load(splits={"train": "train", "test": "test"}, data_files={"train": train, "test": file})
        assert not data.roles["test"].is_labelled
        assert data.roles["train"].is_labelled
        assert data.roles["test"].labels.tolist() == [-1] * 100
        assert ["100 rows have no labels" in note for note in data.notes] == [True]
    partly = write_csv(tmp_path / "b.csv", [*reviews(9, seed=1), ("hidden", -1)])
    message = refused(splits={"train": "train", "test": "test"}, data_files={"train": train, "test": str(partly)})
    assert f"{partly}, row 10: 1 of 10 test rows have no label" in message
    message = refused(splits={"train": "train", "validation": "test"}, data_files={"train": train, "test": bare})
    assert "c.csv has no column 'label'" in message


def test_training_rows_of_which_none_has_a_label(tmp_path):
    file = write_csv(tmp_path / "r.csv", [*((f"text {i}", -1) for i in range(8)), ("good", "positive")])
    message = refused(file, {"train": "train[:8]", "test": "train[8:]"})
    assert f"{file}, row 1: none of the 8 train rows has a label" in message


@pytest.mark.parametrize("nothing", ["-1", ""])
@pytest.mark.parametrize("role", ["train", "validation"])
def test_rows_to_learn_or_choose_from_need_labels(tmp_path, rows, nothing, role):
    place = {"train": 4, "validation": 64}[role]
    rows[place] = (rows[place][0], nothing)
    file = write_csv(tmp_path / "r.csv", rows)
    message = refused(file, {"train": "train[:60]", "validation": "train[60:]"})
    assert f"{file}, row {place + 1}: 1 of {60 if role == 'train' else 40} {role} rows have no label" in message


def test_one_class_is_refused_where_it_can_be_judged(tmp_path, rows):
    good = [(f"fine {i}", "positive") for i in range(30)]
    file = write_csv(tmp_path / "r.csv", [*rows, *good])

    def splits(n):
        return {"train": "train[:100]", "validation": f"train[100:{100 + n}]"}

    assert "validation: all 20 rows have the label 'positive'" in refused(file, splits(20))
    assert any("no row has the label negative" in note for note in load(file, splits(19)).notes)
    data = load(file, {"train": "train[:100]", "test": "train[100:]"})
    assert any(note == "test: no row has the label negative" for note in data.notes)
    assert "train: all 5 rows have the label 'positive'" in refused(file, {"train": "train[100:105]"}, labels=NAMES)


# The same rows for ever --------------------------------------------------------------------------------------------


def test_the_hash_is_of_the_texts_and_labels_in_order(tmp_path, rows):
    def sha256(rows, **keys):
        return load(write_csv(tmp_path / "r.csv", rows), **keys).roles["train"].sha256

    wanted = sha256(rows)
    assert sha256(rows) == wanted
    assert sha256([rows[1], rows[0], *rows[2:]]) != wanted
    assert sha256([*rows[:-1], (rows[-1][0] + " ", rows[-1][1])]) != wanted
    other = {"positive": "negative", "negative": "positive"}[rows[0][1]]
    assert sha256([(rows[0][0], other), *rows[1:]]) != wanted
    assert sha256(rows[:-1]) != wanted
    assert sha256(rows, labels=["positive", "negative"]) != wanted
    assert sha256([(text, NAMES.index(label)) for text, label in rows], labels=NAMES) == wanted


def test_a_lock_takes_the_rows_it_was_made_for(tmp_path, file, rows):
    splits = {"train": "train[:60]", "test": "train[60:]"}
    locks = {role: held.sha256 for role, held in load(file, splits).roles.items()}
    load(file, splits, sha256=locks)
    load(file, splits, sha256={"test": locks["test"]})
    message = refused(file, splits, sha256=locks | {"test": "0" * 64})
    assert "dataset.sha256.test" in message
    assert f"000000000000…, found {locks['test'][:12]}…" in message
    assert "no such split" in refused(file, {"train": "train[:60]"}, sha256=locks)
    rows[3] = ("another text", rows[3][1])
    assert "dataset.sha256.train" in refused(write_csv(tmp_path / "reviews.csv", rows), splits, sha256=locks)


def test_rows_depend_on_neither_cache_nor_folder(tmp_path, file, monkeypatch):
    def hashes(path):
        data = load(path, {"train": 0.7, "validation": 0.2}, shuffle_seed=3)
        return [rows.sha256 for rows in data.roles.values()]

    wanted = hashes(file)
    assert hashes(file) == wanted
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "empty")
    assert hashes(file) == wanted
    monkeypatch.chdir(tmp_path)
    assert hashes("reviews.csv") == wanted
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert hashes("../reviews.csv") == wanted


def test_a_changed_file_is_read_again(file, rows, tmp_path):
    assert contents(load(file), "train") == rows
    write_csv(tmp_path / "reviews.csv", rows[::-1])
    assert contents(load(file), "train") == rows[::-1]


def test_columns_of_other_types_cannot_be_joined(tmp_path):
    one, two = tmp_path / "a.parquet", tmp_path / "b.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), one)
    pq.write_table(pa.table({"text": ["c", "d"], "label": ["x", "y"]}), two)
    message = refused(splits={"train": "train+more"}, data_files={"train": str(one), "more": str(two)})
    assert f"dataset.splits.train: {one} and {two} do not go together" in message
    assert "label" in message


def test_joined_splits_may_have_other_columns_besides(tmp_path):
    one = write_csv(tmp_path / "a.csv", [("a", 0, "x"), ("b", 1, "y")], ("text", "label", "source"))
    two = write_csv(tmp_path / "b.csv", [(1, "c"), (0, "d")], ("label", "text"))
    data = load(splits={"train": "train+more"}, data_files={"train": str(one), "more": str(two)})
    assert contents(data, "train") == [("a", "0"), ("b", "1"), ("c", "1"), ("d", "0")]
    assert np.array_equal(data.roles["train"].labels, [0, 1, 1, 0])
