"""Print how long it takes to the first optimizer step beside the bare imports, and how fast texts become tokens.

python benchmarks/start_up.py [RECIPE...] [--rounds 5] [--texts FILE --text_column text --tokenizer FOLDER]
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

Seconds = tuple[float, float]  # by the clock; of all cores together, which other jobs of the machine change less

PACKAGES = ("accel_trainer", "torch", "transformers", "accelerate", "datasets", "tokenizers", "evaluate")
QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
BARE = "import torch, transformers, datasets"

# Every measured process ends where the clock shall stop, without the interpreter's own tidying up.
END = "\nimport os\nos._exit(0)"
FIRST_STEP = """
import os, sys
from accel_trainer import train
take = train.training_step
def first_step(*arguments, **named):
    take(*arguments, **named)
    os._exit(0)
train.training_step = first_step
train.main(sys.argv[1:])
os._exit(1)  # it ended before a step
"""
CLI = "import sys\nfrom accel_trainer.cli import main\nsys.exit(main())"


def machine() -> str:
    """Name the hardware and the versions that the times belong to."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    return f"{cpu}, {os.cpu_count()} cores, OMP_NUM_THREADS {threads}; Python {platform.python_version()}, {versions}"


def run(code: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Seconds:
    """Return the seconds that a fresh interpreter takes for some code, by the clock and of all cores."""
    command = [sys.executable, "-c", code, *arguments]
    started, before = time.perf_counter(), os.times()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} ended with code {done.returncode}:\n{done.stderr}")
    return seconds, cpu


def time_processes(recipes: Sequence[Path], rounds: int, folder: Path) -> dict[str, list[Seconds]]:
    """Time fresh processes in turn, so that a busy moment of the machine meets all of them; a first round warms the caches."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}

    def first_step(recipe: Path, number: int) -> Seconds:
        return run(FIRST_STEP, [str(recipe), "--output_dir", str(folder / f"{recipe.stem}-{number}")], environment)

    def cli(*arguments: str) -> Callable[[int], Seconds]:
        return lambda _: run(CLI, arguments, environment)

    kinds: dict[str, Callable[[int], Seconds]] = {
        f"`{BARE}`": lambda _: run(BARE + END, [], environment),
        "the same, and `from transformers import BertForSequenceClassification`": lambda _: run(
            f"{BARE}\nfrom transformers import BertForSequenceClassification{END}", [], environment
        ),
        "`import accel_trainer.train`": lambda _: run(f"import accel_trainer.train{END}", [], environment),
        **{
            f"the first step of `{recipe.stem}`, data cached": lambda number, recipe=recipe: first_step(recipe, number)  # type: ignore[misc]
            for recipe in recipes
        },
        "`accel-trainer --help`": cli("--help"),
        **{f"`accel-trainer check {recipe.stem}`": cli("check", str(recipe)) for recipe in recipes},
        "`accel-trainer show quickstart`": cli("show", str(QUICKSTART)),
    }
    times: dict[str, list[Seconds]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name, kind in kinds.items():
            seconds = kind(number)
            if number:
                times[name].append(seconds)
    return times


def generated_texts(rows: int) -> list[str]:
    """Return texts of about 230 words out of 30,000, frequent and rare ones as in a language; the same in every run."""
    chance = random.Random(0)
    syllables = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ["", "n", "r", "s"]]
    words = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(30_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    return [" ".join(chance.choices(words, weights, k=chance.randint(60, 400))) + "." for _ in range(rows)]


def print_tokenisation(arguments: argparse.Namespace, folder: Path) -> None:
    """Print the rate of `cached_tokens`, empty and filled, beside the bare tokenizer and `datasets.map`."""
    import datasets  # here, so that this process is small while it starts and times others
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    from accel_trainer.recipe import TokenizerTraining
    from accel_trainer.tables import read_files
    from accel_trainer.tokenization import cached_tokens, train_word_pieces

    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = folder
    if arguments.texts is None:
        texts = generated_texts(arguments.rows)
        what = "generated texts"
    else:
        texts = list(read_files([arguments.texts]).data[arguments.text_column])[: arguments.rows]
        what = arguments.texts.name
    tokenizer: PreTrainedTokenizerBase = (
        AutoTokenizer.from_pretrained(arguments.tokenizer)
        if arguments.tokenizer
        else train_word_pieces(TokenizerTraining(vocab_size=8000), texts[:1000])
    )
    table = datasets.Dataset.from_dict({"text": texts})
    length = arguments.max_length

    def mapped(number: int) -> object:
        return table.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=length),
            batched=True,
            remove_columns=["text"],
            new_fingerprint=f"mapped{number}",
            cache_file_name=str(folder / f"mapped{number}.arrow"),
        )

    kinds: dict[str, Callable[[int], object]] = {
        "`tokenizer(texts)`, Python lists": lambda _: tokenizer(texts, truncation=True, max_length=length),
        "`datasets.map(batched=True)`, to disk": mapped,
        "`cached_tokens`, to disk": lambda number: cached_tokens(table, str(number), tokenizer, length),
        "`cached_tokens`, from disk": lambda number: cached_tokens(table, str(number), tokenizer, length),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    busy: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(arguments.rounds + 1):
        for name, kind in kinds.items():
            started, cpu = time.perf_counter(), time.process_time()
            kind(number)
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - started)
                busy[name].append(time.process_time() - cpu)
    tokens = int(cached_tokens(table, "1", tokenizer, length).lengths.sum())
    print(
        f"{what}: {len(texts):,} rows, {tokens:,} tokens (at most {length} of a row), vocabulary of {len(tokenizer):,}, "
        f"TOKENIZERS_PARALLELISM {os.environ.get('TOKENIZERS_PARALLELISM', 'not set')}\n"
    )
    print("| | seconds | cores busy | rows/s | tokens/s |\n|---|---:|---:|---:|---:|")
    for name in kinds:
        seconds = statistics.median(times[name])
        cores = statistics.median(busy[name]) / seconds
        print(f"| {name} | {seconds:.3f} | {cores:.2f} | {len(texts) / seconds:,.0f} | {tokens / seconds:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="*", type=Path, metavar="RECIPE", help="measured besides quickstart")
    parser.add_argument("--rounds", type=int, default=5, help="times that each thing is measured, in turn")
    parser.add_argument("--rows", type=int, default=5000, help="texts to tokenise; 0: leave that part out")
    parser.add_argument("--texts", type=Path, help="a table of texts (default: generated ones)")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--tokenizer", help="folder or Hub id (default: word pieces trained on the texts)")
    parser.add_argument("--max_length", type=int, default=512)
    arguments = parser.parse_args()

    print(f"{machine()}; medians of {arguments.rounds} in turn\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        times = time_processes([QUICKSTART, *arguments.recipes], arguments.rounds, folder)
        rows = {
            name: [statistics.median(column) for column in zip(*measured, strict=True)]
            for name, measured in times.items()
        }
        bare, bare_cpu = next(iter(rows.values()))
        print(
            "| a fresh process, from its start to the end of | seconds | ÷ bare imports | CPU seconds | ÷ bare imports |"
        )
        print("|---|---:|---:|---:|---:|")
        for name, (seconds, cpu) in rows.items():
            print(f"| {name} | {seconds:.2f} | {seconds / bare:.2f} | {cpu:.2f} | {cpu / bare_cpu:.2f} |")
        print(flush=True)
        if arguments.rows:
            print_tokenisation(arguments, folder / "cache")


if __name__ == "__main__":
    main()
