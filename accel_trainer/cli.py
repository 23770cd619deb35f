"""The verbs that need no launcher: `accel-trainer show | check | prove | predict | evaluate`.

Each verb imports what it needs when it runs, so that help and the checking of recipes start neither torch nor
transformers.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from accel_trainer.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER_MISTAKE, AccelTrainerError, Interrupted, UserError
from accel_trainer.redaction import Parser


def show(arguments: argparse.Namespace) -> int:
    """Print a recipe with overrides and defaults resolved, as YAML that runs."""
    from accel_trainer.library import find_recipe
    from accel_trainer.recipe_file import load_recipe, to_yaml

    _, path = find_recipe(arguments.recipe)
    print(to_yaml(load_recipe(path, arguments.overrides)), end="")
    return EXIT_DONE


def check(arguments: argparse.Namespace) -> int:
    """Say what is wrong with each recipe: every mistake, each with its line and remedy."""
    from accel_trainer.library import find_recipe
    from accel_trainer.recipe_file import load_recipe

    code = EXIT_DONE
    for recipe in arguments.recipes:
        try:
            _, path = find_recipe(recipe)
            load_recipe(path)
            print(f"{path}: no mistakes")
        except UserError as error:
            print(error, file=sys.stderr)
            code = EXIT_USER_MISTAKE
    return code


def predict(arguments: argparse.Namespace) -> int:
    """Label texts from the command line, or a file to a file."""
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
        print(f"{arguments.output}: {rows} rows")
        return EXIT_DONE
    for text, record in zip(arguments.text, predict_texts(predictor, arguments.text, arguments.text_pair), strict=True):
        shares = sorted(record["probabilities"].items(), key=lambda item: -item[1])
        print(f"{record['prediction']}  {'  '.join(f'{name} {share:.4f}' for name, share in shares)}  {text}")
    return EXIT_DONE


def evaluate(arguments: argparse.Namespace) -> int:
    """Score a model with the recipe's metrics on the labelled rows of a file."""
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


def prove(arguments: argparse.Namespace) -> int:
    """Take a recipe's first steps in every layout and compare them."""
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


def process_counts(text: str) -> list[int]:
    """Numbers between commas."""
    try:
        return [int(count) for count in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers such as 1,2") from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="accel-trainer", description="Recipes and trained text classifiers. Training itself: accel_trainer.train."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)

    verb = verbs.add_parser("show", help="a recipe with overrides and defaults resolved, as YAML that runs")
    verb.add_argument("recipe")
    verb.add_argument("overrides", nargs="*", metavar="section.key=value")
    verb.set_defaults(run=show)

    verb = verbs.add_parser("check", help="every mistake of recipes, each with its line and remedy")
    verb.add_argument("recipes", nargs="+", metavar="recipe")
    verb.set_defaults(run=check)

    verb = verbs.add_parser(
        "prove", help="that processes, micro-batches and interruptions do not change a recipe's steps"
    )
    verb.add_argument("recipe")
    verb.add_argument("overrides", nargs="*", metavar="section.key=value")
    verb.add_argument(
        "--processes", type=process_counts, default=[1, 2], metavar="1,2", help="numbers of processes to compare"
    )
    verb.add_argument("--steps", type=int, default=3, metavar="N", help="optimizer steps to take (default: 3)")
    verb.add_argument("--output", type=Path, help="JSON file for the differences")
    verb.add_argument(
        "--trust_remote_code", action="store_true", help="run code that the checkpoint's repository holds"
    )
    verb.set_defaults(run=prove)

    verb = verbs.add_parser("predict", help="labels and probabilities of texts, or of a file")
    _add_model(verb)
    verb.add_argument("--text", action="append", help="a text to label; may be given several times")
    verb.add_argument("--text_pair", action="append", help="the second text of a pair")
    verb.add_argument("--input", help="a table: CSV, TSV, JSON, JSONL, Parquet, Arrow or text, plain or compressed")
    verb.add_argument("--output", help="where the labelled rows go: .csv, .tsv, .jsonl or .parquet")
    verb.add_argument(
        "--keep_formulas",
        action="store_true",
        help="write cells that a spreadsheet would run as they are; without, they begin with an apostrophe in .csv, .tsv",
    )
    verb.set_defaults(run=predict)

    verb = verbs.add_parser("evaluate", help="the recipe's metrics on other data")
    _add_model(verb)
    verb.add_argument("--input", required=True, help="a table with texts and labels")
    verb.add_argument("--label_column", help="column of the label (default: the recipe's)")
    verb.add_argument("--output", help="JSON file for the scores")
    verb.set_defaults(run=evaluate)
    return parser


def _add_model(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="RUN_OR_MODEL", help="folder of a run or of a model, or a Hub id")
    verb.add_argument("--text_column", help="column of the text (default: the recipe's)")
    verb.add_argument("--text_pair_column", help="column of the second text (default: the recipe's)")
    verb.add_argument("--max_tokens_per_device", type=int, metavar="N", help="tokens at once, padding included")
    verb.add_argument("--trust_remote_code", action="store_true", help="run code that the model's repository holds")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code is 0, or 2 for the user's mistake, 1 for anything else."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")  # to stderr
    logging.getLogger("accel_trainer").setLevel(logging.INFO)
    try:
        code: int = arguments.run(arguments)
    except AccelTrainerError as error:
        print(f"{'' if isinstance(error, Interrupted) else 'error: '}{error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return EXIT_DONE
    return code


if __name__ == "__main__":
    sys.exit(main())
