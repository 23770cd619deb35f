"""What the tests share: no network, caches of their own, one thread, little tables and tiny recipes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update({"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from support import reviews, tiny_recipe, write_csv

settings.register_profile("busy machines", deadline=None)  # no test asserts a time
settings.load_profile("busy machines")


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests out of the user's caches, and each worker's tokens apart."""
    import datasets

    cache = tmp_path_factory.getbasetemp() / "datasets-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))


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
