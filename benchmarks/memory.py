"""Print how much memory training takes beside what is expected of it, for the shapes of common checkpoints.

python benchmarks/memory.py [MODEL...] [--tokens 512,2048,4096] [--steps 3] [--quick]

Each line is a fresh process that takes real steps of the trainer on random weights and texts of random words, evaluates and
saves. Measured is the highest resident size of the process above its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SMALL = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
TINY = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
# The architectures of the checkpoints of these names; all else is transformers' default.
MODELS: dict[str, dict[str, Any]] = {
    "quickstart": {"model_type": "bert", "vocab_size": 4000, **TINY},
    "electra-small": {"model_type": "electra", **SMALL},
    "distilbert-base": {"model_type": "distilbert"},
    "bert-base": {"model_type": "bert"},
    "roberta-base": {"model_type": "roberta", "max_position_embeddings": 514},
    "albert-base": {"model_type": "albert", "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "modernbert-base": {"model_type": "modernbert"},
    "bert-large": {"model_type": "bert", **LARGE},
}
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")
LONGEST = 512
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """What one process trains."""

    model: str
    tokens: int  # of a micro-batch
    layout: str = "packed"
    attention_dropout: float = 0.0
    gradient_checkpointing: bool = False
    micro_batches: int = 2  # of a step, about
    optim: str = "adamw_torch"

    def __str__(self) -> str:
        special = [f"attention dropout {self.attention_dropout}"] if self.attention_dropout else []
        special += ["gradient checkpointing"] if self.gradient_checkpointing else []
        special += [self.optim] if self.optim != "adamw_torch" else []
        special += ["one micro-batch a step"] if self.micro_batches == 1 else []
        return f"{self.model} | {self.tokens:,} | {self.layout} | {', '.join(special)}"


def cases(models: Sequence[str], budgets: Sequence[int], *, quick: bool) -> Iterator[Case]:
    """Every budget in the default way, and one budget in every other."""
    for model in models:
        for tokens in budgets:
            yield Case(model, tokens)
        if quick:
            continue
        tokens = 2048
        yield Case(model, tokens, layout="padded")
        yield Case(model, tokens, attention_dropout=0.1)
        yield Case(model, tokens, layout="padded", attention_dropout=0.1)
        yield Case(model, tokens, micro_batches=1)
        if model != "albert-base":  # which refuses it
            yield Case(model, tokens, gradient_checkpointing=True)
        for optim in ("adafactor", "sgd"):
            yield Case(model, tokens, optim=optim)


def resident(kind: str) -> int:
    """Return the resident size of this process in bytes: `VmRSS` now, `VmHWM` at its highest."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def measure(case: Case, steps: int) -> dict[str, int]:
    """Train in this process; return bytes, measured and expected."""
    import datasets
    import numpy as np
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from accel_trainer import hardware, memory, scoring, train
    from accel_trainer.data import Rows, Split
    from accel_trainer.inputs import Inputs
    from accel_trainer.recipe import Recipe, TokenizerTraining
    from accel_trainer.run import prepare, save
    from accel_trainer.run_folder import RunFolder
    from accel_trainer.signals import StopRequest
    from accel_trainer.tokenization import Tokens, train_word_pieces

    random = np.random.default_rng(0)

    def split_of(role: str, rows: int) -> Split:
        lengths = np.clip(np.rint(random.lognormal(np.log(120), 0.7, rows)), 8, LONGEST).astype(np.int64)
        table = datasets.Dataset.from_dict({"text": ["a text"] * rows})
        columns: Any = {"input_ids": [random.integers(5, 1000, length).tolist() for length in lengths]}
        place = f"row {{}} of {role}".format
        return Split(
            Rows(role, table, np.zeros(rows, dtype=np.int64), place, sha256=role), Tokens(columns, lengths, 0, 0)
        )

    batch = max(1, round(case.tokens * case.micro_batches * 0.9 / 140))
    splits = {"train": split_of("train", batch * steps), "validation": split_of("validation", 64)}
    tokenizer = train_word_pieces(TokenizerTraining(vocab_size=60), ["a text"])
    recipe = Recipe.model_validate(
        {
            "dataset": {"path": "none.csv", "splits": {"train": "train"}},
            "model": {"checkpoint": "none"},
            "training": {
                "global_batch_size": batch,
                "max_steps": steps,
                "learning_rate": 1e-5,
                "optim": case.optim,
            },
        }
    )
    accelerator = hardware.start_accelerator()
    config = AutoConfig.for_model(**MODELS[case.model], num_labels=2)
    for name in ATTENTION_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, case.attention_dropout)
    before = resident("VmRSS")
    model = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    inputs = Inputs(recipe, splits, ["a", "b"], tokenizer, model, "", {}, [])
    with tempfile.TemporaryDirectory() as place:
        run = prepare(
            accelerator,
            inputs,
            RunFolder(Path(place)),
            layout=case.layout,
            max_tokens_per_device=case.tokens,
            gradient_checkpointing=case.gradient_checkpointing,
        )
        needs = memory.training_needs(accelerator.unwrap_model(run.model), case.optim, LONGEST, packed=run.packed)
        batches = []
        for step in range(steps):
            rows, divided = run.feed.divide(step, run.max_tokens)
            costs = splits["train"].tokens.costs(packed=run.packed)[rows]
            batches.append([memory.Extent.of(costs[part.indices], packed=run.packed) for part in divided[0]])
            train.training_step(run, step)
        scoring.logits_of(run, splits["validation"], StopRequest())
        save(run)
        measured = resident("VmHWM") - before
    activations = max(needs.activations(part) for parts in batches for part in parts)
    return {"measured": measured, "expected": needs.state + activations, "activations": activations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--tokens", default="512,2048,4096", help="token budgets of a micro-batch")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="no more than the budgets")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(Case(**json.loads(arguments.case)), arguments.steps)))
        return
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate"))
    print(
        f"{platform.libc_ver()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}, {arguments.steps} steps"
    )
    print("| model | tokens | layout | | measured, MiB | expected | |\n|---|---:|---|---|---:|---:|---:|")
    for case in cases(
        arguments.models or list(MODELS), [int(tokens) for tokens in arguments.tokens.split(",")], quick=arguments.quick
    ):
        command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--steps", str(arguments.steps)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
        if done.returncode != 0:
            raise SystemExit(f"{case}\n{done.stderr}")
        found = json.loads(done.stdout.splitlines()[-1])
        measured, expected = found["measured"], found["expected"]
        print(
            f"| {case} | {measured / MIB:,.0f} | {expected / MIB:,.0f} | {expected / measured - 1:+.0%} |", flush=True
        )


if __name__ == "__main__":
    main()
