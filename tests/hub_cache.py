"""A cache of the Hub as a download would have left it."""

from __future__ import annotations

from pathlib import Path

from support import reviews, write_csv

COMMIT = {"model": "a" * 40, "dataset": "b" * 40}


def snapshot(cache: Path, kind: str, repository: str) -> Path:
    """An empty snapshot of `main` in a Hub cache; files go into it."""
    home = cache / "hub" / f"{kind}s--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT[kind], encoding="utf-8")
    folder = home / "snapshots" / COMMIT[kind]
    folder.mkdir(parents=True)
    return folder


def write_dataset(folder: Path) -> None:
    """60 reviews to train on and 20 to validate, as the configuration `food`."""
    write_csv(folder / "train.csv", reviews(60))
    write_csv(folder / "validation.csv", reviews(20, seed=1))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: food\n  data_files:\n  - split: train\n    path: train.csv\n"
        "  - split: validation\n    path: validation.csv\n---\n",
        encoding="utf-8",
    )


def write_checkpoint(folder: Path, *, seed: int = 0) -> None:
    """A BERT of two layers with random weights, and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    from accel_trainer.recipe import TokenizerTraining
    from accel_trainer.tokenization import train_word_pieces

    tokenizer = train_word_pieces(TokenizerTraining(vocab_size=200), [text for text, _ in reviews(60)])
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    torch.manual_seed(seed)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
