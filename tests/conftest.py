"""What the tests share: no network, caches of their own, one thread, tiny random encoders and little tables."""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.update({"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

GOOD = ["good", "great", "tasty", "fresh", "warm", "好吃", "新鲜", "很快"]
BAD = ["bad", "awful", "cold", "stale", "late", "难吃", "太慢", "凉了"]
FILLER = ["the", "soup", "was", "and", "noodles", "came", "quite", "today", "面", "汤", "今天"]


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests out of the user's caches, and each worker's tokens apart."""
    import datasets

    cache = tmp_path_factory.getbasetemp() / "datasets-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))


def reviews(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """n (text, label) rows of 3 to 12 words whose label can be learnt."""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        label = draw.choice(["negative", "positive"])
        words = draw.choices(FILLER, k=draw.randint(2, 11)) + [draw.choice(GOOD if label == "positive" else BAD)]
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


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A CSV of 90 labelled reviews."""
    return write_csv(tmp_path / "reviews.csv", reviews(90))


@pytest.fixture
def write_recipe(tmp_path: Path, table: Path) -> Callable[..., Path]:
    """Writes a tiny recipe, with sections changed as asked, and gives its path."""
    import yaml

    def write(name: str = "tiny.yaml", **sections: dict[str, Any]) -> Path:
        path = tmp_path / name
        text = yaml.safe_dump(tiny_recipe(table, **sections), allow_unicode=True, sort_keys=False)
        path.write_text(text.replace("1.0e-03", "0.001"), encoding="utf-8")
        return path

    return write
