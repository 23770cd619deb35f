"""The tokenizer, and the tokens it makes of a table: once, cached, and read without copying.

The tokenizer is the checkpoint's, another one, or a WordPiece vocabulary trained on the training split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from tokenizers import BertWordPieceTokenizer
from transformers import AutoTokenizer, BertTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from accel_trainer import batching
from accel_trainer.errors import CannotLoad, DataError, UserError
from accel_trainer.packing import Packing
from accel_trainer.recipe import ModelSection, TokenizerTraining
from accel_trainer.shapes import Shape, choose_shapes

TOKENS_FORMAT = 1  # part of the cache key; raised when the columns of the token cache change
# Families whose position ids start one past the padding id, so that they have fewer positions than their config says.
OFFSET_POSITIONS = frozenset(
    [
        "roberta",
        "xlm-roberta",
        "xlm-roberta-xl",
        "roberta-prelayernorm",
        "camembert",
        "mpnet",
        "xmod",
        "longformer",
        "data2vec-text",
    ]
)
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def load_tokenizer(
    section: ModelSection, training_texts: Iterable[str], *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer; `training_texts` are read only where a vocabulary is to be trained.

    Raises:
        UserError: it cannot be read, or has no padding token.
    """
    if section.train_tokenizer is not None:
        return train_word_pieces(section.train_tokenizer, list(training_texts))
    name, revision, key = (
        (section.tokenizer, section.tokenizer_revision, "model.tokenizer")
        if section.tokenizer
        else (section.checkpoint, section.revision, "model.checkpoint")
    )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise CannotLoad(key, name, error) from error
    if tokenizer.pad_token_id is None:
        raise UserError(f"{key}: the tokenizer of {name!r} has no padding token; use one of an encoder such as BERT")
    return tokenizer


def train_word_pieces(section: TokenizerTraining, texts: list[str]) -> PreTrainedTokenizerBase:
    """A BERT tokenizer whose vocabulary is a function of the texts' words alone.

    The library breaks ties between equally frequent pairs by token id, and hands out ids to continuation characters
    in the order of a randomly seeded hash map: three runs gave three vocabularies. Naming those characters beforehand,
    sorted, takes the chance out of it. Every character of the texts is a piece, even where that exceeds `vocab_size`.
    """
    trainer = BertWordPieceTokenizer(lowercase=section.lowercase)
    continuations: set[str] = set()
    for text in texts:
        for word, _ in trainer.pre_tokenizer.pre_tokenize_str(trainer.normalizer.normalize_str(text)):
            continuations.update(word[1:])
    trainer.train_from_iterator(
        texts,
        vocab_size=section.vocab_size,
        min_frequency=section.min_frequency,
        limit_alphabet=2**31,  # what a limit drops among equally rare characters is chance too
        show_progress=False,
        special_tokens=SPECIAL_TOKENS + [f"##{character}" for character in sorted(continuations)],
    )
    tokenizer: PreTrainedTokenizerBase = BertTokenizer(vocab=trainer.get_vocab(), do_lower_case=section.lowercase)
    return tokenizer


def longest_input(max_length: int | None, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int:
    """Tokens of the longest input: the recipe's `max_length`, or else what tokenizer and model can take.

    Raises:
        UserError: the recipe asks for more than the model has positions for.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in OFFSET_POSITIONS:
        positions -= (config.pad_token_id or 0) + 1  # these count positions from one past the padding id
    if max_length is None:
        return min(tokenizer.model_max_length, positions or 512, 2**20)
    if positions is not None and positions > 0 and max_length > positions:
        raise UserError(
            f"dataset.max_length: {max_length} tokens, but the model has {positions} positions; "
            f"give at most {positions}, or another checkpoint"
        )
    return max_length


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what the tokenizer does: vocabulary, normalisation, splitting, special tokens, the columns it makes.

    BERT's and DistilBERT's tokenizers differ in nothing but the columns.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Truncation and padding are set by each call and are not part of what it is.
        truncation, padding = backend.truncation, backend.padding
        backend.no_truncation()
        backend.no_padding()
        text = backend.to_str()
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
    else:
        text = repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs))
    settings = [token_columns(tokenizer), tokenizer.truncation_side, getattr(tokenizer, "split_special_tokens", False)]
    return hashlib.sha256(json.dumps([text, *settings]).encode()).hexdigest()


class TokenColumn:
    """Rows of different lengths out of a memory-mapped column, without copying the column."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in column.chunks]
        self._starts = np.cumsum([0] + [len(chunk) for chunk in column.chunks])

    def __getitem__(self, row: int) -> npt.NDArray[np.int32]:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        offsets, values = self._chunks[chunk]
        local = row - int(self._starts[chunk])
        tokens: npt.NDArray[np.int32] = values[offsets[local] : offsets[local + 1]]
        return tokens


@dataclass(frozen=True)
class Batch:
    """Model inputs of a micro-batch, padded or packed. Legend: b examples, t tokens."""

    inputs: dict[str, torch.Tensor]  # padded (b, t) with an attention_mask, packed (1, t) without
    packing: Packing | None  # where the examples stand in the one row; None: padded

    @property
    def num_positions(self) -> int:
        """Tokens that are computed, padding included."""
        return self.inputs["input_ids"].numel()

    def apply(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The same batch with its tensors moved."""
        inputs = {name: move(tensor) for name, tensor in self.inputs.items()}
        return Batch(inputs, None if self.packing is None else self.packing.apply(move))

    def on(self, device: torch.device) -> Batch:
        """The same batch on its device. From pinned memory to CUDA nobody waits for the copy; elsewhere it would not be safe."""
        return self.apply(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pinned_for(self, device: torch.device) -> Batch:
        """The same batch in memory that a CUDA device reads by itself; unchanged for others."""
        return self.apply(torch.Tensor.pin_memory) if device.type == "cuda" else self


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows. Legend: b examples of a micro-batch, t tokens of the longest of them."""

    columns: dict[str, TokenColumn | list[list[int]]]  # input_ids, and token_type_ids where the model takes them
    lengths: npt.NDArray[np.int64]  # (rows,) tokens per row, special tokens included
    truncated: int  # rows that were cut to the maximum length
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def padded_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens per row when padded, (rows,): rounded up to one of few, so that compilers see few shapes."""
        few = batching.padded_lengths(self.lengths)
        rounded: npt.NDArray[np.int64] = few[np.searchsorted(few, self.lengths)]
        return rounded

    @cached_property
    def _shapes(self) -> dict[tuple[int, int, int], list[Shape]]:
        """What `shapes` has answered."""
        return {}

    def shapes(self, batch_size: int, num_processes: int, max_tokens: int) -> list[Shape]:
        """The few shapes that rows, so many of them together, are computed in: `choose_shapes`, asked once."""
        asked = (batch_size, num_processes, max_tokens)
        if asked not in self._shapes:
            self._shapes[asked] = choose_shapes(self.lengths, *asked)
        return self._shapes[asked]

    def costs(self, *, packed: bool) -> npt.NDArray[np.int64]:
        """What each row takes of a token budget, (rows,)."""
        return self.lengths if packed else self.padded_lengths

    def batch(self, rows: npt.NDArray[np.int64], *, packed: bool, length: int | None = None) -> Batch:
        """Model inputs of some rows in one of the two layouts; padded to a length, if one is given."""
        if not packed:
            return Batch(self.inputs(rows, length or int(self.padded_lengths[rows].max())), None)
        row = {name: np.concatenate([column[int(i)] for i in rows]) for name, column in self.columns.items()}
        inputs = {name: torch.from_numpy(tokens.astype(np.int64)).unsqueeze(0) for name, tokens in row.items()}
        return Batch(inputs, Packing.of(self.lengths[rows]))

    def inputs(self, rows: npt.NDArray[np.int64], length: int | None = None) -> dict[str, torch.Tensor]:
        """Model inputs of some rows, padded to a length or to the longest: input_ids, attention_mask, … each (b, t), int64."""
        t = int(self.lengths[rows].max()) if length is None else length
        inputs = {name: np.zeros((len(rows), t), dtype=np.int64) for name in (*self.columns, "attention_mask")}
        inputs["input_ids"].fill(self.pad_token_id)
        for i, row in enumerate(rows):
            n = int(self.lengths[row])
            inputs["attention_mask"][i, :n] = 1
            for name, column in self.columns.items():
                inputs[name][i, :n] = column[int(row)]
        return {name: torch.from_numpy(array) for name, array in inputs.items()}


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[str]], max_length: int
) -> dict[str, list[list[int]] | list[int] | list[bool]]:
    """Token columns of some rows, with their `length` and whether they were `truncated`.

    Args:
        tokenizer: the run's tokenizer.
        texts: the texts, or the texts and the second texts.
        max_length: tokens kept of a row, special tokens included.
    """
    encoded = tokenizer(*texts, truncation=True, max_length=max_length, return_attention_mask=False)
    if tokenizer.is_fast:
        truncated = [bool(encoding.overflowing) for encoding in encoded.encodings or []]
    else:
        whole = tokenizer(*texts, truncation=False, return_attention_mask=False, verbose=False)
        truncated = [len(a) < len(b) for a, b in zip(encoded["input_ids"], whole["input_ids"], strict=True)]
    lengths = [len(ids) for ids in encoded["input_ids"]]
    return {**{name: encoded[name] for name in token_columns(tokenizer)}, "length": lengths, "truncated": truncated}


def token_columns(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Names of the per-token inputs that the tokenizer makes for its model, the attention mask left out."""
    return [name for name in ("input_ids", "token_type_ids") if name in tokenizer.model_input_names]


def tokens_of_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[str]], max_length: int) -> Tokens:
    """Tokens of some rows in memory; arguments as those of `encode`."""
    encoded: dict[str, Any] = encode(tokenizer, texts, max_length)
    return Tokens(
        columns={name: encoded[name] for name in token_columns(tokenizer)},
        lengths=some_tokens(np.asarray(encoded["length"], dtype=np.int64)),
        truncated=sum(encoded["truncated"]),
        pad_token_id=int(tokenizer.pad_token_id or 0),
    )


def some_tokens(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The lengths as they are.

    Raises:
        DataError: a row has no token at all, as an empty text where the tokenizer adds no special tokens.
    """
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        raise DataError(
            f"the tokenizer makes no token of {len(empty)} rows, the first of them row {empty[0] + 1} of {len(lengths)}; complete or "
            "remove them, or use a tokenizer that adds special tokens"
        )
    return lengths


def tokens_cache() -> Path:
    """Folder of the tokenised splits, beside `datasets`' own cache."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "accel_trainer"


def cached_tokens(table: datasets.Dataset, sha256: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """Tokens of a table of texts, found in the cache under the hash of all they depend on, or made there.

    Args:
        table: one column of texts, or two for pairs.
        sha256: hash of its rows.
        tokenizer: the run's tokenizer.
        max_length: tokens kept of a row, special tokens included.

    Raises:
        DataError: the cache folder cannot be written.
    """
    key = hashlib.sha256(
        json.dumps([TOKENS_FORMAT, sha256, tokenizer_sha256(tokenizer), max_length]).encode()
    ).hexdigest()
    texts, names = table.column_names, token_columns(tokenizer)
    features = datasets.Features(
        {
            **{name: datasets.List(datasets.Value("int32")) for name in names},
            "length": datasets.Value("int32"),
            "truncated": datasets.Value("bool"),
        }
    )
    try:
        tokens_cache().mkdir(parents=True, exist_ok=True)
        encoded = table.map(
            lambda batch: encode(tokenizer, [batch[column] for column in texts], max_length),
            batched=True,
            remove_columns=texts,
            features=features,
            new_fingerprint=key,  # hashing the function would see the tokenizer's changing state and never hit
            cache_file_name=str(tokens_cache() / f"{key}.arrow"),
        ).data
    except OSError as error:
        raise DataError(
            f"cannot write the token cache {tokens_cache()}: {error.strerror or error}; set HF_DATASETS_CACHE to a folder "
            "with space that you may write"
        ) from error
    return Tokens(
        columns={name: TokenColumn(encoded.column(name)) for name in names},
        lengths=some_tokens(encoded.column("length").to_numpy().astype(np.int64)),
        truncated=int(np.count_nonzero(encoded.column("truncated").to_numpy())),
        pad_token_id=int(tokenizer.pad_token_id or 0),
    )
