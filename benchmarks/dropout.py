"""Print what keyed dropout costs in training beside torch's own: one layer, and whole steps of a small BERT.

python benchmarks/dropout.py --threads 2
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel
from transformers import logging as transformers_logging

from accel_trainer import dropout
from accel_trainer.classifier import Classifier

Step = Callable[[int], object]  # one pass forward and backward, as optimizer step `number`

KEYED = "keyed"  # ours, in every table
SHAPES = ((16, 128), (4, 512))  # examples, tokens of each


def machine() -> str:
    """Name the CPU and the versions that the times belong to."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return (
        f"{cpu}, {torch.get_num_threads()} thread{'s'[: torch.get_num_threads() > 1]}, "
        f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}"
    )


def layer_steps(examples: int, tokens: int, features: int, p: float) -> dict[str, Step]:
    """Make one dropout layer of each kind; keys are made anew in each pass, as in training."""
    x = torch.randn(examples, tokens, features, requires_grad=True)
    above = torch.randn(examples, tokens, features)
    held = dropout.ForwardPass()
    ours = dropout.KeyedDropout(p, dropout.Site(held, "dropout"))
    theirs = nn.Dropout(p)
    rows = np.arange(examples)

    def keyed(number: int) -> None:
        x.grad = None
        held.begin(dropout.example_keys(rows, seed=42, step=number))
        ours(x).backward(above)

    def library(_: int) -> None:
        x.grad = None
        theirs(x).backward(above)

    return {KEYED: keyed, "`nn.Dropout`": library}


def bert(layers: int, width: int, hidden: float, attention: float, implementation: str) -> PreTrainedModel:
    """Make a stock classifier in training mode."""
    config = BertConfig(
        vocab_size=1000,  # few, so that embeddings, which no dropout touches, take little of the time
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        hidden_dropout_prob=hidden,
        attention_probs_dropout_prob=attention,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation=implementation
    )
    model.train()
    return model


def with_stock_layers(classifier: Classifier) -> Classifier:
    """Undo, for padded micro-batches, what is faster than the stock model for other reasons than dropout: the last layer."""
    for module in classifier.modules():
        module.__dict__.pop("forward", None)
    return classifier


def model_steps(
    models: Mapping[str, PreTrainedModel], classifier: Classifier, examples: int, tokens: int
) -> dict[str, Step]:
    """Make whole steps without the optimizer: logits, loss and gradients of one micro-batch without padding."""
    inputs = {
        "input_ids": torch.randint(5, 1000, (examples, tokens), generator=torch.Generator().manual_seed(0)),
        "attention_mask": torch.ones(examples, tokens, dtype=torch.int64),
    }
    labels = torch.arange(examples) % 2
    rows = np.arange(examples)

    def backward(module: nn.Module, logits: Tensor) -> None:
        nn.functional.cross_entropy(logits, labels).backward()
        module.zero_grad()

    def keyed(number: int) -> None:
        keys = dropout.example_keys(rows, seed=42, step=number)
        backward(classifier, classifier(inputs, keys))

    def stock(model: PreTrainedModel) -> Step:
        return lambda _: backward(model, model(**inputs).logits)

    return {KEYED: keyed, **{name: stock(model) for name, model in models.items()}}


def medians(steps: Mapping[str, Step], repeats: int) -> dict[str, float]:
    """Time every kind of step, in turn, so that a busy moment of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step(number)
            if number >= 2:  # the first ones warm up
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(measured) for name, measured in times.items()}


def print_rows(what: str, steps: Mapping[str, Step], repeats: int) -> None:
    """Print one row for each thing that keyed dropout is compared with."""
    measured = medians(steps, repeats)
    for name, seconds in measured.items():
        if name != KEYED:
            ours = measured[KEYED]
            print(
                f"| {what} | {1000 * ours:.1f} ms | {name} | {1000 * seconds:.1f} ms | {ours / seconds:.2f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="times that each step is measured, in turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=768)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]

    print(f"{machine()}; medians of {arguments.repeats}, measured in turn\n")
    print("| forward and backward | keyed | compared with | takes | keyed ÷ that |")
    print("|---|---|---|---|---|")
    layer = layer_steps(32, 128, arguments.width, 0.1)
    print_rows(f"one layer, 4,096 × {arguments.width} values, dropout 0.1", layer, 4 * arguments.repeats)
    for attention in (0.0, 0.1):
        kinds = {"sdpa": "stock, sdpa", "eager": "stock, eager attention"} if attention else {"sdpa": "stock, sdpa"}
        models = {
            name: bert(arguments.layers, arguments.width, 0.1, attention, implementation)
            for implementation, name in kinds.items()
        }
        models["stock, no dropout at all"] = bert(arguments.layers, arguments.width, 0.0, 0.0, "sdpa")
        classifier = with_stock_layers(Classifier(bert(arguments.layers, arguments.width, 0.1, attention, "sdpa")))
        for examples, tokens in SHAPES:
            what = f"BERT, {arguments.layers} × {arguments.width}, {examples} × {tokens} tokens, dropout 0.1"
            steps = model_steps(models, classifier, examples, tokens)
            print_rows(f"{what}, in attention {attention}", steps, arguments.repeats)


if __name__ == "__main__":
    main()
