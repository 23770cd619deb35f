"""Tokens are the tokenizer's own, made once, and found again only where everything they depend on is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from support import reviews, write_csv
from transformers import (
    BertConfig,
    BertTokenizer,
    DistilBertConfig,
    DistilBertTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from accel_trainer import tokenization
from accel_trainer.data import load_labelled, tokenise
from accel_trainer.errors import CannotLoad, DataError, UserError
from accel_trainer.recipe import DatasetSection, ModelSection, TokenizerTraining
from accel_trainer.tokenization import (
    TokenColumn,
    cached_tokens,
    encode,
    load_tokenizer,
    longest_input,
    tokenizer_sha256,
    tokens_of_texts,
    train_word_pieces,
)

TEXTS = [text for text, _ in reviews(60)]
REPLIES = [text for text, _ in reviews(60, seed=1)][::-1]


def test_a_row_without_any_token_is_refused():
    """Packed, it would be given another row's logits."""
    bare = PreTrainedTokenizerFast(tokenizer_object=trained().backend_tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    bare.backend_tokenizer.post_processor = None
    with pytest.raises(DataError, match=r"no token of 2 rows, the first of them row 2 of 4"):
        tokens_of_texts(bare, [["good", "", "soup", " "]], 16)


def trained(**settings):
    return train_word_pieces(TokenizerTraining(**{"vocab_size": 200} | settings), TEXTS)


@pytest.fixture(scope="module")
def tokenizer():
    return trained()


@pytest.fixture
def encodings(tmp_path, monkeypatch):
    """A cache of the test's own, and the number of rows in every call that tokenises for it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    calls = []

    def counted(tokenizer, texts, max_length):
        calls.append(len(texts[0]))
        return encode(tokenizer, texts, max_length)

    monkeypatch.setattr(tokenization, "encode", counted)
    return calls


def table(texts=TEXTS, pairs=None):
    return datasets.Dataset.from_dict({"text": texts} | ({"pair": pairs} if pairs else {}))


def ids(tokens, name="input_ids"):
    return [list(map(int, tokens.columns[name][row])) for row in range(len(tokens))]


# The vocabulary ----------------------------------------------------------------------------------------------------

# Each word occurs once and pairs of pieces tie everywhere, so that any order of chance would show.
TRAIN = """
import json, sys
from accel_trainer.recipe import TokenizerTraining
from accel_trainer.tokenization import tokenizer_sha256, train_word_pieces
found = []
for size, texts in json.load(sys.stdin):
    tokenizer = train_word_pieces(TokenizerTraining(vocab_size=size, min_frequency=1), texts)
    found.append([tokenizer.get_vocab(), tokenizer_sha256(tokenizer)])
print(json.dumps(found))
"""


def test_the_vocabulary_is_the_same_in_every_process():
    words = [f"{a}{b}{c}" for a in "xyzäß好" for b in "klmé吃" for c in "opq难"]
    corpora = [[200, TEXTS], [150, words], [8, words]]  # the last with more characters than pieces asked for
    found = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", TRAIN],
            input=json.dumps(corpora),
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent.parent)},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    here = [
        train_word_pieces(TokenizerTraining(vocab_size=size, min_frequency=1), texts).get_vocab()
        for size, texts in corpora
    ]
    assert here == [vocabulary for vocabulary, _ in found[0]]


def test_a_trained_tokenizer_is_a_bert_tokenizer(tokenizer):
    assert isinstance(tokenizer, BertTokenizer)
    assert len(tokenizer) <= 200
    assert tokenizer.pad_token_id == 0
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer.tokenize("The SOUP was good") == ["the", "soup", "was", "good"]
    assert tokenizer.tokenize("好吃") == ["好", "吃"]
    for text in TEXTS:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_case_is_kept_where_it_is_asked_for():
    texts = ["Soup soup SOUP Éclair"] * 3
    kept, lowered = (
        train_word_pieces(TokenizerTraining(vocab_size=100, lowercase=lowercase), texts) for lowercase in (False, True)
    )
    assert kept.tokenize("Soup soup Éclair") == ["Soup", "soup", "Éclair"]
    assert lowered.tokenize("Soup soup Éclair") == ["soup", "soup", "eclair"]


def test_pieces_are_merged_that_occur_often_enough():
    texts = ["twice twice once"]
    assert train_word_pieces(TokenizerTraining(vocab_size=100, min_frequency=2), texts).tokenize("twice") == ["twice"]
    assert train_word_pieces(TokenizerTraining(vocab_size=100, min_frequency=3), texts).tokenize("twice") != ["twice"]


def test_a_saved_tokenizer_is_found_and_does_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tok")
    section = ModelSection(from_config={"model_type": "bert"}, tokenizer=str(tmp_path / "tok"))
    loaded = load_tokenizer(section, iter(()))
    assert tokenizer_sha256(loaded) == tokenizer_sha256(tokenizer)
    assert loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    checkpoint = load_tokenizer(ModelSection(checkpoint=str(tmp_path / "tok"), revision="main"), iter(()))
    assert tokenizer_sha256(checkpoint) == tokenizer_sha256(tokenizer)


def test_a_recipe_can_ask_for_a_trained_one(tokenizer):
    section = ModelSection(from_config={"model_type": "bert"}, train_tokenizer=TokenizerTraining(vocab_size=200))
    assert load_tokenizer(section, iter(TEXTS)).get_vocab() == tokenizer.get_vocab()


def test_a_tokenizer_that_is_not_there_or_cannot_pad(tokenizer, tmp_path):
    for keys in ({"checkpoint": "none"}, {"from_config": {"model_type": "bert"}, "tokenizer": "none"}):
        section = ModelSection(**{key: str(tmp_path / v) if v == "none" else v for key, v in keys.items()})
        with pytest.raises(CannotLoad, match=r"cannot load .*; give a folder") as error:
            load_tokenizer(section, iter(()))
        assert str(error.value).startswith("model.checkpoint" if "checkpoint" in keys else "model.tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="has no padding token; use"):
        load_tokenizer(ModelSection(checkpoint=str(tmp_path / "bare")), iter(()))


# Tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [6, 512])
@pytest.mark.parametrize("pairs", [None, REPLIES])
def test_tokens_are_the_tokenizers_own(tokenizer, encodings, pairs, max_length):
    texts = [TEXTS] + ([pairs] if pairs else [])
    wanted = tokenizer(*texts, truncation=True, max_length=max_length)
    whole = tokenizer(*texts)
    cut = sum(len(ids) > max_length for ids in whole["input_ids"])
    assert (cut > 0) == (max_length == 6)
    for tokens in (
        tokens_of_texts(tokenizer, texts, max_length),
        cached_tokens(table(TEXTS, pairs), "h", tokenizer, max_length),
    ):
        assert len(tokens) == 60
        assert ids(tokens) == wanted["input_ids"]
        assert ids(tokens, "token_type_ids") == wanted["token_type_ids"]
        assert tokens.lengths.tolist() == [len(row) for row in wanted["input_ids"]]
        assert tokens.lengths.max() <= max_length
        assert tokens.truncated == cut
    if pairs:
        assert {kind for row in ids(tokens, "token_type_ids") for kind in row} == {0, 1}


def test_a_row_that_just_fits_is_not_cut(tokenizer):
    length = len(tokenizer(TEXTS[0])["input_ids"])
    assert tokens_of_texts(tokenizer, [[TEXTS[0]]], length).truncated == 0
    assert tokens_of_texts(tokenizer, [[TEXTS[0]]], length - 1).truncated == 1


def test_more_rows_than_one_batch_keep_their_order(tokenizer, encodings):
    texts = [f"{TEXTS[i % 60]} {i}" for i in range(2500)]
    tokens = cached_tokens(table(texts), "h", tokenizer, 16)
    assert encodings == [1000, 1000, 500]
    assert ids(tokens) == tokenizer(texts, truncation=True, max_length=16)["input_ids"]


def test_inputs_are_padded_to_the_longest(tokenizer, encodings):
    rows = np.asarray([7, 3, 3, 20])
    for pairs in (None, REPLIES):
        texts = [TEXTS] + ([pairs] if pairs else [])
        picked = [[column[row] for row in rows] for column in texts]
        wanted = tokenizer(*picked, padding=True, truncation=True, max_length=12, return_tensors="pt")
        for tokens in (
            tokens_of_texts(tokenizer, texts, 12),
            cached_tokens(table(TEXTS, pairs), str(pairs), tokenizer, 12),
        ):
            inputs = tokens.inputs(rows)
            assert set(inputs) == {"input_ids", "token_type_ids", "attention_mask"}
            for name, tensor in inputs.items():
                assert tensor.dtype == torch.int64
                assert torch.equal(tensor, wanted[name])


def test_padding_is_the_tokenizers_and_not_zero(tmp_path):
    vocabulary = {"a": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "b": 5, "[PAD]": 6}
    tokens = tokens_of_texts(BertTokenizer(vocab=vocabulary), [["a", "a b b"]], 10)
    assert tokens.pad_token_id == 6
    inputs = tokens.inputs(np.asarray([0, 1]))
    assert inputs["input_ids"].tolist() == [[2, 0, 3, 6, 6], [2, 0, 5, 5, 3]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert inputs["token_type_ids"].tolist() == [[0] * 5] * 2
    assert tokens.inputs(np.asarray([0]))["input_ids"].shape == (1, 3)


def test_a_token_column_reads_across_chunks_of_any_kind():
    rows = [[1, 2], [3], [], [4, 5, 6], [7], [8, 9], [], [10]]

    def chunk(values):
        return pa.array(values, type=pa.list_(pa.int32()))

    chunks = [chunk(rows[:3]), chunk([]), chunk([[0], *rows[3:6], [0, 0]])[1:4], chunk(rows[6:])]
    column = TokenColumn(pa.chunked_array(chunks))
    assert [column[row].tolist() for row in range(len(rows))] == rows
    assert all(column[row].dtype == np.int32 for row in range(len(rows)))


# The cache ---------------------------------------------------------------------------------------------------------


def test_the_second_call_does_not_tokenise_again(tokenizer, encodings):
    first = cached_tokens(table(), "h", tokenizer, 8)
    assert encodings == [60]
    tokenizer(["this", "call"], padding=True, truncation=True, max_length=3)  # changes the tokenizer's state
    second = cached_tokens(table(), "h", tokenizer, 8)
    assert encodings == [60]
    assert ids(second) == ids(first)
    assert second.lengths.tolist() == first.lengths.tolist()
    assert second.truncated == first.truncated > 0
    cached_tokens(table(), "h", trained(), 8)  # an equal one
    assert encodings == [60]


def test_rows_out_of_order_are_found_again_in_their_order(tokenizer, encodings):
    chosen = table().select([5, 3, 40])
    wanted = [tokenizer(TEXTS[row])["input_ids"] for row in (5, 3, 40)]
    assert ids(cached_tokens(chosen, "h", tokenizer, 512)) == wanted
    assert ids(cached_tokens(chosen, "h", tokenizer, 512)) == wanted
    assert encodings == [3]


@pytest.mark.parametrize("change", ["max_length", "sha256", "vocabulary", "case", "columns", "side", "format"])
def test_whatever_tokens_depend_on_makes_them_anew(tokenizer, encodings, tmp_path, change, monkeypatch):
    def tokens(sha256="h", tokenizer=tokenizer, max_length=8):
        found = cached_tokens(table(), sha256, tokenizer, max_length)
        assert ids(found) == tokenizer(TEXTS, truncation=True, max_length=max_length)["input_ids"]
        return found

    tokens()
    if change == "max_length":
        tokens(max_length=9)
    elif change == "sha256":
        tokens(sha256="i")
    elif change == "vocabulary":
        tokens(tokenizer=trained(vocab_size=60))
    elif change == "case":
        tokens(tokenizer=BertTokenizer(vocab=tokenizer.get_vocab(), do_lower_case=False))
    elif change == "columns":
        assert set(tokens(tokenizer=DistilBertTokenizer(vocab=tokenizer.get_vocab())).columns) == {"input_ids"}
    elif change == "side":
        tokens(tokenizer=BertTokenizer(vocab=tokenizer.get_vocab(), truncation_side="left"))
    elif change == "format":
        monkeypatch.setattr(tokenization, "TOKENS_FORMAT", tokenization.TOKENS_FORMAT + 1)
        tokens()
    assert encodings == [60, 60]


def test_a_tokenizer_without_kinds_of_tokens_does_not_spoil_the_cache(tokenizer, encodings):
    # DistilBERT's tokenizer is BERT's but for the columns: sharing a cache entry would leave BERT without its own.
    plain = DistilBertTokenizer(vocab=tokenizer.get_vocab())
    assert set(cached_tokens(table(), "h", plain, 8).columns) == {"input_ids"}
    assert set(cached_tokens(table(), "h", tokenizer, 8).columns) == {"input_ids", "token_type_ids"}


def test_roles_share_tokens_where_texts_and_labels_are_the_same(tokenizer, encodings, tmp_path):
    def tokenised(rows, max_length=8):
        section = DatasetSection(path=str(write_csv(tmp_path / "r.csv", rows)), splits={"train": "train"})
        split = tokenise(load_labelled(section).roles["train"], section, tokenizer, max_length)
        assert len(split) == len(split.tokens) == len(rows)
        assert ids(split.tokens) == tokenizer([r[0] for r in rows], truncation=True, max_length=max_length)["input_ids"]

    rows = reviews(30)
    tokenised(rows)
    tokenised(rows)
    assert encodings == [30]
    tokenised([(rows[0][0] + " good", rows[0][1]), *rows[1:]])
    assert encodings == [30, 30]
    tokenised(rows[::-1])
    assert encodings == [30, 30, 30]


def test_the_hash_leaves_the_tokenizer_as_it_was(tokenizer):
    one = trained()
    one(["a", "b"], padding="max_length", truncation=True, max_length=7)
    before = one.backend_tokenizer.truncation, one.backend_tokenizer.padding
    assert before[0] is not None
    assert before[1] is not None
    assert tokenizer_sha256(one) == tokenizer_sha256(tokenizer)
    assert (one.backend_tokenizer.truncation, one.backend_tokenizer.padding) == before


# The longest input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (BertConfig(max_position_embeddings=16), 16),
        (DistilBertConfig(max_position_embeddings=16), 16),
        (RobertaConfig(max_position_embeddings=18, pad_token_id=1), 16),
        (RobertaConfig(max_position_embeddings=514), 512),
        (RobertaConfig(max_position_embeddings=17, pad_token_id=0), 16),
    ],
)
def test_the_longest_input_is_what_the_model_has_positions_for(tokenizer, config, positions):
    assert longest_input(None, tokenizer, config) == positions
    assert longest_input(positions, tokenizer, config) == positions
    assert longest_input(4, tokenizer, config) == 4
    with pytest.raises(
        UserError, match=rf"max_length: {positions + 1} tokens, .* has {positions} positions; give at most"
    ):
        longest_input(positions + 1, tokenizer, config)


def test_the_longest_input_is_at_most_what_the_tokenizer_was_made_for(tokenizer):
    short = BertTokenizer(vocab=tokenizer.get_vocab(), model_max_length=10)
    assert longest_input(None, short, BertConfig(max_position_embeddings=16)) == 10
    assert longest_input(12, short, BertConfig(max_position_embeddings=16)) == 12


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(
            vocab_size=250,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            max_position_embeddings=9,
        ),
        RobertaConfig(
            vocab_size=250,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            max_position_embeddings=9,
            pad_token_id=1,
        ),
    ],
    ids=["bert", "roberta"],
)
def test_a_model_takes_the_longest_input_and_not_one_token_more(tokenizer, config):
    from transformers import AutoModel

    model = AutoModel.from_config(config).eval()
    longest = longest_input(None, tokenizer, config)
    with torch.no_grad():
        model(input_ids=torch.full((1, longest), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, longest + 1), 5))


@pytest.mark.parametrize(
    ("keys", "asked"),
    [
        ({"checkpoint": "org/model"}, ("org/model", "main")),
        ({"checkpoint": "org/model", "revision": "v1"}, ("org/model", "v1")),
        ({"checkpoint": "org/model", "revision": "v1", "tokenizer": "org/t"}, ("org/t", "main")),
        ({"checkpoint": "org/model", "tokenizer": "org/t", "tokenizer_revision": "v2"}, ("org/t", "v2")),
    ],
)
def test_the_revision_is_that_of_the_repository(
    keys: dict[str, str], asked: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []

    def from_pretrained(name: str, *, revision: str, **_: object) -> SimpleNamespace:
        seen.append((name, revision))
        return SimpleNamespace(pad_token_id=0)

    monkeypatch.setattr(tokenization.AutoTokenizer, "from_pretrained", from_pretrained)
    load_tokenizer(ModelSection(**keys), [])
    assert seen == [asked]
