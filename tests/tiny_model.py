"""A tiny classifier of random weights with a tokenizer, in a folder; no training."""

from __future__ import annotations

from pathlib import Path

import torch
from support import reviews
from transformers import BertConfig, BertForSequenceClassification

from accel_trainer.recipe import TokenizerTraining
from accel_trainer.tokenization import train_word_pieces


def write_model(folder: Path, seed: int = 0) -> Path:
    """Two labels, whose probabilities differ from text to text."""
    tokenizer = train_word_pieces(TokenizerTraining(vocab_size=200), [text for text, _ in reviews(90)])
    tokenizer.model_max_length = 16
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.5,
        id2label={0: "bad", 1: "good"},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config).eval()
        with torch.no_grad():
            encoded = tokenizer([text for text, _ in reviews(90)], truncation=True, padding=True, return_tensors="pt")
            model.classifier.bias -= model(**encoded).logits.mean(0)  # or every text might get the same label
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
