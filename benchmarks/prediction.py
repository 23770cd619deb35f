"""Print how fast texts are labelled beside `transformers.pipeline`, as it comes and fed sorted texts.

python benchmarks/prediction.py --sst2 FILE.tsv --imdb FILE.parquet --tokenizer FOLDER --threads 2

Both load the same folder, a DistilBERT of random weights, and turn texts into a probability of every label. Timed is all
of that: tokenisation, the model, the records in the order of the texts; loading is not.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, DistilBertConfig, DistilBertForSequenceClassification, Pipeline, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from accel_trainer.predict import Predictor, load_predictor, predict_texts
from accel_trainer.recipe import TokenizerTraining
from accel_trainer.tables import read_files
from accel_trainer.tokenization import train_word_pieces
from accel_trainer.tracking import quieten_libraries

Labelling = Callable[[list[str]], list[Any]]  # a record of each text, in order

OURS = "`predict_texts`"
MAX_LENGTH = 512
TOLERANCE = 1e-4  # of a probability; the two differ by rounding alone


@dataclass
class Measured:
    """What the rounds told about one way of labelling."""

    seconds: list[float] = field(default_factory=list)  # of each round
    difference: float = 0.0  # largest, of a probability from ours
    same_labels: int = 0


def machine(device: torch.device) -> str:
    """Name the hardware and the versions that the times belong to."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return (
        f"{date.today()} · {cpu}, {torch.get_num_threads()} thread{'s'[: torch.get_num_threads() > 1]}, model on "
        f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}, Python "
        f"{platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers", "accelerate"))
    )


def save_model(folder: Path, layers: int, tokenizer: str | None, texts: list[str]) -> None:
    """Write a DistilBERT of random weights, with a tokenizer of its own or trained on the texts."""
    pieces = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else train_word_pieces(TokenizerTraining(), texts)
    pieces.model_input_names = ["input_ids", "attention_mask"]  # DistilBERT takes no token_type_ids
    pieces.model_max_length = MAX_LENGTH
    pieces.save_pretrained(folder)
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=len(pieces), n_layers=layers, max_position_embeddings=MAX_LENGTH, pad_token_id=pieces.pad_token_id
    )
    model = DistilBertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight *= 20  # or every probability would be near 1/2, and equal ones would say little
    model.save_pretrained(folder)


def labellings(predictor: Predictor, theirs: Pipeline, batch_size: int) -> dict[str, Labelling]:
    """Make the ways of labelling texts that are compared, ours first."""
    ask = partial(theirs, truncation=True, max_length=MAX_LENGTH)

    def streamed(texts: list[str]) -> list[Any]:
        rows: Any = [{"text": text} for text in texts]  # quicker to index than a table of `datasets`
        return list(ask(KeyDataset(rows, "text"), batch_size=batch_size))

    def sorted_first(texts: list[str]) -> list[Any]:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        records: list[Any] = [None] * len(texts)
        for i, record in zip(order, ask([texts[i] for i in order], batch_size=batch_size), strict=True):
            records[i] = record
        return records

    return {
        OURS: lambda texts: predict_texts(predictor, texts),
        f"`pipeline(batch_size={batch_size})`, a list": lambda texts: ask(texts, batch_size=batch_size),
        f"`pipeline(batch_size={batch_size})`, a `KeyDataset`": streamed,
        f"`pipeline(batch_size={batch_size})`, a list sorted by characters": sorted_first,
        "`pipeline(batch_size=1)`, a list": lambda texts: ask(texts, batch_size=1),  # what its guide advises on a CPU
    }


def probabilities(records: Sequence[Any], names: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Read records of either kind; shape (texts, labels)."""
    shares = [r["probabilities"] if isinstance(r, dict) else {s["label"]: s["score"] for s in r} for r in records]
    return np.asarray([[share[name] for name in names] for share in shares])


def measure(ways: Mapping[str, Labelling], rounds: Sequence[list[str]], names: Sequence[str]) -> dict[str, Measured]:
    """Label the texts of every round in every way, in turn; another way begins each round."""
    measured = {name: Measured() for name in ways}
    turns = list(ways)
    for label in ways.values():
        label(rounds[0][:64])  # warms up
    for number, texts in enumerate(rounds):
        found = {}
        for name in turns[number % len(turns) :] + turns[: number % len(turns)]:
            started = time.perf_counter()
            records = ways[name](texts)
            measured[name].seconds.append(time.perf_counter() - started)
            found[name] = probabilities(records, names)
        for name, shares in found.items():
            way = measured[name]
            way.difference = max(way.difference, float(np.abs(shares - found[OURS]).max()))
            way.same_labels += int(np.count_nonzero(shares.argmax(-1) == found[OURS].argmax(-1)))
    spread = found[OURS].std(0).max()
    print(f"standard deviation of a label's probability over the texts of the last round: {spread:.3f}\n")
    return measured


def print_table(measured: Mapping[str, Measured], rounds: Sequence[list[str]], tokens: Sequence[int]) -> None:
    """Print a row for each way of labelling: its medians over the rounds."""
    print("| | rows/s | tokens/s | time ÷ ours, median (min–max) | same label | probabilities differ by |")
    print("|---|---:|---:|---:|---:|---:|")
    rows = sum(map(len, rounds))
    for name, way in measured.items():
        speeds = [len(texts) / seconds for texts, seconds in zip(rounds, way.seconds, strict=True)]
        token_speeds = [count / seconds for count, seconds in zip(tokens, way.seconds, strict=True)]
        ratios = [theirs / ours for theirs, ours in zip(way.seconds, measured[OURS].seconds, strict=True)]
        print(
            f"| {name} | {statistics.median(speeds):.1f} | {statistics.median(token_speeds):,.0f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) | {way.same_labels:,} of {rows:,} | "
            f"{way.difference:.0e} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sst2", type=Path, metavar="FILE", help="a table with a column `sentence`")
    parser.add_argument("--imdb", type=Path, metavar="FILE", help="a table with a column `text`")
    parser.add_argument("--tokenizer", help="folder or Hub id; otherwise trained on the texts")
    parser.add_argument("--rows", type=int, default=512, help="drawn at random for each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=32, help="of the pipeline")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    given = ((arguments.sst2, "sentence"), (arguments.imdb, "text"))
    data = {path: list(read_files([path]).data[column]) for path, column in given if path is not None}
    if not data:
        parser.error("give --sst2 or --imdb")
    quieten_libraries()
    torch.set_num_threads(arguments.threads)
    os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)  # of the tokenizer
    # Its default, said aloud: a pipeline turns it off for the whole process, and with it ours.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"

    with tempfile.TemporaryDirectory() as folder:
        save_model(
            Path(folder), arguments.layers, arguments.tokenizer, [text for texts in data.values() for text in texts]
        )
        predictor = load_predictor(folder)
        device = predictor.accelerator.device
        theirs = pipeline("text-classification", folder, device=device, top_k=None)
    print(
        f"{machine(device)}\n\nDistilBERT, {arguments.layers} × 768, {len(predictor.tokenizer):,} word pieces, "
        f"{theirs.model.dtype}; medians of {arguments.rounds} rounds, measured in turn"
    )
    differences = []
    for path, texts in data.items():
        draws = [np.random.default_rng([42, number]) for number in range(arguments.rounds)]
        size = min(arguments.rows, len(texts))
        rounds = [[texts[i] for i in draw.choice(len(texts), size, replace=False)] for draw in draws]
        encoded = [predictor.tokenizer(drawn, truncation=True, max_length=MAX_LENGTH)["input_ids"] for drawn in rounds]
        lengths = np.asarray([[len(ids) for ids in drawn] for drawn in encoded])
        print(
            f"\n**{path.name}**: {size} of {len(texts):,} rows a round, {lengths.mean():.0f} tokens on average, "
            f"{np.mean(lengths == MAX_LENGTH):.1%} of them {MAX_LENGTH} long;",
            end=" ",
            flush=True,
        )
        measured = measure(labellings(predictor, theirs, arguments.batch_size), rounds, predictor.label_names)
        print_table(measured, rounds, lengths.sum(-1).tolist())
        differences += [way.difference for way in measured.values()]
    if max(differences) > TOLERANCE:
        raise SystemExit(f"probabilities differ by more than {TOLERANCE:.0e}: not the same computation")


if __name__ == "__main__":
    main()
