"""The encoder with its classification head, made in float32 on the CPU from the recipe's seed, before any hardware.

The same seed and checkpoint give the same initial weights on every machine; their hash is recorded and compared.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from accel_trainer.errors import CannotLoad, UserError
from accel_trainer.recipe import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What transformers' configs call the recipe's three drop probabilities, by model family.
DROPOUT_NAMES = {
    "hidden_dropout": ("hidden_dropout_prob", "hidden_dropout", "dropout", "mlp_dropout"),
    "attention_dropout": ("attention_probs_dropout_prob", "attention_dropout"),
    "classifier_dropout": (
        "classifier_dropout",
        "classifier_dropout_prob",
        "seq_classif_dropout",
        "cls_dropout",
        "summary_last_dropout",
    ),
}

# Arguments of a config that are no architecture: some load code or kernels from the Hub, the others are set here.
NOT_ARCHITECTURE = {
    "auto_map": "code is trusted only from the command line",
    "attn_implementation": "kernels are chosen by the hardware",
    "experts_implementation": "kernels are chosen by the hardware",
    "quantization_config": "a model is trained in full precision",
    "num_labels": "dataset.labels names the classes",
    "id2label": "dataset.labels names the classes",
    "label2id": "dataset.labels names the classes",
    "output_attentions": "logits are all that is needed",
    "output_hidden_states": "logits are all that is needed",
    "return_dict": "logits are all that is needed",
}
MOST_LAYERS = 1_000  # each is a Python object, made before any memory is asked for


def load_config(
    section: ModelSection,
    label_names: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    trust_remote_code: bool = False,
) -> PretrainedConfig:
    """Config of the recipe's model with its labels, dropout and vocabulary filled in.

    Raises:
        UserError: the checkpoint cannot be read, the config takes no such argument, or has no such dropout.
    """
    if section.from_config is not None:
        arguments = dict(section.from_config)
        model_type = arguments.pop("model_type")
        _check_arguments(arguments)
        try:
            config = AutoConfig.for_model(model_type, **arguments)
            # A config keeps what it does not know as an attribute; what it knows under another name it takes in.
            unknown = sorted(set(arguments) & set(config.to_dict()) - set(AutoConfig.for_model(model_type).to_dict()))
        except Exception as error:  # each config class checks, computes and lets itself be overwritten as it likes
            raise UserError(f"model.from_config: transformers takes no such {model_type} config: {error}") from error
        if unknown:
            raise UserError(
                f"model.from_config: a {model_type} config has no {', '.join(unknown)}; see its documentation"
            )
        config.vocab_size = len(tokenizer)
        config.pad_token_id = tokenizer.pad_token_id
    else:
        assert section.checkpoint is not None
        try:
            config = AutoConfig.from_pretrained(
                section.checkpoint, revision=section.revision or "main", trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise CannotLoad("model.checkpoint", section.checkpoint, error) from error
        kernel = getattr(config, "_attn_implementation", None)
        if isinstance(kernel, str) and "/" in kernel and not trust_remote_code:
            raise UserError(
                f"model.checkpoint: the config of {section.checkpoint!r} asks for code from the Hub ({kernel!r}); "
                "give --trust_remote_code on the command line if you trust it"
            )
    # A checkpoint's config may say otherwise; with a kernel of its own transformers refuses to save such a one.
    config.output_attentions = config.output_hidden_states = False
    config.return_dict = True
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: i for i, name in enumerate(label_names)}
    config.problem_type = "single_label_classification"
    for field, candidates in DROPOUT_NAMES.items():
        probability = getattr(section, field)
        if probability is None:
            continue
        name = next((name for name in candidates if hasattr(config, name)), None)
        if name is None:
            raise UserError(
                f"model.{field}: a {config.model_type} config has no such dropout; leave it out to keep the checkpoint's"
            )
        setattr(config, name, probability)
    return config


def _check_arguments(arguments: dict[str, Any]) -> None:
    """See that the arguments of a new model's config describe an architecture, of a size that can be built.

    Raises:
        UserError: they do not.
    """
    for name, value in arguments.items():
        if reason := NOT_ARCHITECTURE.get(name.removeprefix("_")):
            raise UserError(f"model.from_config: {name} is not for a recipe, {reason}; leave it out")
        repeats = any(part in name for part in ("layer", "group", "expert"))
        if repeats and isinstance(value, int | float) and value > MOST_LAYERS:
            raise UserError(f"model.from_config: {name} is {value}; give at most {MOST_LAYERS}")


def build_model(
    section: ModelSection, config: PretrainedConfig, seed: int, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model on the CPU in float32; what the checkpoint does not hold is drawn from `seed`.

    Raises:
        UserError: the checkpoint has no safetensors weights, or the encoder in it is another one.
    """
    torch.manual_seed(seed)
    if section.from_config is not None:
        try:
            model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
            _classify_something(model)
        except Exception as error:  # no one checks the arguments: whatever a layer does with them can be raised
            raise UserError(f"model.from_config: no {config.model_type} classifier comes of it: {error}") from error
    else:
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                str(section.checkpoint),
                config=config,
                revision=section.revision or "main",
                dtype=torch.float32,
                use_safetensors=True,  # never unpickle
                ignore_mismatched_sizes=True,  # a head for other labels is made anew; the encoder is checked below
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise CannotLoad("model.checkpoint", section.checkpoint, error) from error
        prefix = model.base_model_prefix + "."
        foreign = sorted(
            key
            for key in [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
            if key.startswith(prefix) and ".pooler." not in key  # masked-language checkpoints have no pooler
        )
        if foreign:
            raise UserError(
                f"model.checkpoint: {section.checkpoint!r} holds other weights than a {config.model_type} encoder of its "
                f"config needs ({len(foreign)} missing or of another shape, the first {foreign[0]}); use a sound checkpoint"
            )
    freeze(model, section)
    return model


def _classify_something(model: PreTrainedModel) -> None:
    """Let a new model classify two tokens, as a layer without width or positions cannot."""
    training = model.training
    model.train(False)
    with torch.no_grad():
        logits = model(torch.zeros(1, 2, dtype=torch.long), attention_mask=torch.ones(1, 2)).logits
    model.train(training)
    if logits.shape != (1, model.config.num_labels):
        raise ValueError(f"its logits have the shape {tuple(logits.shape)}")


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """The encoder's layers from the embeddings upwards, or None where the family shares or hides them."""
    count = getattr(model.config, "num_hidden_layers", None)
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    return None


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    # embeddings_project: ELECTRA's, from narrow embeddings to the layers' width
    found = [getattr(model.base_model, name, None) for name in ("embeddings", "embeddings_project")]
    modules = [module for module in found if isinstance(module, nn.Module)]
    if not modules:
        raise UserError(
            f"model: {model.config.model_type} keeps its embeddings elsewhere; it cannot be frozen by layers"
        )
    return modules


def layer_depths(model: PreTrainedModel) -> dict[str, int]:
    """Depth of each parameter by name: 0 embeddings, 1 to L the layers, L + 1 pooler and head.

    Raises:
        UserError: the family has no separate layers (ALBERT shares one set of weights between all).
    """
    layers = encoder_layers(model)
    if layers is None:
        raise UserError(
            f"training.layerwise_lr_decay: {model.config.model_type} has no separate layers; leave the key out"
        )
    depth_of = {id(p): depth for depth, layer in enumerate(layers, start=1) for p in layer.parameters()}
    embeddings = {id(p) for module in _embeddings(model) for p in module.parameters()}
    return {
        name: 0 if id(p) in embeddings else depth_of.get(id(p), len(layers) + 1) for name, p in model.named_parameters()
    }


def freeze(model: PreTrainedModel, section: ModelSection) -> None:
    """Take the frozen parameters out of training, as `freeze_embeddings` and `freeze_layers` say.

    Raises:
        UserError: there are fewer layers than are to be frozen, or none apart.
    """
    frozen: list[nn.Module] = []
    if section.freeze_embeddings or section.freeze_layers:
        frozen.extend(_embeddings(model))
    if section.freeze_layers:
        layers = encoder_layers(model)
        have = 0 if layers is None else len(layers)
        if layers is None or section.freeze_layers > have:
            raise UserError(
                f"model.freeze_layers: {section.freeze_layers} layers to freeze, but {model.config.model_type} "
                f"has {have} of its own; give at most {have}"
            )
        frozen.extend(layers[: section.freeze_layers])
    for module in frozen:
        module.requires_grad_(False)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of scalars that are trained, and of all."""
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total": sum(p.numel() for p in model.parameters()),
    }


def is_stock_encoder(model: PreTrainedModel) -> bool:
    """Whether a classifier is transformers' own, not remote code that may do as it likes, and looks both ways."""
    is_decoder = getattr(model.config, "is_decoder", False)
    return type(model).__module__.startswith("transformers.models.") and not is_decoder


def weights_sha256(state: dict[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b"")
    return digest.hexdigest()
