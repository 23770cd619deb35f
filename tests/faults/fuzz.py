"""Recipes and tables as nobody should write them: each ends in training or in one clear message, and in nothing else.

    python tests/faults/fuzz.py --recipes 1000 --tables 100 --seed 0 --folder fuzzed

The strategies draw whole files. `check_recipe` and `check_table` run the program's own code on one, in this process;
`fuzz` does so for many, counts how they ended, and keeps every input that ended otherwise.
"""

from __future__ import annotations

import argparse
import base64
import bz2
import contextlib
import csv
import gc
import gzip
import io
import itertools
import json
import lzma
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update({"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
os.environ.setdefault("OMP_NUM_THREADS", "1")
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from harness import alone_on_the_cpu, run_trainer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import reviews, tiny_recipe, write_csv

from accel_trainer import cli
from accel_trainer.errors import RecipeError
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_fields import allowed_at, sections
from accel_trainer.recipe_file import load_recipe

LONGEST_MESSAGE = 20_000  # characters
LONGEST_TIME = 120  # seconds before a case counts as hanging, on a busy machine
MOST_MEMORY = 1_500_000  # KiB by which one case may raise the peak of this process
KEPT = 5  # inputs kept of failures that look the same

# A message about the input names it: the file, the command line, or the key of the recipe.
PLACE = r"command line|recipe\.yaml|/table\b|\b(dataset|model|training|evaluation|saving|tracking|prob)\w*\.\w+|--\w+"
UNSHOWABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class TableCase(NamedTuple):
    """A table to train on."""

    name: str
    content: bytes
    changes: dict[str, dict[str, Any]]  # of the recipe, besides the path
    output: str = "labelled.csv"  # where a model writes its rows to


class RecipeCase(NamedTuple):
    """A recipe to train, and what the command line adds."""

    content: bytes
    overrides: tuple[str, ...]


# --- checks -----------------------------------------------------------------------------------------------------------


def check_message(message: str) -> None:
    """See that a message can be shown, and says where the mistake is."""
    assert message.strip(), "the message is empty"
    assert len(message) <= LONGEST_MESSAGE, f"the message has {len(message)} characters: {message[:200]}"
    assert "Traceback" not in message, message
    assert re.search(PLACE, message), f"the message names no place: {message[:500]}"
    unshowable = UNSHOWABLE.search(message)
    assert unshowable is None, f"the message holds {unshowable and unshowable.group()!r}: {message[:500]!r}"


def check_recipe(content: bytes, overrides: Sequence[str], folder: Path) -> str:
    """Train what a recipe says, a step of it; how it ended: refused at once, after reading the data, failed, trained.

    Raises:
        AssertionError: in none of these ways.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "reviews.csv").exists():
        write_csv(folder / "reviews.csv", reviews(30))
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            recipe = load_recipe(path, overrides)
    except RecipeError as error:
        check_message(str(error))
        return "refused"
    return _trained(path, [*overrides, *_shorter(recipe)], folder)


def check_table(file: Path, changes: dict[str, dict[str, Any]], folder: Path) -> str:
    """Train on a table, a step; how it ended, as `check_recipe` says.

    Raises:
        AssertionError: in no such way.
    """
    recipe = tiny_recipe(file, saving={"save_strategy": "no"}, training={"max_steps": 1})
    del recipe["dataset"]["labels"]
    for name, section in changes.items():
        recipe[name] = {**recipe[name], **section}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return _trained(path, [], folder)


def check_prediction(file: Path, output: str, folder: Path) -> str:
    """Label a table from the command line with a model of two labels, made once in `folder`; how it ended.

    Raises:
        AssertionError: neither in a file of labelled rows nor in one message.
    """
    model = folder / "of-reviews" / "run"
    if not model.exists():
        assert check_recipe(yaml.safe_dump(_base()).encode(), [], model.parent) == "trained"
    target, out, err = folder / output, io.StringIO(), io.StringIO()
    target.unlink(missing_ok=True)
    command = ["predict", str(model), "--input", str(file), "--output", str(target)]
    alone = alone_on_the_cpu(folder.parent / "datasets-cache")
    with alone, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(command)
    assert (code == 0) == target.exists()
    if code == 0:
        return "labelled"
    message = re.search(r"^error: (.*)", err.getvalue(), re.MULTILINE | re.DOTALL)
    assert code == 2, f"exit code {code}: {err.getvalue()[-2000:]}"
    assert message, f"no message: {err.getvalue()[-2000:]}"
    check_message(message.group(1).rstrip("\n"))
    return "not labelled"


def _shorter(recipe: Recipe) -> Iterator[str]:
    """Overrides that let a valid recipe end soon."""
    steps = recipe.training.max_steps
    if steps is None or steps > 2:
        yield "training.max_steps=2"
        if recipe.training.warmup_steps > 2:
            yield "training.warmup_steps=1"


def _trained(recipe: Path, overrides: Sequence[str], folder: Path) -> str:
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    try:
        outcome = run_trainer(recipe, run, "--layout=auto", *overrides)
    except SystemExit as end:  # of argparse, for an override that looks like an option
        return "usage" if end.code == 2 else f"exit {end.code}"
    said = outcome.out + outcome.err
    assert "Traceback" not in said, said[-6000:]
    if outcome.code == 0:
        return "trained"
    message = re.search(r"^error: (.*)", outcome.err, re.MULTILINE | re.DOTALL)
    assert message, f"no message, exit code {outcome.code}: {said[-2000:]}"
    if outcome.code == 1:  # a recipe may ask for a learning rate of 1e30
        assert re.match(r"the (loss|gradient)\b.* (nan|-?inf|not finite)\b", message.group(1)), said[-2000:]
        return "not finite"
    assert outcome.code == 2, f"exit code {outcome.code}: {said[-2000:]}"
    check_message(message.group(1).rstrip("\n"))
    return "refused later"


# --- recipes ----------------------------------------------------------------------------------------------------------

VALUES = [
    "null", "~", "", "true", "no", "0", "-1", "1", "2", "3", "0.5", "1.5", "-0.0", "1e-30", "1e30", "1e308", "1e309",
    "1e400", "-1e400", "5e-324", ".inf", "-.inf", ".nan", "010", "0x1F", "0o17", "1_000", "1:30", "2024-01-01",
    str(2**31), str(2**53 + 1), str(2**63 - 1), str(2**63), str(2**64), str(10**30), "1" + "0" * 350, "9" * 401,
    "-" + "9" * 5000, "0x" + "f" * 300, "''", '""', "' '", "text", "[]", "{}", "[null]", "[1, [2]]", "{a: {b: c}}", "[{}]",
    "{1: 2}", "{null: 1}", "{a: 1, a: 2}", "{? [a] : b}", "[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]", "[a, a]", "[a, b]", "[f1]",
    "!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "!!binary aGk=", "!!set {a}", "!x y",
    "!!str 1", "!<tag:yaml.org,2002:float> 1", "! 1", "&a x", "*a", "&a [*a]", "{<<: {a: b}}", "<<", "=", "|\n    x\n    y",
    ">-\n    folded\n    text", "'open", '"open', "[open", "{open", "a: b: c", "- a", "? a", "@a", "`a`", "%a", "#a", "a #b",
    '"\\0"', '"\\e[31m\\a"', '"\\ud800"', '"\\u2028\\u202e"', '"\\N\\_"', '"\\xff"', '"\\U00110000"', '"\\UFFFFFFFF"', '"\\q"',
    "差评", "😀", "\u202ereversed", "../../../etc/passwd", "/dev/null", "/dev/zero", "/", ".", "..", "~", "~nobody/x.csv", "nowhere.csv",
    "reviews.csv", "recipe.yaml", "'*'", "'*.csv'", "'[a'", "'**'", "http://localhost:1/a.csv", "hf://datasets/a/b/c.csv",
    "s3://bucket/a.csv", "file:///etc/passwd", "zip://a.csv::x.zip", "ftp://", "://", "unknown://a.csv", "org/name", "a/b/c", "bert-base-uncased",
    "train", "train[:5]", "train[5:]", "train[50%:]", "train[:999999999999999999999]", "train[:-3]", "train+train", "'train[::]'",
    "${HOME}", "{{ 1 }}", "$(id)", "__import__('os')", "os.system", "x" * 5000, "'" + "\\" * 500 + "'", "steps", "epoch", "linear", "cosine",
    "accuracy", "loss", "binary", "macro", "adafactor", "sgd", "utf-16", "rot13", "idna", "base64", "latin-1", "unicode_escape", "undefined",
]  # fmt: skip

KEYS = [
    "labels", "label", "labels_", "textcolumn", "text-column", "learning_rate", "lr", "batch_size", "trust_remote_code", "auto_map",
    "num_epochs", "fp16", "<<", "*a", "&a b", "!!str a", "? a", "1", "null", "true", "''", '"\\0"', '"\\e[1m"', "'a.b'", "dataset.path", "é",
    "差评", "__class__", "__init__", "model_fields", "self", "k" * 300, "[a]", "{a: b}", "rules", "evaluation", "train", "model",
]  # fmt: skip

# Arguments of a model's config: small, or too large for any machine; what lies between would train for hours.
CONFIG = {
    "model_type": ["bert", "distilbert", "roberta", "electra", "albert", "modernbert", "gpt2", "t5", "llama", "nothing", "1", "null", "bert "],
    "hidden_size": ["8", "0", "-2", "1.5", "a", "17", "null", "[8]", "true", str(10**13), str(10**30)],
    "num_hidden_layers": ["1", "0", "-1", "a", "1.5", "null", "[1]", str(10**13), str(10**30)],
    "num_attention_heads": ["1", "0", "-2", "3", "a", "null", str(10**13)],
    "intermediate_size": ["8", "0", "-8", "a", "null", str(10**14)],
    "max_position_embeddings": ["64", "0", "-1", "3", "a", "null", str(10**15)],
    "type_vocab_size": ["1", "0", "-1", "a", "3"],
    "vocab_size": ["1", "0", "-1", "a", str(10**15), "100000"],
    "hidden_act": ["relu", "nothing", "1", "null", "[a]"],
    "hidden_dropout_prob": ["0.1", "2", "-1", "a", ".nan", "null"],
    "layer_norm_eps": ["1e-5", "0", "-1", "a", ".nan", "null"],
    "initializer_range": ["0.02", "0", "-1", "a", "1e30", "null"],
    "num_labels": ["1", "2", "5", "0", "-1", "a", str(10**13)],
    "problem_type": ["regression", "multi_label_classification", "nothing"],
    "id2label": ["{0: a}", "[a]", "a", "{a: 0}"], "label2id": ["{a: 0}", "a"],
    "is_decoder": ["true", "a"], "add_cross_attention": ["true"], "output_attentions": ["true"], "output_hidden_states": ["true"],
    "return_dict": ["false", "a"], "chunk_size_feed_forward": ["1", "-1", "a"], "pad_token_id": ["5", "-1", "a", str(10**9)],
    "tie_word_embeddings": ["true"], "torch_dtype": ["float16", "nothing"], "dtype": ["bfloat16", "nothing"], "architectures": ["a", "[a]"],
    "attn_implementation": ["eager", "sdpa", "flash_attention_2", "nothing", "org/kernel", "'org/kernel:f'"],
    "_attn_implementation": ["eager", "org/kernel"], "auto_map": ["{AutoConfig: org/code--a.B}"], "quantization_config": ["{a: b}", "{load_in_4bit: true}"],
    "experts_implementation": ["org/kernel"], "use_cache": ["false"], "self": ["1"], "kwargs": ["{}"], "to_dict": ["1"], "_name_or_path": ["/etc"],
    "position_embedding_type": ["relative_key", "nothing"], "embedding_size": ["4", "0"], "num_hidden_groups": ["2", str(10**13)],
    "inner_group_num": ["2"], "classifier_dropout": ["0.1", "5", "a"], "global_attn_every_n_layers": ["0", "1", "a"], "local_attention": ["0", "a", "3"],
    "rope_parameters": ["{}", "a"], "rope_theta": ["a"], "pruned_heads": ["{0: [0]}", "a"], "deterministic_flash_attn": ["true"], "sparse": ["1"],
}  # fmt: skip

BOMBS = [
    b"", b"\n", b"\0", b"\xff", b"null", b"1", b"text", b"- a\n- b\n", b"[]", b"{}", b"---\n...\n", b"---\n---\n", b"# only a comment\n", b"\t", b"...", b"%YAML 1.1",
    b"%YAML 9.9\n---\na: b", b"%YAML 1." + b"9" * 5000 + b"\n---\na: b\n", b"%TAG ! tag:x:\n---\n!y z", b"a: b: c", b"? ? ? ?", b"!!python/object/new:os.system [id]",
    b"[" * 5000, b"{" * 5000, b"- " * 5000, b"? " * 5000, b"[\n" * 5000, b"a: [" * 3000, b"!!map " * 3000, b"&a " * 3000, b"'" * 5001, b'"' * 5001,
    b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (c, c, c - 1, c - 1) for c in range(98, 123)), b"a: &a {<<: *a}\n",
    b"training: {metrics: [" + b"1," * 30_000 + b"]}\n", b"evaluation: {metrics: [" + b"1," * 30_000 + b"]}\n", b"".join(b"k%d: 1\n" % i for i in range(30_000)),
    b"description: a\n" * 30_000, b"dataset: {labels: {" + b"a: b, " * 30_000 + b"}}\n", b"k" * 200_000 + b": 1\n", b"? " + b"k" * 200_000 + b"\n: 1\n",
    b"#" * 1_000_001, b"description: " + b"x" * 999_000, b"\x7fELF\x02\x01\x01", b"PK\x03\x04\x14\0", b"\x89PNG\r\n\x1a\n\0\0", b"\x80\x04\x95K\0.", b"GIF89a\x01\0",
]  # fmt: skip


def _base() -> dict[str, Any]:
    splits = {"train": 16, "validation": 6}
    values: dict[str, Any] = tiny_recipe(
        Path("reviews.csv"),
        dataset={"splits": splits},
        training={"num_train_epochs": 1, "max_steps": 2},
        saving={"save_strategy": "no"},
    )
    return values


def _places(values: dict[str, Any], keys: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The keys of everything in nested mappings."""
    below = [_places(value, (*keys, key)) for key, value in values.items() if isinstance(value, dict)]
    return [(*keys, key) for key in values] + list(itertools.chain.from_iterable(below))


FIELDS = [(keys[0], name) for keys, schema in sections().items() if len(keys) == 1 for name in schema["properties"]]
ODD_TEXT = st.text(max_size=30) | st.text(st.sampled_from("[]{}:,#&*!|>'\"%@` -?\n\t.0ae"), max_size=15)
ODD = (
    st.sampled_from(VALUES)
    | ODD_TEXT
    | st.integers().map(str)
    | st.floats().map(repr)
    | st.sampled_from(["[{}]", "{{a: {}}}", '"{}"', "'{}'", "!!python/object:{} x"]).flatmap(
        lambda shape: st.sampled_from(VALUES).map(lambda value: shape.replace("{}", value))
    )
)


def _plausible(keys: tuple[str, ...]) -> st.SearchStrategy[str]:
    """Values of the type that a key takes, up to the ends of their range and beyond."""
    kinds = {
        "integer": ["1", "2", "3", "7", "16", "100", str(2**31), str(2**63 - 1), str(10**30), "1" + "0" * 350],
        "number": ["0", "1e-30", "0.1", "0.5", "0.999", "1", "3", "1e-3", "1e30", "1e308", "5e-324", str(10**30)],
        "boolean": ["true", "false"],
        "string": ["text", "label", "a", "org/name", "reviews.csv", "train[:50%]", "loss", "accuracy", "f1", "utf-8", "'1'"],
        "null": ["null"],
        "array": ["[]", "[negative, positive]", "[f1, accuracy]", "[a, b, c]", "[tensorboard]", "[wandb, mlflow]", "[matthews_correlation, nothing]"],
        "object": ["{}", "{train: reviews.csv}", "{negative: a, positive: b}", "{num_cycles: 1}", "{power: 1e30, lr_end: 1}", "{num_decay_steps: 1}", "{train: a}"],
    }  # fmt: skip
    allowed = allowed_at(keys)
    values = [value for schema in allowed for value in schema.get("enum", kinds.get(schema.get("type", ""), ["1"]))]
    return st.sampled_from(values)


def _one_in(draw: st.DrawFn, count: int) -> bool:
    # Not whether it is 0: Hypothesis draws the ends of a range more often than the rest.
    return draw(st.integers(0, count - 1)) == count // 2


@st.composite
def _edited_text(draw: st.DrawFn) -> str:
    """A tiny recipe with some values, keys and lines changed."""
    values, raw = _base(), dict[str, str]()

    def planted(text: str) -> str:
        name = f"RAW{len(raw)}WAR"
        raw[name] = text
        return name

    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.sampled_from(_places(values)))
        section = values
        for key in place[:-1]:
            section = section[key]
        match draw(st.integers(0, 9)):
            case 0:
                section.pop(place[-1])
            case 1:
                section[planted(draw(st.sampled_from(KEYS) | ODD_TEXT))] = section.pop(place[-1])
            case 2:
                section[planted(draw(st.sampled_from(KEYS) | ODD_TEXT))] = planted(draw(ODD))
            case 3 | 4:
                name, key = draw(st.sampled_from(FIELDS))
                if isinstance(values.setdefault(name, {}), dict):
                    values[name][key] = planted(draw(_plausible((name, key)) | ODD))
            case 5 | 6:
                key = draw(st.sampled_from(sorted(CONFIG)))
                if isinstance(config := values.get("model", {}), dict) and isinstance(config.get("from_config"), dict):
                    config["from_config"][key] = planted(draw(st.sampled_from(CONFIG[key])))
            case _ if "from_config" not in place:
                section[place[-1]] = planted(draw(ODD))
    text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False).replace("1.0e-03", "0.001")
    return re.sub(r"RAW\d+WAR", lambda found: raw[found.group()], text)


@st.composite
def recipes(draw: st.DrawFn) -> RecipeCase:
    """A recipe's bytes and overrides: sound, or broken in its values, its text, its bytes or altogether."""
    if _one_in(draw, 20):
        whole = draw(
            st.sampled_from(BOMBS) | st.binary(max_size=200) | st.text().map(lambda t: t.encode(errors="replace"))
        )
        return RecipeCase(whole, draw(overrides()))
    text = draw(_edited_text())
    lines = text.split("\n")
    if _one_in(draw, 10):
        i = draw(st.integers(0, len(lines) - 1))
        match draw(st.integers(0, 6)):
            case 0:
                lines.insert(i, lines[i])
            case 1:
                del lines[i]
            case 2:
                lines[i] = "\t" + lines[i].lstrip()
            case 3:
                lines[i] = " " * draw(st.integers(0, 5)) + lines[i].lstrip()
            case 4:
                lines.insert(i, draw(ODD))
            case 5:
                lines[i : i + 1] = ["---", lines[i]]
            case _:
                lines[i] += draw(ODD_TEXT)
    text = draw(st.sampled_from(["\n"] * 30 + ["\r\n", "\r", "\x85", "\u2028"])).join(lines)
    # The first is by far the most frequent: everything else is tried on recipes that can be read.
    encoding = draw(
        st.sampled_from(["utf-8"] * 60 + ["utf-8-sig", "utf-16", "utf-32", "gb18030", "latin-1", "utf-16-le", "cp500"])
    )
    content = text.encode(encoding, errors="surrogatepass" if encoding.startswith("utf") else "replace")
    if _one_in(draw, 30):
        at, odd = (
            draw(st.integers(0, len(content))),
            draw(st.binary(max_size=8) | st.sampled_from([b"\0", b"\xff", b"\x1b[2J", b"\xef\xbb\xbf"])),
        )
        content = draw(
            st.sampled_from([content[:at] + odd + content[at:], content[:at], content[at:], content[:at] + odd])
        )
    return RecipeCase(content, draw(overrides()))


@st.composite
def _override(draw: st.DrawFn) -> str:
    match draw(st.integers(0, 9)):
        case 0:
            return draw(ODD_TEXT)
        case 1:
            key = draw(st.sampled_from(sorted(CONFIG)))
            return f"model.from_config.{key}={draw(st.sampled_from(CONFIG[key]))}"
        case 2:
            keys = draw(
                st.lists(
                    st.sampled_from(["dataset", "labels", "splits", "a", "", " ", "0", "é"]), min_size=1, max_size=6
                )
            )
            return f"{'.'.join(keys)}={draw(ODD)}"
        case 3:
            return draw(st.sampled_from([
                "a." * 3000 + "b=1", "model.from_config" + ".a" * 300 + "=1", "evaluation.metrics=[" + "1," * 30_000 + "]", "=", "==", ".=1", "a.=1", "training",
                "description=" + "[" * 3000, "model.trust_remote_code=true", "trust_remote_code=1", "dataset.splits=1", "dataset=null", "model=[]", "--x", "-1",
                "description=\udcff", "description=\x1b[31m", "dataset.labels=[\x1b[31m, b]", "model.from_config.model_type=\x1b[31m", "training.max_steps=\x07",
            ]))  # fmt: skip
        case _:
            field = draw(st.sampled_from(FIELDS))
            return f"{'.'.join(field)}={draw(_plausible(field) | ODD)}"


def overrides() -> st.SearchStrategy[tuple[str, ...]]:
    """What stands behind a recipe on the command line; mostly nothing. An argument holds no NUL."""
    some = st.lists(_override().map(lambda typed: typed.replace("\0", "")), min_size=1, max_size=3).map(tuple)
    return st.sampled_from([False, False, False, True]).flatmap(lambda given: some if given else st.just(()))


# --- tables -----------------------------------------------------------------------------------------------------------

CELLS: list[Any] = [
    None, "", " ", "\n", "\r", "\r\n", "\t", '"', '""', "'", ",", "a,b", 'said "hi"', "\0", "a\0b", "\x1b[31mred", "\u202e", "\ufeff", "\u2028", "😀", "👩‍👩‍👧", "差评",
    "=cmd|' /C calc'!A0", "=1+1", "+1", "-1", "@x", "NA", "null", "None", "nan", "NaN", "inf", "true", "True", "007", "1.0", "0", "1", "2", "3", "-2", "999", "1e400", "٣", "²",
    "9" * 30, "9" * 5000, "negative", "positive", "NEG", "p", "x" * 1_000_000, "word " * 5000, "[CLS]", "[PAD] [MASK]", "##a", "\u0301" * 50, "a\u0300" * 200, "\U000e0001", "\ufffe",
    0, 1, -1, 2, 10**18, -(2**63), 2**63, 2**64, 10**40, 0.0, 0.5, 1.0, 1e308, float("nan"), float("inf"), True, False, [], ["a"], [1, "a"], {}, {"a": 1}, [[[[]]]],
]  # fmt: skip
NAMES = ["text", "label", "", " ", "Text", "texts", "text ", "\ufefftext", "label\n", "a" * 5000, "\x1b[31m", "差", "0", "__index_level_0__", '"', "a,b", "\0", "id", "\ud800"]  # fmt: skip
OUTPUTS = st.sampled_from(["labelled.csv", "labelled.tsv", "labelled.jsonl", "labelled.parquet"])
LABELS: list[list[Any]] = [
    *[["negative", "positive"]] * 12, [0, 1], ["0", "1"], [0.0, 1.0], [1, 2, 3], ["same"], [None], [True, False], ["1", "b"], [-1, 0, 1], [0.5, 1.5], ["a", None],
]  # fmt: skip
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: bytes(pa.compress(content, "zstd", asbytes=True)),
}
SUFFIXES = ["csv", "tsv", "json", "jsonl", "ndjson", "txt", "parquet", "arrow"]
WHOLE = [
    b"", b"\n", b"\n\n\n", b"\0" * 1000, b"text,label", b"text,label\n", b"label\n1\n2\n", b'"', b'text,label\n"a,1\n', b'text,label\na"b,1\n', b"[", b"[]", b"{}", b"null", b"[1]",
    b'{"text": "a"', b'[{"text": "a", "label": 1}', b"[" * 200_000, b'{"a":' * 200_000, b'[{"text": NaN, "label": Infinity}]', b'{"text": "\\ud800", "label": "a"}\n' * 5,
    b'{"text": "a", "label": ' + b"9" * 5000 + b"}\n", b'{"text": "a", "text": "b", "label": 1}\n', b'{"text": "a", "label": {"a": {"b": ' + b"[" * 500 + b"]" * 500 + b"}}}\n", b"PAR1", b"PAR1" * 10,
    b"ARROW1\0\0", b"ARROW1\0\0" * 10, b"\x1f\x8b\x08", b"PK\x05\x06" + b"\0" * 18, b"BZh9", b"\xfd7zXZ\0", b"\xff\xfet\0", b"\x80\x04\x95.", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    json.dumps({f"k{i}": i for i in range(3_000)}).encode(), json.dumps({f"k{i}": i for i in range(20_000)}).encode(), b",".join(b"k%d" % i for i in range(20_000)) + b"\n1\n",
    b"<html><body>404</body></html>", b"SQLite format 3\0", b"\x89HDF\r\n\x1a\n", b"text,label\n" + b"a,b,c,d\n" * 5, b"text\tlabel\na\t1\n", b"text;label\na;1\n", b"a" * 3_000_000,
]  # fmt: skip


def _text_cell(cell: Any) -> str:
    return "" if cell is None else str(cell)


def _arrow_column(cells: list[Any]) -> pa.Array:
    try:
        return pa.array(cells)
    except (pa.ArrowException, OverflowError, UnicodeError):
        return pa.array([None if cell is None else str(cell).encode(errors="replace").decode() for cell in cells])


@st.composite
def _columns(draw: st.DrawFn) -> tuple[list[str], list[list[Any]]]:
    """Names and rows, mostly sound."""
    count = draw(st.sampled_from([*[24] * 24, 0, 1, 2, 5]))
    labels = draw(st.sampled_from(LABELS))
    rows: list[list[Any]] = [[text, labels[i % len(labels)]] for i, (text, _) in enumerate(reviews(count))]
    names = ["text", "label"]
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        match draw(st.integers(0, 5)):
            case 0:
                names[draw(st.integers(0, len(names) - 1))] = draw(st.sampled_from(NAMES))
            case 1:
                names.append(draw(st.sampled_from(NAMES)))
                rows = [[*row, draw(st.sampled_from(CELLS))] for row in rows[:3]] + [[*row, 0] for row in rows[3:]]
            case 2 if len(names) > 1:
                names, rows = names[:-1], [row[:-1] for row in rows]
            case _ if rows:
                cell = draw(st.sampled_from(CELLS) | st.text(max_size=20) | st.integers() | st.floats())
                rows[draw(st.integers(0, len(rows) - 1))][draw(st.integers(0, len(names) - 1))] = cell
    return names, rows


def _written(names: list[str], rows: list[list[Any]], kind: str) -> bytes:
    """A table in a format, as well as the format can hold it."""
    if kind in ("csv", "tsv"):
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter="\t" if kind == "tsv" else ",", lineterminator="\n")
        writer.writerows([names, *([_text_cell(cell) for cell in row] for row in rows)])
        return text.getvalue().encode(errors="surrogatepass")
    if kind in ("json", "jsonl", "ndjson"):
        records = [dict(zip(names, row, strict=False)) for row in rows]
        lines = [json.dumps(record, ensure_ascii="\ud800" in names) for record in records]
        return (f"[{', '.join(lines)}]" if kind == "json" else "\n".join(lines) + "\n").encode(errors="surrogatepass")
    if kind == "txt":
        return "\n".join(_text_cell(row[0]) for row in rows if row).encode(errors="surrogatepass")
    names = [name.replace("\ud800", "?") for name in names]
    columns = [_arrow_column([row[i] if i < len(row) else None for row in rows]) for i in range(len(names))]
    table, sink = pa.Table.from_arrays(columns, names=names), pa.BufferOutputStream()
    if kind == "parquet":
        try:
            pq.write_table(table, sink)
        except pa.ArrowException:  # a struct without fields, which the format does not have
            return b"PAR1"
    else:
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


@st.composite
def tables(draw: st.DrawFn) -> TableCase:
    """A table as a file, sound or broken in its cells, its text, its bytes or altogether, and the recipe's view of it."""
    kind = draw(st.sampled_from([*[suffix for suffix in SUFFIXES if suffix != "txt"] * 3, "txt"]))
    names, rows = draw(_columns())
    content = (
        draw(st.sampled_from(WHOLE) | st.binary(max_size=300)) if _one_in(draw, 10) else _written(names, rows, kind)
    )
    if kind not in ("parquet", "arrow") and _one_in(draw, 8):
        text, i = content.decode(errors="replace"), draw(st.integers(0, min(len(content), 2000)))
        newline = draw(st.sampled_from(["\n", "\r\n", "\r", "\x85"]))
        text = text.replace("\n", newline, draw(st.sampled_from([-1, 3])))
        odd = draw(st.sampled_from(['"', ",", ",,,", "\t", "\0", "'", "\n\n", "\\", "{", "]", "\x1a", ""]))
        encoding = draw(
            st.sampled_from(
                ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "gb18030", "latin-1", "cp1252", "utf-7"]
            )
        )
        content = (text[:i] + odd + text[i:]).encode(encoding, errors="replace")
    suffix = draw(st.sampled_from([kind] * 40 + [*SUFFIXES, "xlsx", "pkl", "npy", "pt", "", "CSV"]))
    compression = draw(st.sampled_from([""] * 16 + [*COMPRESS, ".zip"]))
    inner = f"table.{suffix}"
    if compression == ".zip":
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in draw(
                st.sampled_from(
                    [[inner]] * 3 + [[], [inner, "b.csv"], ["../../evil.csv"], ["/abs.csv"], ["a.exe"], ["d/"]]
                )
            ):
                archive.writestr(name, content)
        content = sink.getvalue()
    else:
        content = COMPRESS[compression](content)
    if content and _one_in(draw, 12):  # cut off, or damaged
        at = draw(st.integers(0, len(content) - 1))
        content = draw(st.sampled_from([content[:at], content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]]))
    if _one_in(draw, 20):
        compression = draw(st.sampled_from([*COMPRESS, ".zip"]))  # which it is not
    splits = draw(st.sampled_from([
        {"train": 16, "validation": 4, "test": 4}, {"train": 0.6, "validation": 0.2, "test": 0.2}, {"train": "train"}, {"train": 1}, {"train": "train[:50%]", "validation": "train[50%:]"},
    ]))  # fmt: skip
    dataset: dict[str, Any] = {"splits": splits}
    if _one_in(draw, 4):
        odd_key, odd_value = draw(st.sampled_from([
            ("labels", ["negative", "positive"]), ("labels", ["a", "b", "c"]), ("labels", {"negative": "n", "positive": "p"}), ("labels", {"0": "n", "1": "p"}), ("labels", ["x" * 3000, "\x1b[31m"]),
            ("text_pair_column", "label"), ("text_pair_column", "id"), ("text_column", "label"), ("label_column", "text"), ("label_column", "none"), ("encoding", "utf-16"), ("encoding", "latin-1"),
            ("encoding", "idna"), ("encoding", "unicode_escape"), ("encoding", "utf-7"), ("encoding", "rot13"), ("encoding", "undefined"), ("encoding", "cp037"), ("shuffle_seed", 1),
            ("max_train_samples", 1), ("max_train_samples", 10**12), ("sha256", {"train": "0"}), ("max_length", 4),
        ]))  # fmt: skip
        dataset[odd_key] = odd_value
    return TableCase(
        f"table.{suffix}{compression}" if suffix else "table", content, {"dataset": dataset}, draw(OUTPUTS)
    )


# --- many of them -----------------------------------------------------------------------------------------------------


class Hanging(BaseException):
    """A case takes minutes."""


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """Ends a case that hangs, and sees that none takes the machine's memory."""

    def stop(*_: object) -> None:
        raise Hanging(f"still running after {LONGEST_TIME} s")

    before = signal.signal(signal.SIGALRM, stop)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(LONGEST_TIME)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert more < MOST_MEMORY, f"{more / 2**20:.1f} GiB more than any case before"


def run_recipe(case: RecipeCase, folder: Path) -> str:
    """`check_recipe` of a drawn case."""
    return check_recipe(case.content, case.overrides, folder)


def run_table(case: TableCase, folder: Path) -> str:
    """`check_table` of a drawn case."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / case.name
    file.write_bytes(case.content)
    try:
        return f"{check_table(file, case.changes, folder)}, {check_prediction(file, case.output, folder)}"
    finally:
        file.unlink()


def fuzz(recipes_: int, tables_: int, seed: int, folder: Path) -> dict[str, Any]:
    """Check many recipes and tables.

    Args:
        recipes_: how many recipes.
        tables_: how many tables.
        seed: of the drawing; the same one draws the same cases, for one version of Hypothesis.
        folder: where the inputs of failures are kept, as JSON files with the bytes in base64.

    Returns:
        `recipes` and `tables`: how many ended in which way (tables: trained on, and labelled by a model); `failures`: kind, error and file of each that is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failures: list[dict[str, str]] = []
    alike: Counter[str] = Counter()
    counts: dict[str, Counter[str]] = {"recipes": Counter(), "tables": Counter()}

    def failed(kind: str, case: RecipeCase | TableCase, error: BaseException) -> None:
        counts[kind]["FAILED"] += 1
        text = "".join(traceback.format_exception(error))
        frames = re.findall(r'File ".*?accel_trainer/(\w+\.py)", line (\d+)', text)
        last = [line for line in text.strip().splitlines() if line and not line.startswith(" ")][-1]
        like = f"{kind} {frames[-1] if frames else ''} {re.sub(r'[^ ]*[0-9/][^ ]*', '#', last)[:80]}"
        alike[like] += 1
        if alike[like] > KEPT:
            return
        file = folder / f"{kind}-{len(failures)}.json"
        values = {**case._asdict(), "content": base64.b64encode(case.content).decode(), "error": text}
        file.write_text(json.dumps(values, indent=1), encoding="utf-8")
        failures.append({"kind": kind, "error": last[:300], "file": str(file)})

    def each(kind: str, strategy: st.SearchStrategy[Any], count: int, run: Callable[[Any, Path], str]) -> None:
        if count == 0:
            return
        place = Path(tempfile.mkdtemp(prefix="fuzz-"))
        work, here = place / "work", Path.cwd()

        @hypothesis.seed(seed)
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def one(case: Any) -> None:
            try:
                with _guarded():
                    counts[kind][run(case, work)] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # what libraries in Rust raise when they panic is no Exception
                failed(kind, case, error)
            if len(counts[kind]) and counts[kind].total() % 500 == 0:
                shutil.rmtree(place / "datasets-cache", ignore_errors=True)
                gc.unfreeze()  # what ended runs have kept from the collector
                gc.collect()

        (place / "elsewhere").mkdir()
        os.chdir(place / "elsewhere")  # which a recipe that runs code, or writes where it should not, may fill
        try:
            one()
            left = sorted(path.name for path in Path.cwd().iterdir())
            if left:
                failures.append({"kind": kind, "error": f"files were written: {left[:5]}", "file": ""})
        finally:
            os.chdir(here)
            shutil.rmtree(place, ignore_errors=True)

    folder = folder.absolute()
    each("recipes", recipes(), recipes_, run_recipe)
    each("tables", tables(), tables_, run_table)
    return {**{kind: dict(counter) for kind, counter in counts.items()}, "failures": failures, "alike": dict(alike)}


def again(file: Path, folder: Path) -> str:
    """Run a kept failure once more."""
    values = json.loads(file.read_text(encoding="utf-8"))
    content = base64.b64decode(values["content"])
    if "overrides" in values:
        return run_recipe(RecipeCase(content, tuple(values["overrides"])), folder)
    return run_table(TableCase(values["name"], content, values["changes"], values["output"]), folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz, print the counts as JSON, and end with 1 if anything failed."""
    parser = argparse.ArgumentParser(description="Recipes and tables as nobody should write them.")
    parser.add_argument("--recipes", type=int, default=1000)
    parser.add_argument("--tables", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("fuzzed"), help="where the inputs of failures are kept")
    parser.add_argument("--again", type=Path, help="one of those, to run it once more")
    options = parser.parse_args(argv)
    if options.again:
        with tempfile.TemporaryDirectory() as place:
            print(again(options.again, Path(place, "work")))
        return 0
    found = fuzz(options.recipes, options.tables, options.seed, options.folder)
    print(json.dumps(found, indent=1, ensure_ascii=False))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
