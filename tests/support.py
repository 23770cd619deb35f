"""Little tables of reviews and tiny recipes, for tests and for the programs that they start."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GOOD = ["good", "great", "tasty", "fresh", "warm", "好吃", "新鲜", "很快"]
BAD = ["bad", "awful", "cold", "stale", "late", "难吃", "太慢", "凉了"]
FILLER = ["the", "soup", "was", "and", "noodles", "came", "quite", "today", "面", "汤", "今天"]


def reviews(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """n (text, label) rows of 3 to 12 words whose label can be learnt."""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        label = draw.choice(["negative", "positive"])
        words = [*draw.choices(FILLER, k=draw.randint(2, 11)), draw.choice(GOOD if label == "positive" else BAD)]
        draw.shuffle(words)
        rows.append((" ".join(words) + f" {i}", label))
    return rows


def write_csv(path: Path, rows: Sequence[Sequence[Any]], header: Sequence[str] = ("text", "label")) -> Path:
    """A CSV file with a header."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def tiny_recipe(path: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe as plain data: a two-layer BERT of width 16 made from its config, 60 rows to train on."""
    values: dict[str, Any] = {
        "dataset": {
            "path": str(path),
            "splits": {"train": 60, "validation": 20, "test": 10},
            "labels": ["negative", "positive"],
            "max_length": 16,
        },
        "model": {
            "from_config": {
                "model_type": "bert",
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "max_position_embeddings": 16,
            },
            "train_tokenizer": {"vocab_size": 200},
        },
        "training": {"global_batch_size": 8, "num_train_epochs": 1, "learning_rate": 1e-3},
        "evaluation": {"metrics": ["accuracy", "f1"]},
        "tracking": {"logging_steps": 1},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return values
