"""A million rows labelled by two processes, one of which is killed twice, and the other once: is every row there, once, in order?

    PYTHONPATH=tests python benchmarks/bulk_prediction.py --folder /tmp/bulk

Short texts and a tiny model, so that what is measured is all but the model: reading, claiming, writing, dying and going on.
Half of the rows are in Parquet files of several row groups, a fifth each in CSV and compressed JSONL, a tenth in one row group.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import BertConfig, BertForSequenceClassification

from accel_trainer.predict import load_predictor, predict_file
from accel_trainer.recipe import TokenizerTraining
from accel_trainer.tokenization import train_word_pieces

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
CONFIG = ROOT / "accelerate_configs" / "multi_cpu.yaml"
WORDS = [
    "the",
    "soup",
    "was",
    "good",
    "bad",
    "cold",
    "fresh",
    "noodles",
    "came",
    "late",
    "面",
    "汤",
    "好吃",
    "难吃",
    "太慢",
]
SHARDS = 10


def text_of(row: int) -> str:
    draw = np.random.default_rng([42, row])
    return " ".join(WORDS[i] for i in draw.integers(0, len(WORDS), draw.integers(3, 9)))


def make_inputs(folder: Path, rows: int) -> None:
    """Ten shards whose rows are numbered in the order that they will be read in."""
    folder.mkdir(parents=True)
    each = rows // SHARDS
    for shard in range(SHARDS):
        ids = range(shard * each, (shard + 1) * each)
        texts = [text_of(row) for row in ids]
        path = folder / f"shard-{shard}"
        if shard < 6:
            table = pa.table({"id": list(map(str, ids)), "text": texts})  # CSV has no numbers
            pq.write_table(table, path.with_suffix(".parquet"), row_group_size=each if shard == 5 else each // 4)
        elif shard < 8:
            with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["id", "text"])
                writer.writerows(zip(ids, texts, strict=True))
        else:
            with gzip.open(f"{path}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps({"id": str(i), "text": t}) + "\n" for i, t in zip(ids, texts, strict=True))


def make_model(folder: Path) -> None:
    torch.manual_seed(42)
    texts = [text_of(row) for row in range(1000)]
    section = TokenizerTraining(vocab_size=200)
    tokenizer = train_word_pieces(section, texts)
    tokenizer.model_max_length = 32
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,  # or every probability would be near 1/2, and equal ones would say little
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def workers(launcher: int) -> list[int]:
    """Process ids of the launcher's children, by rank."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == launcher:
                variables = (entry / "environ").read_bytes().split(b"\0")
                ranks = [int(variable[5:]) for variable in variables if variable.startswith(b"RANK=")]
                found += [(rank, int(entry.name)) for rank in ranks]
    return [process for _, process in sorted(found)]


def peak_megabytes(process: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


def parts(output: Path) -> dict[Path, int]:
    """Finished parts and when they were written."""
    return {path: path.stat().st_mtime_ns for path in output.glob("*/part-*.parquet")}


def launch(folder: Path, output: Path, kill: tuple[int, int] | None) -> tuple[int, float, float]:
    """Launch two processes; with `kill` = (rank, parts), kill that one when so many parts are there.

    Returns:
        exit code, seconds, and the most megabytes that a process took.
    """
    command = [
        *LAUNCHER,
        str(CONFIG),
        "-m",
        "accel_trainer.predict",
        "model",
        "--input",
        "in/*",
        "--output",
        output.name,
    ]
    started, most = time.perf_counter(), 0.0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            ranked = workers(process.pid)
            most = max([most, *map(peak_megabytes, ranked)])
            if kill is not None and len(ranked) == 2 and len(parts(output)) >= kill[1]:
                os.kill(ranked[kill[0]], signal.SIGKILL)
                kill = None
            time.sleep(0.1)
    return process.returncode, time.perf_counter() - started, most


def written(output: Path) -> Iterator[pa.Table]:
    for path in sorted(map(str, output.glob("*/part-*.parquet"))):
        yield pq.read_table(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for inputs, model and results; made anew")
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    folder, rows = arguments.folder.absolute(), arguments.rows // SHARDS * SHARDS
    shutil.rmtree(folder, ignore_errors=True)
    make_inputs(folder / "in", rows)
    make_model(folder / "model")
    output = folder / "out"
    total = rows // 20_000
    print("| launch | exit code | seconds | files there | of them written before | most memory of a process |")
    print("|---|---:|---:|---:|---:|---:|")
    before: dict[Path, int] = {}
    kills: list[tuple[str, tuple[int, int] | None]] = [
        ("process 1 killed", (1, total // 5)),
        ("process 1 killed again", (1, 2 * total // 5)),
        ("process 0 killed", (0, 3 * total // 5)),
        ("undisturbed", None),
        ("once more", None),
    ]
    for name, kill in kills:
        code, seconds, most = launch(folder, output, kill)
        now = parts(output)
        kept = sum(now.get(path) == at for path, at in before.items())
        print(f"| {name} | {code} | {seconds:.0f} | {len(now)} | {kept} | {most:.0f} MB |", flush=True)
        assert kept == len(before), "a finished part was written again"
        assert (code == 0) == (kill is None)
        before = now
    row = 0
    for table in written(output):
        ids = np.asarray(table.column("id").to_pylist()).astype(np.int64)
        assert np.array_equal(ids, np.arange(row, row + len(ids))), (
            f"rows are missing, doubled or out of order near {row}"
        )
        assert table.column("text").to_pylist() == [text_of(i) for i in ids]
        row += len(ids)
    assert row == rows
    print(f"\n{row:,} rows, each once, in order, with their texts")

    predictor = load_predictor(str(folder / "model"))
    started = time.perf_counter()
    shard = folder / "in" / "shard-1.parquet"
    predict_file(predictor, shard, folder / "one.parquet", "text")
    seconds = time.perf_counter() - started
    alone = pq.read_table(folder / "one.parquet")
    together = pa.concat_tables([pq.read_table(path) for path in sorted((output / "shard-1").iterdir())])
    assert alone.column("prediction").to_pylist() == together.column("prediction").to_pylist()
    shares = [np.asarray([list(r.values()) for r in t.column("probabilities").to_pylist()]) for t in (alone, together)]
    print(
        f"{shard.name} by one process into one file: {len(alone) / seconds:,.0f} rows/s, the same labels, probabilities (spread "
        f"{shares[0].std(0).max():.2f}) differ by {np.abs(shares[0] - shares[1]).max():.0e} at most"
    )


if __name__ == "__main__":
    main()
