"""The verbs that need no launcher: `accel-trainer list | show | check | plan | diff | copy | lock | …`.

Each verb imports what it needs when it runs, so that help, and what only looks at recipes, start neither torch nor
transformers.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from accel_trainer.command_line import Parser, recipes_and_overrides
from accel_trainer.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_MISTAKE,
    AccelTrainerError,
    UserError,
)
from accel_trainer.terminal import complain, print_table, say, write_any_text

# --- recipes ----------------------------------------------------------------------------------------------------------


def list_recipes(arguments: argparse.Namespace) -> int:
    """The recipes in reach: what each trains, on what, its recorded result, and where it comes from."""
    from accel_trainer.listing import print_recipes

    print_recipes(arguments.pattern)
    return EXIT_DONE


def show(arguments: argparse.Namespace) -> int:
    """A recipe with overrides and defaults resolved, as YAML that runs."""
    from accel_trainer.library import find_recipe
    from accel_trainer.recipe_file import load_recipe, to_yaml

    _, path = find_recipe(arguments.recipe)
    print(to_yaml(load_recipe(path, arguments.overrides)), end="")
    return EXIT_DONE


def check(arguments: argparse.Namespace) -> int:
    """Every mistake of recipes, each with its line and remedy; with --data, of their data too."""
    from accel_trainer.checking import check_all

    recipes, overrides = recipes_and_overrides(arguments.recipes)
    if not recipes:
        raise UserError("check: name a recipe")
    found = check_all(recipes, overrides, arguments.config_file)
    blamed = {mistake.source for mistakes in found.values() for mistake in mistakes}
    for name, mistakes in found.items():
        for mistake in mistakes:
            say(mistake, "red", stderr=True)
        if not mistakes and name not in blamed:  # a config that does not go with a recipe stands with that
            data = " in the recipe" if arguments.data else "; its data were not read (--data reads them)"
            say(f"{name}: no mistakes{data if name in recipes else ''}", "green")
    if any(found.values()):
        return EXIT_USER_MISTAKE
    if not arguments.data:
        return EXIT_DONE
    from accel_trainer.inspection import look_at

    return (
        EXIT_DONE if look_at(recipes, overrides, trust_remote_code=arguments.trust_remote_code) else EXIT_USER_MISTAKE
    )


def plan(arguments: argparse.Namespace) -> int:
    """What a run will take: steps, tokens, memory, time and disk, before anything runs."""
    from accel_trainer.accelerate_config import of_launch
    from accel_trainer.forecast import forecast
    from accel_trainer.forecast_table import print_forecast
    from accel_trainer.library import find_recipe
    from accel_trainer.recipe_file import load_recipe

    name, path = find_recipe(arguments.recipe)
    found = forecast(
        load_recipe(path, arguments.overrides),
        of_launch(arguments.config_file),
        output_dir=arguments.output_dir or Path("runs") / name,
        layout=arguments.layout,
        max_tokens_per_device=arguments.max_tokens_per_device,
        gradient_checkpointing=arguments.gradient_checkpointing,
        measures=not arguments.no_measure,
        trust_remote_code=arguments.trust_remote_code,
    )
    print_forecast(found)
    return EXIT_DONE


def diff(arguments: argparse.Namespace) -> int:
    """Two recipes or runs, key by key."""
    from accel_trainer.comparison import print_diff

    print_diff(arguments.a, arguments.b)
    return EXIT_DONE


def copy(arguments: argparse.Namespace) -> int:
    """A new recipe from an old one, with its comments, and with where it comes from."""
    from accel_trainer.copying import copy_recipe

    print(copy_recipe(arguments.source, arguments.target, arguments.overrides))
    return EXIT_DONE


def lock(arguments: argparse.Namespace) -> int:
    """Pin in a recipe the revisions and the bytes of its checkpoint and data, so that it trains on no others."""
    from accel_trainer.locking import lock_recipe

    print(lock_recipe(arguments.recipe, arguments.overrides, trust_remote_code=arguments.trust_remote_code))
    return EXIT_DONE


# --- runs -------------------------------------------------------------------------------------------------------------


def record(arguments: argparse.Namespace) -> int:
    """Write a run's result into its recipe, and the table of the library it stands in."""
    from accel_trainer.recording import record as write

    print(write(arguments.run_folder, arguments.recipe, arguments.tolerance))
    return EXIT_DONE


def reproduce(arguments: argparse.Namespace) -> int:
    """Train a recipe again and compare with its recorded result."""
    from accel_trainer.reproduction import print_reproduction
    from accel_trainer.reproduction import reproduce as train_again

    found = train_again(
        arguments.recipe,
        arguments.overrides,
        config_file=arguments.config_file,
        output_dir=arguments.output_dir,
        tolerance=arguments.tolerance,
        resume=arguments.resume,
        trust_remote_code=arguments.trust_remote_code,
    )
    print_reproduction(found)
    return EXIT_DONE if found.succeeded else EXIT_FAILED


def prove(arguments: argparse.Namespace) -> int:
    """That processes, micro-batches and interruptions do not change a recipe's steps."""
    from accel_trainer.prove import prove as compare

    agrees = compare(
        arguments.recipe,
        arguments.overrides,
        processes=arguments.processes,
        steps=arguments.steps,
        output=arguments.output,
        trust_remote_code=arguments.trust_remote_code,
    )
    return EXIT_DONE if agrees else EXIT_FAILED


# --- models -----------------------------------------------------------------------------------------------------------


def predict(arguments: argparse.Namespace) -> int:
    """Labels and probabilities of texts, or of a file."""
    if bool(arguments.text) == bool(arguments.input) or bool(arguments.input) != bool(arguments.output):
        raise UserError("predict: give --text, or --input together with --output")
    if arguments.text_pair and len(arguments.text_pair) != len(arguments.text or []):
        raise UserError("predict: give as many --text_pair as --text")
    from accel_trainer.predict import load_predictor, predict_file, predict_texts

    predictor = load_predictor(
        arguments.model,
        max_tokens_per_device=arguments.max_tokens_per_device,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.input:
        columns = arguments.text_column, arguments.text_pair_column
        source, target = Path(arguments.input), Path(arguments.output)
        rows = predict_file(predictor, source, target, *columns, keep_formulas=arguments.keep_formulas)
        print(f"{arguments.output}: {rows} row{'' if rows == 1 else 's'}")
        return EXIT_DONE
    table = []
    for text, record in zip(arguments.text, predict_texts(predictor, arguments.text, arguments.text_pair), strict=True):
        shares = sorted(record["probabilities"].items(), key=lambda item: -item[1])
        table.append([record["prediction"], "  ".join(f"{name} {share:.4f}" for name, share in shares), text])
    print_table(["", "", ""], table)
    return EXIT_DONE


def evaluate(arguments: argparse.Namespace) -> int:
    """The recipe's metrics on other data."""
    from accel_trainer.predict import evaluate_file, load_predictor
    from accel_trainer.run_folder import write_json

    predictor = load_predictor(
        arguments.model,
        max_tokens_per_device=arguments.max_tokens_per_device,
        trust_remote_code=arguments.trust_remote_code,
    )
    scores, table = evaluate_file(
        predictor,
        Path(arguments.input),
        arguments.text_column,
        arguments.label_column,
        arguments.text_pair_column,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(table)
    plain = {name: value for name, value in scores.items() if isinstance(value, float)}
    print(json.dumps(plain))
    if arguments.output:
        write_json(Path(arguments.output), scores)
    return EXIT_DONE


# --- the command line -------------------------------------------------------------------------------------------------


class Verb(NamedTuple):
    """A verb: what it does, and what may stand behind it."""

    run: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[Parser], object]


def _recipe(verb: Parser) -> None:
    verb.add_argument("recipe", metavar="RECIPE", help="path of a recipe, or its name, such as imdb/distilbert")
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")


def _config_file(verb: Parser) -> None:
    verb.add_argument("--config_file", type=Path, metavar="ACC.yaml", help="the accelerate config of the launch")


def _trust(verb: Parser) -> None:
    verb.add_argument(
        "--trust_remote_code", action="store_true", help="run code that the checkpoint's repository holds"
    )


def _tokens(verb: Parser) -> None:
    verb.add_argument("--max_tokens_per_device", type=int, metavar="N", help="tokens at once, padding included")


def _list_arguments(verb: Parser) -> None:
    verb.add_argument("pattern", nargs="?", help="part of a name, checkpoint or dataset, or a pattern such as 'sst2/*'")


def _check_arguments(verb: Parser) -> None:
    verb.add_argument(
        "recipes", nargs="+", metavar="RECIPE|section.key=value", help="recipes, and values for all of them"
    )
    _config_file(verb)
    verb.add_argument("--data", action="store_true", help="read the data and say what is in them")
    _trust(verb)


def _plan_arguments(verb: Parser) -> None:
    _recipe(verb)
    _config_file(verb)
    _tokens(verb)
    verb.add_argument("--layout", choices=("auto", "packed", "padded"), default="auto", help="as for the trainer")
    verb.add_argument("--gradient_checkpointing", action="store_true", help="as for the trainer")
    verb.add_argument(
        "--output_dir", type=Path, help="folder of the run, whose disk is looked at (default: the trainer's)"
    )
    verb.add_argument("--no_measure", action="store_true", help="take no steps: say nothing of the time")
    _trust(verb)


def _diff_arguments(verb: Parser) -> None:
    verb.add_argument("a", metavar="A", help="a recipe, or the folder of a run")
    verb.add_argument("b", metavar="B")


def _copy_arguments(verb: Parser) -> None:
    verb.add_argument("source", metavar="FROM", help="a recipe, or the folder of a run")
    verb.add_argument("target", metavar="TO", help="path of the new recipe, or its name, for ./recipes")
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the old recipe's")


def _lock_arguments(verb: Parser) -> None:
    verb.add_argument("recipe", metavar="RECIPE", help="path of a recipe, or its name")
    verb.add_argument("overrides", nargs="*", metavar="section.revision=value", help="other revisions to pin")
    _trust(verb)


def _tolerance(verb: Parser, default: str) -> None:
    verb.add_argument("--tolerance", type=float, metavar="X", help=f"largest difference accepted (default: {default})")


def _record_arguments(verb: Parser) -> None:
    verb.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a run that is done")
    verb.add_argument("--recipe", help="path of the recipe, or its name (default: the one that was run)")
    _tolerance(verb, "0.02")


def _reproduce_arguments(verb: Parser) -> None:
    _recipe(verb)
    _config_file(verb)
    verb.add_argument(
        "--output_dir", type=Path, help="folder of the run (default: runs/reproduce/ and the recipe's name)"
    )
    verb.add_argument("--resume", action="store_true", help="go on with an earlier reproduction in the folder")
    _tolerance(verb, "the recorded one")
    _trust(verb)


def _prove_arguments(verb: Parser) -> None:
    _recipe(verb)
    verb.add_argument(
        "--processes", type=process_counts, default=[1, 2], metavar="1,2", help="numbers of processes to compare"
    )
    verb.add_argument("--steps", type=int, default=3, metavar="N", help="optimizer steps to take (default: 3)")
    verb.add_argument("--output", type=Path, help="JSON file for the differences")
    _trust(verb)


def process_counts(text: str) -> list[int]:
    """Numbers between commas."""
    try:
        return [int(count) for count in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers such as 1,2") from None


def _model(verb: Parser) -> None:
    verb.add_argument("model", metavar="RUN_OR_MODEL", help="folder of a run or of a model, or a Hub id")
    verb.add_argument("--text_column", help="column of the text (default: the recipe's)")
    verb.add_argument("--text_pair_column", help="column of the second text (default: the recipe's)")
    _tokens(verb)
    _trust(verb)


def _predict_arguments(verb: Parser) -> None:
    _model(verb)
    verb.add_argument("--text", action="append", help="a text to label; may be given several times")
    verb.add_argument("--text_pair", action="append", help="the second text of a pair")
    verb.add_argument("--input", help="a table: CSV, TSV, JSON, JSONL, Parquet, Arrow or text, plain or compressed")
    verb.add_argument("--output", help="where the labelled rows go: .csv, .tsv, .jsonl or .parquet")
    verb.add_argument(
        "--keep_formulas",
        action="store_true",
        help="write cells that a spreadsheet would run as they are; without, they begin with an apostrophe in .csv, .tsv",
    )


def _evaluate_arguments(verb: Parser) -> None:
    _model(verb)
    verb.add_argument("--input", required=True, help="a table with texts and labels")
    verb.add_argument("--label_column", help="column of the label (default: the recipe's)")
    verb.add_argument("--output", help="JSON file for the scores")


VERBS = {
    "list": Verb(list_recipes, _list_arguments),
    "show": Verb(show, _recipe),
    "check": Verb(check, _check_arguments),
    "plan": Verb(plan, _plan_arguments),
    "diff": Verb(diff, _diff_arguments),
    "copy": Verb(copy, _copy_arguments),
    "lock": Verb(lock, _lock_arguments),
    "record": Verb(record, _record_arguments),
    "reproduce": Verb(reproduce, _reproduce_arguments),
    "prove": Verb(prove, _prove_arguments),
    "predict": Verb(predict, _predict_arguments),
    "evaluate": Verb(evaluate, _evaluate_arguments),
}


def parse_arguments(argv: Sequence[str]) -> tuple[Verb, argparse.Namespace]:
    """The verb and what stands behind it; options and overrides may stand in any order."""
    # Not argparse's own subcommands, which take no overrides behind an option.
    wide = max(map(len, VERBS)) + 2
    parser = Parser(
        prog="accel-trainer",
        usage="accel-trainer VERB …",
        description="Recipes, runs and trained text classifiers. Training itself: python -m accel_trainer.train.",
        epilog="verbs:\n" + "".join(f"  {name:<{wide}}{verb.run.__doc__}\n" for name, verb in VERBS.items())
        + "\naccel-trainer VERB --help tells more of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    name, *behind = argv or ["--help"]
    if name not in VERBS:
        parser.add_argument("--version", action="version", version=_version())
        if not name.startswith("-"):
            close = get_close_matches(name, VERBS, 1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            parser.error(f"{name}: no such verb{meant}; choose from {', '.join(VERBS)}")
        parser.parse_args([name])
        parser.error("name a verb")
    parser = Parser(prog=f"accel-trainer {name}", description=VERBS[name].run.__doc__)
    VERBS[name].add_arguments(parser)
    return VERBS[name], parser.parse_intermixed_args(behind)


def _version() -> str:
    from importlib.metadata import version

    return version("accel_trainer")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code is 0, or 2 for the user's mistake, 75 interrupted, 1 for anything else."""
    write_any_text()
    verb, arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s")  # to stderr
    logging.getLogger("accel_trainer").setLevel(logging.INFO)
    try:
        return verb.run(arguments)
    except AccelTrainerError as error:
        complain(error)
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted", "yellow", stderr=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
