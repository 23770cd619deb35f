"""Print how fast we train beside `transformers.Trainer`, the loop of Accelerate's example and a bare loop over our model.

python benchmarks/training.py --sst2 FILE.tsv --imdb FILE.parquet --waimai FILE.csv --tokenizer FOLDER --threads 2

SST-2 has columns label and sentence, IMDB label and text, waimai label and review. DistilBERT of its full width, from its
config; times do not depend on the weights. All that is compared trains in one process and takes turns in blocks of
`--steps` optimizer steps; the first block of each warms up. In a round all train on the same examples, in the same global
batches: AdamW, fused; a linear schedule; gradients clipped to 1; hidden dropout 0.1, before the head 0.2, in attention 0.

- packed, padded: `accel_trainer.train.training_step` in its two layouts; the tokens are in memory
- Trainer, dynamic: that of transformers, batches padded to their longest; `model.accepts_loss_kwargs = False`, so that its
  loss is scaled as ours is
- Trainer, grouped: the same over batches that `group_by_length` makes: all examples of the rounds go through its function
  in mega-batches of 50 batches, as in a long run, and the batches are dealt out to the rounds in turn. A round of its own
  has other examples than a round of the others, all rounds together have the same: its time is taken per token, and the
  total is the number to read
- Trainer, max_length: the same as dynamic, all batches padded to `max_length`
- Trainer, as it comes: the same as dynamic, with DistilBERT's own attention dropout, 0.1, and its own loss scale
- Accelerate loop: `examples/complete_nlp_example.py`, written anew: a DataLoader that pads to the longest,
  `accelerator.prepare`, backward, step, scheduler. It clips nothing, as there; AdamW is fused to its favour
- bare packed loop: the model, optimizer and micro-batches of `packed` in the plainest loop of torch, all tensors made
  beforehand: what is over it is the cost of the framework

Neither side logs, evaluates or saves. Trainer's time is that of its epoch, from the moment before its loader is started;
what `train()` does before and after is left out. Its rows are lists in memory, which is the fastest that it can be given.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from dropout import machine
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from accel_trainer import hardware, order, train
from accel_trainer.inputs import Inputs, read_inputs
from accel_trainer.recipe import Recipe
from accel_trainer.run import Run, prepare
from accel_trainer.run_folder import RunFolder
from accel_trainer.tracking import quieten_libraries

PACKED = "packed"  # what the others are compared with
MEGA_BATCHES = 50  # batches that `group_by_length` sorts together in any dataset of 200 batches and more
SEED = 42
LEARNING_RATE = 2e-5
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Task:
    """A dataset and how it is trained on."""

    name: str
    text_column: str
    batch: int
    max_length: int
    pads_to_max_length: bool = False  # as a well-known way of training on it does


TASKS = {
    "sst2": Task("SST-2", "sentence", batch=32, max_length=128),
    "imdb": Task("IMDB", "text", batch=16, max_length=512),
    "waimai": Task("waimai", "review", batch=16, max_length=512, pads_to_max_length=True),
}


@dataclass(frozen=True)
class Block:
    """Optimizer steps that are taken in one go."""

    first_step: int
    batches: Sequence[order.Rows]  # rows of the training split of each step

    @property
    def rows(self) -> list[int]:
        return [int(row) for batch in self.batches for row in batch]


@dataclass(frozen=True)
class Done:
    """What a block took."""

    seconds: float
    positions: int  # computed, padding included


@dataclass
class Contender:
    """One way of training, and what was measured of it."""

    name: str
    blocks: Sequence[Block]  # the first warms up
    advance: Callable[[Block], Done]
    done: list[Done] = field(default_factory=list)  # by round


@dataclass(frozen=True)
class Bench:
    """What all contenders for a task share."""

    task: Task
    inputs: Inputs
    blocks: Sequence[Block]
    folder: Path

    @property
    def lengths(self) -> order.Rows:
        return self.inputs.splits["train"].tokens.lengths

    def tokens(self, block: Block) -> int:
        """Count the real tokens of a block."""
        return int(self.lengths[block.rows].sum())

    def examples(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return rows as a tokenizer makes them, with their labels."""
        split = self.inputs.splits["train"]
        columns = split.tokens.columns.items()
        return [
            {
                **{name: list(map(int, column[row])) for name, column in columns},
                "attention_mask": [1] * int(self.lengths[row]),
                "labels": int(split.rows.labels[row]),
            }
            for row in rows
        ]


def synchronise() -> None:
    """Wait until the device has done what it was told."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


# What is read.


def recipe_of(task: Task, data: Path, tokenizer: str | None, layers: int, width: int, max_steps: int) -> Recipe:
    """Return the recipe of a DistilBERT on some data."""
    sizes = {"n_layers": layers, "dim": width, "n_heads": max(1, width // 64), "hidden_dim": 4 * width}
    words = {"tokenizer": tokenizer} if tokenizer else {"train_tokenizer": {"vocab_size": 30522}}
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.0, "classifier_dropout": 0.2}
    return Recipe.model_validate(
        {
            "dataset": {
                "data_files": {"train": str(data)},
                "splits": {"train": "train"},
                "text_column": task.text_column,
                "max_length": task.max_length,
            },
            "model": {"from_config": {"model_type": "distilbert", **sizes}, **words, **dropout},
            "training": {
                "seed": SEED,
                "global_batch_size": task.batch,
                "max_steps": max_steps,
                "learning_rate": LEARNING_RATE,
                "max_grad_norm": MAX_GRAD_NORM,
            },
            "evaluation": {"eval_strategy": "no"},
            "saving": {"save_strategy": "no"},
        }
    )


def blocks_of(rows: int, batch: int, rounds: int, steps: int) -> list[Block]:
    """Return the blocks of all rounds, and one more to warm up, within one pass over the data."""
    if (rounds + 1) * steps > rows // batch:
        raise SystemExit(f"{rows} rows are {rows // batch} batches of {batch}; give fewer --rounds or --steps")
    batches = [
        order.global_batch(step, seed=SEED, num_examples=rows, global_batch_size=batch)
        for step in range((rounds + 1) * steps)
    ]
    return [Block(start, batches[start : start + steps]) for start in range(0, len(batches), steps)]


def read_bench(task: Task, data: Path, folder: Path, arguments: argparse.Namespace) -> Bench:
    """Read the data of a task and lay out its blocks."""
    steps = (arguments.rounds + 1) * arguments.steps
    recipe = recipe_of(task, data, arguments.tokenizer, arguments.layers, arguments.width, max_steps=2 * steps)
    inputs = read_inputs(recipe)
    blocks = blocks_of(len(inputs.splits["train"]), task.batch, arguments.rounds, arguments.steps)
    return Bench(task, inputs, blocks, folder)


def stock_model(inputs: Inputs, attention_dropout: float = 0.0) -> PreTrainedModel:
    """Return a new model as transformers has it, in training mode."""
    config = copy.deepcopy(inputs.model.config)
    config.attention_dropout = attention_dropout
    torch.manual_seed(SEED)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation="sdpa"
    )
    model.train()
    return model


# The contenders.


def our_run(bench: Bench, layout: str) -> Run:
    """Prepare a run of ours, with a model of its own."""
    inputs = replace(bench.inputs, model=stock_model(bench.inputs))
    run = prepare(hardware.start_accelerator(), inputs, RunFolder(bench.folder / layout), layout=layout)
    run.model.train()
    return run


def ours(run: Run, block: Block) -> Done:
    """Train as `train.fit` does between two logged lines."""
    started = time.perf_counter()
    loss_sum, positions = torch.zeros((), device=run.accelerator.device), 0
    for step, _ in enumerate(block.batches, start=block.first_step):
        done = train.training_step(run, step)
        loss_sum = loss_sum + done.loss_sum
        positions += done.work.positions
    synchronise()
    return Done(time.perf_counter() - started, positions)


def bare(run: Run, block: Block) -> Done:
    """Train the model of a run by nothing but torch."""
    device = run.accelerator.device
    numbers = range(block.first_step, block.first_step + len(block.batches))
    steps = [[part.on(device) for part in run.feed.work(step, run.max_tokens).micro_batches] for step in numbers]
    optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    parameters = list(run.model.parameters())
    synchronise()
    started = time.perf_counter()
    for micro_batches, rows in zip(steps, block.batches, strict=True):
        for part in micro_batches:
            logits = run.model(part.batch.inputs, part.example_keys, part.batch.packing)
            loss = nn.functional.cross_entropy(logits.float(), part.labels, reduction="sum") / len(rows)
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        run.scheduler.step()
        optimizer.zero_grad()
    synchronise()
    seconds = time.perf_counter() - started
    return Done(seconds, int(run.inputs.splits["train"].tokens.lengths[block.rows].sum()))


class EpochClock(TrainerCallback):
    """Times the epochs of a Trainer."""

    started = 0.0
    seconds = 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        synchronise()
        self.seconds = time.perf_counter() - self.started


def padded_positions(bench: Bench, block: Block, width: int | None) -> int:
    """Count what is computed if each batch is padded to its longest, or to `width`."""
    return sum(len(rows) * (width or int(bench.lengths[rows].max())) for rows in block.batches)


def trainer(
    bench: Bench, *, attention_dropout: float = 0.0, width: int | None = None, divides: bool = False
) -> Callable[[Block], Done]:
    """Return transformers' Trainer as something that advances by blocks.

    Args:
        bench: what to train on.
        attention_dropout: of its model.
        width: what batches are padded to; None: their longest.
        divides: leave its loss scale as it comes.
    """
    tokenizer: Any = bench.inputs.tokenizer
    model: Any = stock_model(bench.inputs, attention_dropout)
    if not divides:
        model.accepts_loss_kwargs = False
    settings: dict[str, Any] = {
        "per_device_train_batch_size": bench.task.batch,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": MAX_GRAD_NORM,
        "train_sampling_strategy": "sequential",  # the batches of a block, as they stand in it
        "bf16": os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16",
        **{"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True},
    }
    collate = DataCollatorWithPadding(tokenizer, padding="max_length" if width else True, max_length=width)
    arguments = TrainingArguments(str(bench.folder / "trainer"), **settings)
    clock = EpochClock()
    peer = Trainer(model, arguments, collate, processing_class=tokenizer, callbacks=[clock])
    peer.remove_callback(PrinterCallback)

    def advance(block: Block) -> Done:
        peer.train_dataset = bench.examples(block.rows)
        peer.train()
        assert peer.state.global_step == len(block.batches)
        return Done(clock.seconds, padded_positions(bench, block, width))

    return advance


def accelerate_loop(bench: Bench) -> Callable[[Block], Done]:
    """Return the loop of Accelerate's example as something that advances by blocks."""
    accelerator = Accelerator()
    bare_model = stock_model(bench.inputs)
    adamw = torch.optim.AdamW(bare_model.parameters(), lr=LEARNING_RATE, fused=True)
    steps = sum(len(block.batches) for block in bench.blocks)
    schedule = get_scheduler("linear", adamw, num_warmup_steps=0, num_training_steps=steps)
    model, optimizer, scheduler = accelerator.prepare(bare_model, adamw, schedule)
    collate = DataCollatorWithPadding(bench.inputs.tokenizer)

    def advance(block: Block) -> Done:
        dataset: Any = bench.examples(block.rows)
        loader = accelerator.prepare(DataLoader(dataset, batch_size=bench.task.batch, collate_fn=collate))
        started = time.perf_counter()
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        synchronise()
        return Done(time.perf_counter() - started, padded_positions(bench, block, None))

    return advance


def grouped(bench: Bench) -> list[Block]:
    """Return blocks of the same examples in batches of similar length, as Trainer's `group_by_length` makes them."""
    warm_up, *rounds = bench.blocks
    rows = np.asarray([row for block in rounds for row in block.rows])
    generator = torch.Generator().manual_seed(SEED)
    grouping: Any = get_length_grouped_indices
    ordered = rows[grouping(bench.lengths[rows].tolist(), bench.task.batch, MEGA_BATCHES, generator)]
    batches = ordered.reshape(-1, bench.task.batch)
    return [warm_up, *(Block(0, batches[number :: len(rounds)]) for number in range(len(rounds)))]


def contenders(bench: Bench, *, max_length: bool) -> list[Contender]:
    """Make everything that is compared."""
    peers = [  # first, because TrainingArguments forget the Accelerators that were made before
        Contender("Trainer, dynamic", bench.blocks, trainer(bench)),
        Contender("Trainer, grouped", grouped(bench), trainer(bench)),
        *(
            [Contender("Trainer, max_length", bench.blocks, trainer(bench, width=bench.task.max_length))]
            if max_length
            else []
        ),
        Contender("Trainer, as it comes", bench.blocks, trainer(bench, attention_dropout=0.1, divides=True)),
        Contender("Accelerate loop", bench.blocks, accelerate_loop(bench)),
    ]
    packed, padded = our_run(bench, "packed"), our_run(bench, "padded")
    return [
        Contender(PACKED, bench.blocks, partial(ours, packed)),
        Contender("padded", bench.blocks, partial(ours, padded)),
        *peers,
        Contender("bare packed loop", bench.blocks, partial(bare, packed)),
    ]


def take_turns(entered: Sequence[Contender]) -> None:
    """Let all advance by their blocks in turn, a different one first in each round."""
    for number in range(len(entered[0].blocks)):
        first = number % len(entered)
        for contender in (*entered[first:], *entered[:first]):
            gc.collect()  # nobody pays for another's garbage
            done = contender.advance(contender.blocks[number])
            if number:
                contender.done.append(done)
            print(f"{number}/{len(entered[0].blocks) - 1} {contender.name}: {done.seconds:.2f} s", file=sys.stderr)


# What is printed.


def table(bench: Bench, entered: Sequence[Contender]) -> Iterator[str]:
    """Yield the lines of a task's table."""
    yield "| | examples/s | real tokens/s | computed per real token | packed is faster by (median, min–max) | in total |"
    yield "|---|---:|---:|---:|---:|---:|"
    per_token = {
        c.name: [d.seconds / bench.tokens(b) for d, b in zip(c.done, c.blocks[1:], strict=True)] for c in entered
    }
    for contender in entered:
        tokens = sum(map(bench.tokens, contender.blocks[1:]))
        examples = sum(len(block.rows) for block in contender.blocks[1:])
        assert sorted(r for b in contender.blocks for r in b.rows) == sorted(r for b in bench.blocks for r in b.rows)
        seconds = sum(done.seconds for done in contender.done)
        ratios = [a / b for a, b in zip(per_token[contender.name], per_token[PACKED], strict=True)]
        rate = 1 / statistics.median(per_token[contender.name])
        cells = [
            contender.name,
            f"{rate * examples / tokens:.2f}",
            f"{rate:.0f}",
            f"{sum(done.positions for done in contender.done) / tokens:.3f}",
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})",
            f"{seconds / sum(done.seconds for done in entered[0].done):.3f}",
        ]
        yield f"| {' | '.join(cells)} |"


def describe(bench: Bench, arguments: argparse.Namespace) -> str:
    """Name what a task's numbers were measured on."""
    rows = [row for block in bench.blocks[1:] for row in block.rows]
    taken = bench.lengths[rows]
    parameters = sum(parameter.numel() for parameter in bench.inputs.model.parameters())
    return (
        f"**{bench.task.name}**: batch {bench.task.batch}, max_length {bench.task.max_length}; {arguments.rounds} rounds of "
        f"{arguments.steps} steps, {len(rows):,} examples of {taken.mean():.1f} tokens on average, {taken.max()} at most; "
        f"DistilBERT of {arguments.layers} × {arguments.width}, vocabulary of {len(bench.inputs.tokenizer):,}, "
        f"{parameters / 1e6:.1f} million parameters"
    )


def heading() -> str:
    """Name the machine, the versions and the day."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    where = f"{torch.cuda.get_device_name()}, " if device is not None and device.type == "cuda" else ""
    others = ", ".join(f"{package} {version(package)}" for package in ("accelerate", "tokenizers", "numpy"))
    return f"{date.today()} · {where}{machine()}, {others} · {'float32' if precision == 'no' else precision}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what this and `limit.py` ask for."""
    for key, task in TASKS.items():
        columns = f"table with columns label and {task.text_column}"
        parser.add_argument(f"--{key}", type=Path, metavar="FILE", help=f"{task.name}: {columns}")
    parser.add_argument("--tokenizer", help="folder or Hub id; left out: a WordPiece vocabulary is trained on the data")
    parser.add_argument("--layers", type=int, default=3, help="DistilBERT has 6")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a block")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def benches(arguments: argparse.Namespace) -> Iterator[Bench]:
    """Read the tasks that files were given for, one after the other."""
    torch.set_num_threads(arguments.threads)
    quieten_libraries()
    for key, task in TASKS.items():
        data = getattr(arguments, key)
        if data is not None:
            with tempfile.TemporaryDirectory() as folder:
                yield read_bench(task, data.absolute(), Path(folder), arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument(
        "--max_length", action="store_true", help="pad to max_length in every task, not on waimai alone"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of those that packed is compared with")
    arguments = parser.parse_args()
    for bench in benches(arguments):
        entered = contenders(bench, max_length=arguments.max_length or bench.task.pads_to_max_length)
        if arguments.only:
            entered = [contender for contender in entered if contender.name in (PACKED, *arguments.only)]
        take_turns(entered)
        print(f"{heading()}\n\n{describe(bench, arguments)}\n")
        print("\n".join(table(bench, entered)), flush=True)
        print()
        del entered
        gc.collect()


if __name__ == "__main__":
    main()
