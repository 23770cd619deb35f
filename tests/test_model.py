"""The model: the same weights from the same seed everywhere, the recipe's dropout in any family, nothing unpickled."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import FAMILIES, python
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertModel,
    PreTrainedTokenizerBase,
)

from accel_trainer.errors import UserError
from accel_trainer.model import (
    build_model,
    count_parameters,
    encoder_layers,
    layer_depths,
    load_config,
    weights_sha256,
)
from accel_trainer.recipe import ModelSection, TokenizerTraining
from accel_trainer.tokenization import train_word_pieces

NAMES = ["negative", "positive"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_word_pieces(TokenizerTraining(vocab_size=60), ["the soup was good", "the noodles were cold"])


def section_of(family: str, **more: Any) -> ModelSection:
    arguments = {"model_type": family, **FAMILIES[family], **more.pop("config", {})}
    return ModelSection(from_config=arguments, train_tokenizer=TokenizerTraining(), **more)


def build(section: ModelSection, tokenizer: PreTrainedTokenizerBase, seed: int = 1, names: list[str] = NAMES) -> Any:
    return build_model(section, load_config(section, names, tokenizer), seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_means_the_same_weights(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    section = section_of(family)
    first = weights_sha256(build(section, tokenizer).state_dict())
    torch.randn(3)
    assert weights_sha256(build(section, tokenizer).state_dict()) == first
    assert weights_sha256(build(section, tokenizer, seed=2).state_dict()) != first


def test_a_seed_means_the_same_weights_in_another_process(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = (
        "import sys, torch; torch.randn(5); from transformers import AutoTokenizer\n"
        "from accel_trainer.model import *; from accel_trainer.recipe import ModelSection, TokenizerTraining\n"
        f"section = ModelSection(from_config={ {'model_type': 'bert', **FAMILIES['bert']}!r}, "
        "train_tokenizer=TokenizerTraining())\n"
        f"config = load_config(section, {NAMES!r}, AutoTokenizer.from_pretrained('tokenizer'))\n"
        "print(weights_sha256(build_model(section, config, 1).state_dict()))\n"
    )
    done = python(code, tmp_path)
    assert done.code == 0, done.err
    assert done.out.split()[-1] == weights_sha256(build(section_of("bert"), tokenizer).state_dict())


def test_hash_sees_names_types_shapes_and_bytes() -> None:
    weight = torch.arange(6.0)
    variants = [
        {"a": weight},
        {"b": weight},
        {"a": weight.reshape(2, 3)},
        {"a": weight.double()},
        {"a": weight + torch.tensor([0, 0, 0, 0, 0, 1e-6])},
        {"a": weight, "b": torch.empty(0)},
    ]
    assert len({weights_sha256(state) for state in variants}) == len(variants)
    assert weights_sha256({"a": weight, "b": weight}) == weights_sha256({"b": weight, "a": weight.clone()})
    assert weights_sha256({"a": weight.reshape(2, 3).t()}) == weights_sha256(
        {"a": weight.reshape(2, 3).t().contiguous()}
    )


# Written down from the modeling files: where each family keeps its probabilities.
DROPOUT_OF = {
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "distilbert": ("dropout", "attention_dropout", "seq_classif_dropout"),
    "roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "xlm-roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "electra": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "albert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"),
    "modernbert": ("mlp_dropout", "attention_dropout", "classifier_dropout"),
}


def test_dropout_table_is_complete() -> None:
    assert set(DROPOUT_OF) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_reaches_the_config_and_the_modules(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    section = section_of(family, hidden_dropout=0.21, attention_dropout=0.22, classifier_dropout=0.23)
    config = load_config(section, NAMES, tokenizer)
    assert tuple(getattr(config, name) for name in DROPOUT_OF[family]) == (0.21, 0.22, 0.23)
    model = build_model(section, config, 1)
    modules = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert {0.21, 0.23} <= modules
    plain = load_config(section_of(family), NAMES, tokenizer)
    default = AutoConfig.for_model(family)
    for name in DROPOUT_OF[family]:
        assert getattr(plain, name) == getattr(default, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_dropout_training_mode_changes_nothing(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    section = section_of(family, hidden_dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0)
    model = build(section, tokenizer)
    ids = torch.randint(5, 20, (3, 6))
    with torch.no_grad():
        training, evaluating = model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits
    torch.testing.assert_close(training, evaluating)


def test_labels_and_vocabulary_reach_the_config(tokenizer: PreTrainedTokenizerBase) -> None:
    config = load_config(section_of("bert"), ["a", "b", "c"], tokenizer)
    assert config.id2label == {0: "a", 1: "b", 2: "c"}
    assert config.label2id == {"a": 0, "b": 1, "c": 2}
    assert config.num_labels == 3
    assert config.vocab_size == len(tokenizer)
    assert config.pad_token_id == tokenizer.pad_token_id
    assert build(section_of("bert"), tokenizer, names=["a", "b", "c"]).classifier.out_features == 3


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "albert"])
def test_freezing_layers(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build(section_of(family, freeze_layers=1), tokenizer)
    depths = layer_depths(model)
    assert set(depths.values()) == {0, 1, 2, 3}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert trained == {name: depth >= 2 for name, depth in depths.items()}
    layers = encoder_layers(model)
    assert layers is not None
    assert len(layers) == 2
    counts = count_parameters(model)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["trainable"] == sum(p.numel() for n, p in model.named_parameters() if depths[n] >= 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_freezing_embeddings(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build(section_of(family, freeze_embeddings=True), tokenizer)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert any("embed" in name for name in frozen)
    assert frozen == {name for name, _ in model.named_parameters() if ".embeddings" in name}
    free = build(section_of(family), tokenizer)
    assert all(parameter.requires_grad for parameter in free.parameters())


def test_freezing_more_layers_than_there_are(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"model\.freeze_layers: 3 layers to freeze, but bert has 2 .*give at most 2"):
        build(section_of("bert", freeze_layers=3), tokenizer)


def test_albert_has_no_layers_of_its_own(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"model\.freeze_layers: 1 .*albert has 0"):
        build(section_of("albert", freeze_layers=1), tokenizer)
    with pytest.raises(UserError, match=r"training\.layerwise_lr_decay: albert has no separate layers"):
        layer_depths(build(section_of("albert"), tokenizer))


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("bert", {"hiden_size": 16}, "bert config has no hiden_size"),
        ("bert", {"hidden_size": "sixteen"}, "bert config"),
        ("bert", {"hidden_size": 15}, "15"),
        ("bert", {"model_type": "burt"}, "burt"),
        ("bert", {"model_type": "clip_vision_model", "patch_size": 4}, "clip_vision_model"),
    ],
)
def test_mistakes_in_from_config(
    family: str, config: dict[str, Any], said: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match=rf"model\.from_config.*{said}"):
        build(section_of(family, config=config), tokenizer)


def test_distilbert_takes_the_common_names_too(tokenizer: PreTrainedTokenizerBase) -> None:
    arguments = {"model_type": "distilbert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    section = ModelSection(from_config={**arguments, "hidden_dim": 32}, train_tokenizer=TokenizerTraining())
    config = load_config(section, NAMES, tokenizer)
    assert (config.dim, config.n_layers, config.n_heads) == (16, 2, 2)


# --- checkpoints


def saved(model: Any, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(family: str, tokenizer: PreTrainedTokenizerBase, **more: Any) -> Any:
    arguments = {**FAMILIES[family], "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **more}
    return AutoConfig.for_model(family, **arguments)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def test_nothing_is_unpickled(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config_of("bert", tokenizer))
    folder = saved(model, tmp_path / "pickled", tokenizer)
    (folder / "model.safetensors").unlink()
    trace = tmp_path / "unpickled"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(trace))))
    with pytest.raises(
        UserError, match=r"model\.checkpoint: cannot load .* pickled .* are never opened.*save_pretrained"
    ):
        build(ModelSection(checkpoint=str(folder)), tokenizer)
    assert not trace.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert trace.exists()  # it would have


def test_a_head_for_other_labels_is_made_anew(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    before = AutoModelForSequenceClassification.from_config(config_of("bert", tokenizer, num_labels=5))
    folder = saved(before, tmp_path / "five", tokenizer)
    section = ModelSection(checkpoint=str(folder))
    model = build(section, tokenizer)
    assert model.classifier.weight.shape == (2, 16)
    kept = {name: weight for name, weight in model.state_dict().items() if name.startswith("bert.")}
    assert kept
    for name, weight in kept.items():
        assert torch.equal(weight, before.state_dict()[name]), name
    assert weights_sha256(build(section, tokenizer).state_dict()) == weights_sha256(model.state_dict())
    assert not torch.equal(build(section, tokenizer, seed=2).classifier.weight, model.classifier.weight)


def test_the_same_labels_keep_the_head(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    before = AutoModelForSequenceClassification.from_config(config_of("bert", tokenizer))
    model = build(ModelSection(checkpoint=str(saved(before, tmp_path / "two", tokenizer))), tokenizer)
    assert weights_sha256(model.state_dict()) == weights_sha256(before.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_language_checkpoints_work(family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    before = AutoModelForMaskedLM.from_config(config_of(family, tokenizer))
    folder = saved(before, tmp_path / "mlm", tokenizer)
    model = build(ModelSection(checkpoint=str(folder)), tokenizer)
    encoder = {name: w for name, w in before.base_model.state_dict().items() if "pooler" not in name}
    assert encoder
    for name, weight in encoder.items():
        assert torch.equal(weight, model.base_model.state_dict()[name]), name
    assert model.dtype == torch.float32


def test_a_bare_encoder_works_and_half_precision_is_raised(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    before = BertModel(config_of("bert", tokenizer)).to(torch.bfloat16)
    model = build(ModelSection(checkpoint=str(saved(before, tmp_path / "bare", tokenizer))), tokenizer)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(
        model.bert.encoder.layer[0].output.dense.weight, before.encoder.layer[0].output.dense.weight.float()
    )


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"intermediate_size": 64}])
def test_a_foreign_encoder_is_refused(
    change: dict[str, int], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    before = AutoModelForSequenceClassification.from_config(config_of("bert", tokenizer))
    folder = saved(before, tmp_path / "foreign", tokenizer)
    config_of("bert", tokenizer, **change).save_pretrained(folder)
    with pytest.raises(UserError, match=r"model\.checkpoint: .* holds other weights than a bert encoder"):
        build(ModelSection(checkpoint=str(folder)), tokenizer)


def test_a_checkpoint_that_is_not_there(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"model\.checkpoint: cannot load .*nowhere"):
        load_config(ModelSection(checkpoint=str(tmp_path / "nowhere")), NAMES, tokenizer)
