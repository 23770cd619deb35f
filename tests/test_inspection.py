"""Every fault that is planted is found, with its count and rows, and in clean data nothing is."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_cache import write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import BAD, FILLER, GOOD, tiny_recipe, write_csv

from accel_trainer import findings, inspection
from accel_trainer.data import load_labelled
from accel_trainer.errors import DataError
from accel_trainer.findings import all_findings, token_findings
from accel_trainer.inspection import Inspection, inspect, look_at, print_inspection
from accel_trainer.model_files import pinned_files
from accel_trainer.recipe import ModelSection, Recipe
from accel_trainer.recipe_file import to_yaml
from accel_trainer.role_scan import scan_role
from accel_trainer.tables import read_files
from accel_trainer.text_faults import TEXT_FAULTS

Data = dict[str, list[list[str]]]  # role → [text, label] of each row
SIZES = {"train": 400, "validation": 200, "test": 200}
LABELS = ["negative", "positive"]
CHINESE = {
    "negative": ["难吃", "太慢", "凉了", "很差", "失望"],
    "positive": ["好吃", "新鲜", "很快", "热情", "满意"],
    "": ["味道", "送餐", "老板", "米饭", "今天", "真的", "，", "的"],
}
ENGLISH = {"negative": BAD[:5], "positive": GOOD[:5], "": FILLER[:8]}


def clean(seed: int = 0, words: dict[str, list[str]] = ENGLISH) -> Data:
    """Rows of which no two are alike, half of them of each class."""
    draw = random.Random(seed)
    rows = []
    for i in range(sum(SIZES.values())):
        label = LABELS[i % 2]
        chosen = [*draw.choices(words[""], k=draw.randint(3, 9)), draw.choice(words[label]), str(i)]
        draw.shuffle(chosen)
        rows.append([(" " if words is ENGLISH else "").join(["a"] * (words is ENGLISH) + chosen), label])
    draw.shuffle(rows)
    stops = [0, 400, 600, 800]
    return {role: rows[start:stop] for role, start, stop in zip(SIZES, stops, stops[1:], strict=False)}


def recipe_of(folder: Path, data: Data, **dataset: Any) -> Recipe:
    header = ["text", "label"] if len(data["train"][0]) == 2 else ["text", "other", "label"]
    files = {role: str(write_csv(folder / f"{role}.csv", rows, header)) for role, rows in data.items()}
    plain = tiny_recipe(folder)
    del plain["dataset"]["path"]
    plain["dataset"] |= {"data_files": files, "splits": {role: role for role in data}, "max_length": 64} | dataset
    plain["model"]["from_config"]["max_position_embeddings"] = 64
    return Recipe.model_validate(plain)


def found_in(folder: Path, data: Data, **dataset: Any) -> Inspection:
    return inspect(recipe_of(folder, data, **dataset))


# --- what is planted --------------------------------------------------------------------------------------------------


def place(role: str, row: int, column: int, value: str) -> Callable[[Data], None]:
    """Writes a cell; the row is counted from 1."""

    def plant(data: Data) -> None:
        data[role][row - 1][column] = value

    return plant


def copy_row(role: str, row: int, source: str, source_row: int) -> Callable[[Data], None]:
    def plant(data: Data) -> None:
        data[role][row - 1] = list(data[source][source_row - 1])

    return plant


def contradict(data: Data) -> None:
    text, label = data["train"][1]
    data["validation"][4] = [text, LABELS[1 - LABELS.index(label)]]


def repeat(data: Data) -> None:
    data["train"][30:60] = [["not available here", "negative"] for _ in range(30)]


def append_labels(data: Data) -> None:
    data["train"][:100] = [[f"{text} {label}", label] for text, label in data["train"][:100]]


def begin_alike(data: Data) -> None:
    data["train"][:300] = [[f"Review no. {text}", label] for text, label in data["train"][:300]]


def relabel(role: str, label: str, count: int) -> Callable[[Data], None]:
    """The first rows get a label, the others the other one."""

    def plant(data: Data) -> None:
        other = next(name for name in LABELS if name != label)
        data[role] = [[text, label if i < count else other] for i, (text, _) in enumerate(data[role])]

    return plant


def capitalise(data: Data) -> None:
    for rows in data.values():
        for i in range(0, len(rows), 2):
            rows[i][1] = rows[i][1].replace("positive", "Positive")


def speak_russian(data: Data) -> None:
    for i in range(40):
        data["validation"][i][0] += " хорошо плохо"


def shorten(data: Data) -> None:
    del data["test"][30:]


LONG = " ".join(["the soup"] * 60)
INFERRED = {"labels": None}
# Fault: how it is planted, keys of dataset, role, count, rows, and what comes with it.
PLANTS: dict[str, tuple[Callable[[Data], None], dict[str, Any], str, int, list[int], set[str]]] = {
    "no text": (place("train", 5, 0, " \u3000"), {}, "train", 1, [5], set()),
    "no label": (place("validation", 4, 1, ""), {}, "validation", 1, [4], set()),
    "unknown label": (place("train", 8, 1, "postive"), {}, "train", 1, [8], set()),
    "duplicates": (copy_row("train", 11, "train", 3), {}, "train", 1, [11], set()),
    "shared text": (copy_row("test", 6, "train", 7), {}, "train, test", 1, [6], set()),
    "two labels": (contradict, {}, "train, validation", 1, [2], {"shared text"}),
    "one text everywhere": (repeat, {}, "train", 30, [31], {"duplicates"}),
    "lost characters": (place("train", 9, 0, "the soup was caf\ufffd"), {}, "train", 1, [9], set()),
    "mojibake": (place("train", 12, 0, "it was a cafÃ© today"), {}, "train", 1, [12], set()),
    "control characters": (place("test", 1, 0, "the \x08soup was warm"), {}, "test", 1, [1], set()),
    "markup": (place("train", 400, 0, "good<br />soup"), {}, "train", 1, [400], set()),
    "escapes": (place("train", 14, 0, r"good\n\nSoup"), {}, "train", 1, [14], set()),
    "no words": (place("train", 15, 0, "12.50"), {}, "train", 1, [15], set()),
    "label as text": (place("train", 16, 0, "Positive "), {}, "train", 1, [16], set()),
    "label in text": (append_labels, {}, "train", 100, [1, 2, 3], set()),
    "same beginning": (begin_alike, {}, "train", 300, [1, 2, 3], set()),
    "one class": (relabel("validation", "positive", 200), {}, "validation", 200, [], set()),
    "missing class": (lambda data: None, {"labels": [*LABELS, "mixed"]}, "train", 1, [], set()),
    "rare class": (place("train", 17, 1, "postive"), INFERRED, "train", 1, [17], {"missing class"}),
    "label spelling": (capitalise, INFERRED, "train, validation, test", 400, [3, 2], set()),
    "imbalance": (relabel("train", "negative", 370), {}, "train", 370, [], {"label shift"}),
    "label shift": (relabel("validation", "negative", 130), {}, "train, validation", 34, [], set()),
    "few rows": (shorten, {}, "test", 30, [], set()),
    "cut texts": (place("train", 18, 0, LONG), {}, "train", 1, [18], set()),
    "unknown tokens": (speak_russian, {}, "validation", 40, [], set()),
    "no tokens": (place("train", 19, 0, "\u200b\u200d"), {}, "train", 1, [19], set()),
}  # fmt: skip
ELSEWHERE = {"equal pair", "sorted by label", "fragments", "tokenizer", "other rows", "other files"}


def rows_of(example: str) -> int:
    return int(re.findall(r"row (\d+)", example)[0])


def test_every_kind_is_planted() -> None:
    source = Path(findings.__file__).read_text("utf-8") + Path(inspection.__file__).read_text("utf-8")
    kinds = set(re.findall(r'(?:\bFinding|_tallied|_refused)\(\s*"([^"]+)"', source)) | {f.kind for f in TEXT_FAULTS}
    assert kinds == {*PLANTS, *ELSEWHERE}
    assert len(kinds) > 12


@pytest.mark.parametrize("kind", PLANTS)
def test_a_planted_fault_is_found_alone(tmp_path: Path, kind: str) -> None:
    plant, dataset, role, count, rows, besides = PLANTS[kind]
    data = clean()
    plant(data)
    recipe = recipe_of(tmp_path, data, **dataset)
    found = inspect(recipe)
    assert {finding.kind for finding in found.findings} == {kind, *besides}
    finding = next(finding for finding in found.findings if finding.kind == kind)
    assert (finding.role, finding.count) == (role, count)
    assert [rows_of(example.place) for example in finding.rows][: len(rows)] == rows
    assert 0 < finding.share <= 1
    assert finding.remedy
    refused = finding.severity == "error"
    assert found.errors == refused
    if refused:
        with pytest.raises(DataError):
            load_labelled(recipe.dataset)
    else:
        load_labelled(recipe.dataset)


def test_all_faults_of_single_rows_at_once(tmp_path: Path) -> None:
    data = clean()
    expected = set()
    for kind, (plant, dataset, role, count, rows, besides) in PLANTS.items():
        if count == 1 and not dataset:
            plant(data)
            expected.add((kind, role, count, *rows))
            assert besides <= {"shared text"}
    assert len(expected) >= 12
    found = found_in(tmp_path, data)
    seen = {
        (finding.kind, finding.role, finding.count, *(rows_of(example.place) for example in finding.rows))
        for finding in found.findings
    }
    assert seen - expected == {("shared text", "train, validation", 1, 5)}
    assert expected <= seen
    severities = [finding.severity for finding in found.findings]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("words", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_clean_data_are_clean(tmp_path: Path, seed: int, words: dict[str, list[str]]) -> None:
    found = found_in(tmp_path, clean(seed, words))
    assert found.findings == []
    assert found.notes == []
    assert [(role.role, role.rows, sum(role.counts)) for role in found.roles] == [
        (role, n, n) for role, n in SIZES.items()
    ]
    assert all(role.tokens is not None and role.tokens.unknown == 0 == role.tokens.cut for role in found.roles)


# --- counts -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.tuples(st.integers(0, 12), st.sampled_from(LABELS)), min_size=4, max_size=40),
    cut=st.integers(1, 39),
)
def test_repeated_shared_and_contradicted_texts_are_counted(
    tmp_path: Path, texts: list[tuple[int, str]], cut: int
) -> None:
    """Against the same counts made with dictionaries."""
    rows = [(f"text number {i}", label) for i, label in texts]
    train, test = rows[: min(cut, len(rows) - 1)], rows[min(cut, len(rows) - 1) :]
    path = write_csv(tmp_path / "a.csv", rows)
    recipe = recipe_of(tmp_path, clean(), path=str(path), data_files=None)
    table = read_files([path])
    scans = [
        scan_role(recipe.dataset, role, table, rows_of_role, LABELS)
        for role, rows_of_role in [("train", np.arange(0, len(train))), ("test", np.arange(len(train), len(rows)))]
    ]
    found = {(f.kind, f.role): f.count for f in all_findings(scans)}
    two_labels = sum(finding.count for finding in all_findings(scans) if finding.kind == "two labels")
    distinct = {text for text, _ in train}
    assert found.get(("duplicates", "train"), 0) == len(train) - len(distinct)
    assert found.get(("shared text", "train, test"), 0) == len(distinct & {text for text, _ in test})
    contradicted = {text for text, label in rows if any(text == t and label != other for t, other in rows)}
    assert two_labels == len(contradicted)


@pytest.mark.parametrize(("copies", "severity"), [(39, "note"), (40, "warning")])
def test_one_in_ten_duplicates_is_many(tmp_path: Path, copies: int, severity: str) -> None:
    data = clean()
    data["train"][-copies:] = [list(row) for row in data["train"][:copies]]
    assert [(f.kind, f.severity, f.count) for f in found_in(tmp_path, data).findings] == [
        ("duplicates", severity, copies)
    ]


@pytest.mark.parametrize(("count", "kinds"), [(79, []), (80, ["label in text"])])
def test_one_in_five_labels_in_texts_is_no_chance(tmp_path: Path, count: int, kinds: list[str]) -> None:
    data = clean()
    data["train"][:count] = [[f"{label}, {text}", label] for text, label in data["train"][:count]]
    assert [finding.kind for finding in found_in(tmp_path, data).findings] == kinds


@pytest.mark.parametrize(("n", "positive", "kinds"), [(30, 20, ["few rows"]), (150, 100, ["label shift"])])
def test_a_shift_that_chance_may_have_made_is_none(tmp_path: Path, n: int, positive: int, kinds: list[str]) -> None:
    data = clean()
    data["test"] = [[text, LABELS[i < positive]] for i, (text, _) in enumerate(data["test"][:n])]
    assert [finding.kind for finding in found_in(tmp_path, data).findings] == kinds


def test_the_same_data_give_the_same_findings(tmp_path: Path) -> None:
    data = clean()
    for plant, dataset, *_ in PLANTS.values():
        if not dataset:
            plant(data)
    assert found_in(tmp_path, data) == found_in(tmp_path, data)


def test_tokens_are_those_that_training_sees(tmp_path: Path) -> None:
    from accel_trainer.inputs import read_inputs

    data = clean()
    data["train"][3][0] = data["train"][80][0] = LONG
    recipe = recipe_of(tmp_path, data)
    found, read = inspect(recipe), read_inputs(recipe)
    for role in found.roles:
        tokens, lengths = role.tokens, read.splits[role.role].tokens.lengths
        assert tokens is not None
        assert tokens.cut == read.splits[role.role].tokens.truncated
        assert min(tokens.longest, 64) == lengths.max()
    train = found.roles[0].tokens
    assert train is not None
    assert train.lost == pytest.approx(
        2 * (train.longest - 64) / (read.splits["train"].tokens.lengths.sum() + 2 * (train.longest - 64))
    )


# --- faults of more than rows -----------------------------------------------------------------------------------------


def test_slices_of_a_sorted_table(tmp_path: Path) -> None:
    rows = sorted((row for rows in clean().values() for row in rows), key=lambda row: row[1])
    path = str(write_csv(tmp_path / "sorted.csv", rows))
    sliced = {"train": "train[:500]", "validation": "train[500:]"}

    def kinds(**keys: Any) -> list[tuple[str, str]]:
        found = found_in(tmp_path, clean(), **({"path": path, "data_files": None, "splits": sliced} | keys))
        return [(finding.kind, finding.role) for finding in found.findings]

    assert kinds() == [("one class", "validation"), ("sorted by label", "train"), ("sorted by label", "validation")]
    assert kinds(shuffle_seed=1) == []
    assert kinds(splits={"train": "train[:200]+train[-200:]", "validation": "train[200:600]"}) == []
    assert kinds(splits={"train": 0.5, "validation": 0.5}) == []
    alternating = str(
        write_csv(tmp_path / "b.csv", [row for pair in zip(rows[:400], rows[400:], strict=True) for row in pair])
    )
    assert kinds(path=alternating) == []
    drifting = [
        [text, LABELS[(i % 5 > 0) == (i < 400)]] for i, (text, _) in enumerate(random.Random(0).sample(rows, 800))
    ]
    halves = {"train": "train[:400]", "validation": "train[400:]"}
    assert kinds(path=str(write_csv(tmp_path / "c.csv", drifting)), splits=halves) == [
        ("label shift", "train, validation")
    ]


def test_pairs(tmp_path: Path) -> None:
    data = {role: [[text, f"and {text}", label] for text, label in rows] for role, rows in clean().items()}
    keys = {"text_pair_column": "other"}
    assert found_in(tmp_path, data, **keys).findings == []
    data["train"][1][1] = data["train"][1][0]
    data["train"][2][1] = "<b>bold</b>"
    data["train"][3][1] = ""
    data["test"][4][:2] = data["train"][7][:2]
    data["test"][5][0] = data["train"][8][0]  # half a pair is no pair
    data["test"][4][2] = data["train"][7][2]
    found = found_in(tmp_path, data, **keys)
    assert [(f.kind, [rows_of(example.place) for example in f.rows]) for f in found.findings] == [
        ("no text", [4]),
        ("shared text", [5]),
        ("markup", [3]),
        ("equal pair", [2]),
    ]


def test_text_that_is_spelt_byte_by_byte(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, clean(words=CHINESE))
    path = write_csv(tmp_path / "a.csv", [("很好吃", 1), ("太慢了", 0)])
    scan = scan_role(recipe.dataset, "train", read_files([path]), np.arange(0, 2), LABELS)

    def kinds(tokens: int) -> list[str]:
        lengths = np.full(2, tokens + 2)
        return [finding.kind for finding in token_findings(scan, lengths, lengths * 0, 2, 64)]

    assert kinds(6) == ["fragments"]
    assert kinds(3) == []


@pytest.mark.parametrize("names", [LABELS, ["bad", "fair", "good"]])
def test_labels_counted_from_one(tmp_path: Path, names: list[str]) -> None:
    """With the highest class left out they would be shifted without a word."""
    data = {role: [[text, str(1 + LABELS.index(label))] for text, label in rows] for role, rows in clean().items()}
    found = found_in(tmp_path, data, labels=names)
    shifted = len(names) == 3
    assert {finding.kind for finding in found.findings} == {"missing class" if shifted else "unknown label"}
    mapping = ", ".join(f"{i}: {name}" for i, name in enumerate(names, 1))
    assert all(f"dataset.labels: {{{mapping}}}" in finding.remedy for finding in found.findings)
    right = {str(i): name for i, name in enumerate(names[:2], 1)}
    assert found_in(tmp_path, data, labels=right).findings == []


def test_many_strays_are_summed(tmp_path: Path) -> None:
    data = clean()
    for i in range(12):
        data["train"][i][1] = f"xy{i}"
    found = [finding for finding in found_in(tmp_path, data).findings if finding.kind == "unknown label"]
    assert [finding.count for finding in found] == [1, 1, 1, 1, 1, 7]
    assert "7 more values" in found[-1].what
    found = [f for f in found_in(tmp_path, data, labels=None).findings if (f.kind, f.role) == ("rare class", "train")]
    assert [finding.count for finding in found] == [1, 1, 1, 1, 1, 7]
    assert "7 more classes" in found[-1].what


def test_what_is_refused_beyond_rows(tmp_path: Path) -> None:
    data = clean()
    long = found_in(tmp_path, data, max_length=65)
    assert [(finding.kind, finding.severity) for finding in long.findings] == [("tokenizer", "error")]
    assert "64 positions" in long.findings[0].what
    recipe = recipe_of(tmp_path, data)
    held = {role: rows.sha256 for role, rows in load_labelled(recipe.dataset).roles.items()}
    assert found_in(tmp_path, data, sha256=held).findings == []
    data["test"][0][0] += " more"
    other = found_in(tmp_path, data, sha256=held)
    assert [(finding.kind, finding.severity) for finding in other.findings] == [("other rows", "error")]
    assert other.findings[0].remedy.startswith("bring those data back")


def test_other_files_than_the_recipe_was_locked_to_are_found(tmp_path: Path) -> None:
    recipe, model = recipe_of(tmp_path, clean()), tmp_path / "model"
    write_checkpoint(model)
    section = pinned_files(ModelSection(checkpoint=str(model)))
    locked = recipe.model_copy(update={"model": section})
    assert "other files" not in {finding.kind for finding in inspect(locked).findings}
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (other,) = (finding for finding in inspect(locked).findings if finding.kind == "other files")
    assert (other.severity, "model.safetensors is not the file" in other.what) == ("error", True)


def test_labels_that_nobody_named_do_not_hide_what_else_is_wrong(tmp_path: Path) -> None:
    """Where rows are drawn by their labels too."""
    table = write_csv(tmp_path / "t.csv", [(f"text {i}", i % 2) for i in range(40)] + [("x", 2), ("", 1), ("y", "")])
    plain = tiny_recipe(table)
    plain["dataset"] |= {"splits": {"train": 30, "validation": 13}, "labels": ["no", "yes"]}
    kinds = {finding.kind for finding in inspect(Recipe.model_validate(plain)).findings}
    assert {"unknown label", "no text", "no label"} <= kinds


def test_a_checkpoint_out_of_reach_leaves_the_tokens_out(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, clean())
    away = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(
                update={"from_config": None, "train_tokenizer": None, "checkpoint": "org/away"}
            )
        }
    )
    found = inspect(away)
    assert found.findings == []
    assert all(role.tokens is None for role in found.roles)
    assert [note.split(":")[0] for note in found.notes] == ["the tokens were not looked at"]
    assert "org/away" in found.notes[0]


def test_how_labels_were_read_is_told(tmp_path: Path) -> None:
    data = {role: [[text, label[:3]] for text, label in rows] for role, rows in clean().items()}
    found = found_in(tmp_path, data)
    assert found.findings == []
    assert len(found.notes) == 3
    assert all("neg → negative" in note for note in found.notes)
    assert found_in(tmp_path, data, labels={"neg": "negative", "pos": "positive"}).notes == []


def test_a_column_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [1, 2, 3, 4], "label": [0, 1, 0, 1]}), path)
    splits = {"train": "train"}
    found = found_in(tmp_path, clean(), path=str(path), data_files=None, splits=splits)
    (finding,) = (finding for finding in found.findings if finding.kind == "no text")
    assert (finding.count, finding.severity) == (4, "error")
    assert "dataset.text_column" in finding.remedy


def test_rows_that_have_no_role_and_labels_that_are_hidden(tmp_path: Path) -> None:
    data = clean()
    data["test"] = [[text, "-1"] for text, _ in data["test"]]
    found = found_in(tmp_path, data, splits={"train": "train[:390]", "validation": "validation", "test": "test"})
    assert found.findings == []
    assert found.notes == [
        "10 rows (1.2%) of the data have no role",
        "test: the 200 rows have no labels, so they are predicted and not scored",
    ]


# --- for people -------------------------------------------------------------------------------------------------------


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = clean(words=CHINESE)
    for rows in data.values():
        for row in rows:
            row[1] = {"negative": "差评", "positive": "好评"}[row[1]]
    data["train"][4][0] = ""
    data["train"][5][0] = "\x1b[31m红"
    data["train"][6][0] = data["test"][6][0] = "<br />好吃"
    found = found_in(tmp_path, data, labels=["差评", "好评"], max_length=8)
    print_inspection(found)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for finding in found.findings:
        assert f"{finding.severity}: {finding.kind}, {finding.role}: {finding.what}" in out
        assert finding.remedy in out
        assert all(example.place in out for example in finding.rows)
    assert f"{tmp_path / 'train.csv'}, row 5: " in out
    assert re.search(r"\n差评 +192 +48\.0% +101 +50\.5% +107 +53\.5%\n", out)
    assert "over 8" in out
    assert "rows are counted from 1" in out
    assert out.rstrip().splitlines()[-1].startswith("1 error, ")


def test_the_page_of_clean_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_inspection(found_in(tmp_path, clean()))
    out = capsys.readouterr().out
    assert out.rstrip().splitlines()[-1] == "nothing found"
    assert "→" not in out


def test_many_labels_and_missing_ones_are_summed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"intent {i:02}" for i in range(40)]
    data = {role: [[text, names[i % 40]] for i, (text, _) in enumerate(rows)] for role, rows in clean().items()}
    data["train"][0][1] = ""
    print_inspection(found_in(tmp_path, data, labels=names))
    out = capsys.readouterr().out
    assert "intent 29" in out
    assert "intent 30" not in out
    assert re.search(r"10 more +100 +50 +50", out)
    assert re.search(r"no label +1 +0 +0", out)


def test_recipes_are_looked_at_each_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe_of(tmp_path, clean())), encoding="utf-8")
    assert look_at([str(path)])
    assert not look_at([str(path)], ["dataset.labels=[negative, other]"])  # which the data contradict
    assert not look_at([str(tmp_path / "none.yaml"), str(path)])
    said = capsys.readouterr()
    assert "none.yaml" in said.err
    assert said.out.count(f"{path}\n") == 3
