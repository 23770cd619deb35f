"""Options of other trainers are answered with this one's spelling."""

from __future__ import annotations

import pytest

from accel_trainer.command_line import Parser, recipes_and_overrides
from accel_trainer.recipe_fields import sections
from accel_trainer.spellings import ANSWERED, RENAMED


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    parser = Parser(prog="it")
    parser.add_argument("--known")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--learning_rate", "3e-5"], "; for --learning_rate write training.learning_rate=3e-5"),
        (["--learning-rate=3e-5"], "; for --learning-rate write training.learning_rate=3e-5"),
        (["--seed", "1", "--max_length", "9"], "; for --seed write training.seed=1; for --max_length write dataset.max_length=9"),
        (["--warmup_ratio", "0.1"], "; for --warmup_ratio write training.warmup_steps=0.1"),
        (["--per_device_train_batch_size", "8"], "make the result depend on the number of devices; give training.global_batch_size"),
        (["--training.learning_rate=3"], "; for --training.learning_rate write training.learning_rate=3"),
        (["--knwon", "x"], "; did you mean --known?"),
        (["--revision", "x"], "dataset.revision=x or model.revision=x"),
    ],
)  # fmt: skip
def test_what_to_write_instead(arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer in refused(arguments, capsys)


def test_every_key_and_every_known_spelling_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    keys = [
        name
        for section, schema in sections().items()
        for name in schema["properties"]
        if (*section, name) not in sections()
    ]
    for name in {*keys, *RENAMED, *ANSWERED}:
        said = refused([f"--{name}", "1"], capsys)
        assert said.count(f"--{name}") >= 2, said


def test_what_nobody_knows_is_only_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(["--nothing_like_it", "1"], capsys).endswith("error: unrecognized arguments: --nothing_like_it 1\n")


def test_recipes_and_overrides_in_any_order() -> None:
    free = ["imdb/distilbert", "training.seed=1", "a=b/c.yaml", "x.yaml", "seed = 2"]
    assert recipes_and_overrides(free) == (["imdb/distilbert", "x.yaml"], ["training.seed=1", "a=b/c.yaml", "seed = 2"])


def test_what_may_be_left_out_is_not_called_required(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="it")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    with pytest.raises(SystemExit):
        parser.parse_intermixed_args([])
    assert capsys.readouterr().err.endswith("required: RECIPE\n")
