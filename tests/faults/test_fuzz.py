"""Whatever recipe or table comes in, it ends in training or in one clear message; more of them run in `fuzz.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from fuzz import VALUES, again, check_message, check_recipe, check_table, fuzz
from sample_files import MINIMAL, arrow_bytes, parquet_bytes
from support import tiny_recipe

from accel_trainer import data_file, train
from accel_trainer.data_file import MOST_COLUMNS
from accel_trainer.errors import MOST_MISTAKES, DataError, RecipeError
from accel_trainer.recipe_file import load_recipe, parse_recipe
from accel_trainer.splits import MAX_SLICES, parse_slices
from accel_trainer.tables import read_files


def refusal(text: str, *overrides: str) -> str:
    """What is said of a recipe that is refused."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "recipe.yaml", overrides)
    check_message(str(caught.value))
    return str(caught.value)


def recipe(folder: Path, **sections: dict[str, Any]) -> bytes:
    """A tiny recipe for the reviews that the checks lay beside it."""
    dataset = {"splits": {"train": 16, "validation": 6}}
    return yaml.safe_dump(tiny_recipe(Path("reviews.csv"), **{"dataset": dataset, **sections})).encode()


def test_some_hundreds(tmp_path: Path) -> None:
    """A part of what `python tests/faults/fuzz.py` does, always the same."""
    found = fuzz(200, 40, 0, tmp_path / "failures")
    assert found["failures"] == []
    for kind, count in (("recipes", 200), ("tables", 40)):
        assert sum(found[kind].values()) == count
        # Or the drawing is too wild to reach what lies behind the reading.
        assert sum(n for end, n in found[kind].items() if end.startswith("trained")) > count // 20
        assert sum(n for end, n in found[kind].items() if end.startswith("refused later")) > count // 100
    assert found["recipes"]["refused"] > 50


def test_what_goes_wrong_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("of the test")

    with monkeypatch.context() as patch:
        patch.setattr(train, "load_recipe", broken)
        found = fuzz(60, 2, 0, tmp_path / "failures")
        kept = {failure["kind"]: Path(failure["file"]) for failure in found["failures"]}
        assert set(kept) == {"recipes", "tables"}
        assert found["tables"] == {"FAILED": 2}
        assert all("RuntimeError: of the test" in failure["error"] for failure in found["failures"])
        for file in kept.values():
            with pytest.raises(AssertionError, match="of the test"):
                again(file, tmp_path / "work")
    for file in kept.values():
        assert again(file, tmp_path / "work").startswith(("trained", "refused later", "not finite"))


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["\\e[31m", "\\a", "\\x85", "\\u202e", "\\u2028", "\\x9b2J"])
def test_what_a_terminal_would_obey_is_escaped(written: str) -> None:
    for text in (f'{MINIMAL}"{written}": 1\n', MINIMAL.replace("max_steps", f'optim: "a{written}", max_steps')):
        refusal(text)
    character = yaml.safe_load(f'"{written}"')
    refusal(MINIMAL, f"k{character}k=1", f"training.optim={character}")
    assert ascii(character)[1:-1] in str(DataError(f"label {character}"))
    assert str(DataError("👩‍👩‍👧 差\nnext line")) == "👩‍👩‍👧 差\nnext line"


def test_a_file_name_makes_no_second_mistake(tmp_path: Path) -> None:
    path = tmp_path / "a\nb\x1b[31m.yaml"
    path.write_text("3", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{tmp_path}/a\\nb\\x1b[31m.yaml: this is no recipe")
    assert "\n" not in str(caught.value)


def test_long_values_are_cut_and_remedies_kept() -> None:
    for old, new in (
        ("max_steps", f"lr_scheduler_kwargs: {{? {'k' * 500_000} : 1}}, max_steps"),
        ("train: train", f"train: '{'k' * 500_000}!'"),
        ("checkpoint", f"from_config: {{model_type: 1, {'k' * 900}: 1}}, checkpoint"),
    ):
        assert re.search(r"it takes no argument|joined with \+|give one", refusal(MINIMAL.replace(old, new))[-400:])
    error = DataError(f"a.csv, row 3: label {'k' * 1_000_000}; mend the row")
    check_message(f"/table.csv: {error}")
    assert str(error).startswith("a.csv, row 3: label kkk")
    assert str(error).endswith("; mend the row")


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL + "evaluation: {metrics: [" + "1," * 15_000 + "]}\n",
        MINIMAL.replace("path:", "sha256: {" + ",".join(f"a{i}: [1]" for i in range(6_000)) + "}, path:"),
        MINIMAL + "".join(f"k{i}: 1\n" for i in range(5_000)),
        MINIMAL + "description: 1\n" * 5_000,
        MINIMAL.replace(
            "max_steps", "lr_scheduler_kwargs: {" + "".join(f"k{i}: 1," for i in range(5_000)) + "}, max_steps"
        ),
    ],
)
def test_thousands_of_mistakes(text: str) -> None:
    said = refusal(text).splitlines()
    assert len(said) == MOST_MISTAKES + 1
    assert re.fullmatch(r"and \d{4,5} more mistakes", said[-1])


def test_slices_without_end() -> None:
    assert len(parse_slices("+".join(f"train[{i}:{i + 1}]" for i in range(MAX_SLICES)))) == MAX_SLICES
    for expression in ("+".join(["train"] * (MAX_SLICES + 1)), f"train[:{'9' * 5_000}]", f"train[:0.{'9' * 5_000}%]"):
        assert "dataset.splits.train" in refusal(MINIMAL.replace("train: train", f"train: '{expression}'"))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_hidden_layers", 10**13),  # made one by one until memory is full
        ("num_labels", 10**13),
        ("intermediate_size", -8),
        ("intermediate_size", 10**14),
        ("num_attention_heads", 0),
        ("max_position_embeddings", 0),
        ("type_vocab_size", 0),
        ("chunk_size_feed_forward", "a"),
        ("hidden_act", "nothing"),
        ("output_attentions", True),  # trained, and could not be saved
        ("return_dict", False),
        ("to_dict", 1),
        ("attn_implementation", "org/kernel"),  # code from the Hub
        ("_attn_implementation", "org/kernel"),
        ("auto_map", {"AutoConfig": "org/code--a.B"}),
        ("trust_remote_code", True),
    ],
)
def test_a_config_of_which_no_classifier_comes(tmp_path: Path, argument: str, value: object) -> None:
    config = {**tiny_recipe(Path())["model"]["from_config"], argument: value}
    assert check_recipe(recipe(tmp_path, model={"from_config": config}), [], tmp_path) == "refused later"
    status = json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))
    assert status["reason"].startswith("model.from_config: ")


@pytest.mark.parametrize(
    "section", ["", "dataset.", "model.", "training.", "dataset.splits.", "evaluation.", "saving."]
)
@pytest.mark.parametrize("value", ["true", "false"])
def test_trust_comes_from_the_command_line_alone(section: str, value: str) -> None:
    assert "give --trust_remote_code on the command line" in refusal(MINIMAL, f"{section}trust_remote_code={value}")
    values = yaml.safe_load(MINIMAL)
    place = values
    for name in section.split(".")[:-1]:
        place = place.setdefault(name, {})
    place["trust_remote_code"] = value == "true"
    said = refusal(yaml.safe_dump(values).replace("1.0e-05", "0.00001"))
    assert f"{section}trust_remote_code: code from the Hub is trusted only from the command line" in said


@pytest.mark.parametrize("value", [value for value in VALUES if value.startswith(("!", "&", "*", "{<<"))])
def test_tags_anchors_and_aliases_are_never_honoured(value: str) -> None:
    refusal(f"{MINIMAL}description: {value}\n")
    refusal(
        MINIMAL.replace(
            "model: {checkpoint: org/model}", f"model:\n  from_config:\n    model_type: bert\n    a: {value}\n"
        )
    )


# --- tables -----------------------------------------------------------------------------------------------------------

EMPTY = pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())})


@pytest.mark.parametrize("splits", [{"train": 0.5, "validation": 0.5}, {"train": 3}, {"train": "train"}])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_without_rows(tmp_path: Path, suffix: str, splits: dict[str, Any]) -> None:
    content = parquet_bytes(EMPTY) if suffix == "parquet" else arrow_bytes(EMPTY, pa.ipc.new_stream)
    file = tmp_path / f"table.{suffix}"
    file.write_bytes(content)
    assert check_table(file, {"dataset": {"splits": splits}}, tmp_path) == "refused later"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("table.csv", "text,label\n" + "good,a\nbad,b\n" * 12 + f"odd,{'9' * 5_000}\n", None),  # a class like any other
        (
            "table.jsonl",
            '{"\\ud800": "good", "label": "a"}\n',
            "line 1: the column name '\\ud800' holds half a character",
        ),
        ("table.csv", ",".join(f"k{i}" for i in range(MOST_COLUMNS + 1)) + "\n1\n", "there are 10001 columns"),
        ("table.json", json.dumps([{f"k{i}": i} for i in range(MOST_COLUMNS + 1)]), "columns; keep those of"),
        ("table.csv", f"text,label\n{'k' * 5_000},a\n", "line 2: it is longer than 4000 characters"),
        ("table.json", f"[{'1,' * 5_000}]", "line 1: it is longer than 4000 characters"),
        (
            "table.csv",
            'text,label\n"' + "good,a\n" * 2_000,
            "line 2: in the row that begins here a cell begins with a quote",
        ),
    ],
)
def test_a_table_that_would_fill_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, says: str | None
) -> None:
    if "k0" not in content and "999" not in content:
        monkeypatch.setattr(data_file, "LONGEST_LINE", 4_000)
        monkeypatch.setattr(data_file, "LONGEST_CELL", 3_000)
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    ending = check_table(file, {"dataset": {"splits": {"train": "train"}}}, tmp_path)
    assert ending == ("refused later" if says else "trained")
    if says:
        status = json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))
        assert says in status["reason"]


def test_thousands_of_columns_are_read(tmp_path: Path) -> None:
    """In time that grows with their number; it once grew with its square, to many minutes."""
    names = [f"k{i}" for i in range(3_000)]
    (tmp_path / "a.jsonl").write_text(
        json.dumps(dict.fromkeys(names, 1)) + "\n" + json.dumps({"k7": 1.5}), encoding="utf-8"
    )
    table = read_files([tmp_path / "a.jsonl"])
    assert table.data.column_names == names
    assert table.data[1]["k7"] == 1.5
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n' * 1_000 + '{"b": 1, "a": "text"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"b\.jsonl, line 1001: column 'a' cannot hold 'text'"):
        read_files([tmp_path / "b.jsonl"])
