"""Names that other tutorials use: the recipe's spelling for each, or why there is none and what to do.

The names are those of `TrainingArguments`, of transformers' `run_classification.py` and `run_glue.py`, and of earlier
versions of them. A test holds the tables complete against the installed `TrainingArguments`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Untranslatable(ValueError):
    """A value that an old name allowed and the new one does not mean."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


class Renamed(NamedTuple):
    """A name that means the same as one of the recipe's."""

    new: str  # dotted
    value: Callable[[Any], Any] | None = None  # the old value → the new one; may raise Untranslatable


class Answered(NamedTuple):
    """A name that has no equivalent: why, what to do, and the key that does its work."""

    what: str
    remedy: str
    instead: str | None = None  # dotted; a recipe without it lacks nothing but what this answer already says


def _share(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value < 1:
        raise Untranslatable(f"{value} is no share of the run", "give a number from 0 and below 1, such as 0.1")
    return value


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        return [] if value.lower() == "none" else [value]
    return [] if value is None or value == ["none"] else value


def _without_eval(value: Any) -> Any:
    return value.removeprefix("eval_") if isinstance(value, str) else value


def _unlimited(value: Any) -> Any:
    return None if value == -1 else value


def _adamw(value: Any) -> Any:
    spellings = {"adamw", "adamw_hf", "adamw_torch_fused", "adamw_apex_fused"}
    return "adamw_torch" if isinstance(value, str) and value.lower() in spellings else value


# Accepted at the top level, in the section of the new name, and in `training`, where flat TrainingArguments are put.
RENAMED: dict[str, Renamed] = {
    "evaluation_strategy": Renamed("evaluation.eval_strategy"),
    "evaluate_strategy": Renamed("evaluation.eval_strategy"),
    "best_metric": Renamed("evaluation.metric_for_best_model", _without_eval),
    "metric_name": Renamed("evaluation.metrics", _listed),
    "warmup_ratio": Renamed("training.warmup_steps", _share),
    "warmup_proportion": Renamed("training.warmup_steps", _share),
    "num_warmup_steps": Renamed("training.warmup_steps"),
    "lr": Renamed("training.learning_rate"),
    "num_epochs": Renamed("training.num_train_epochs"),
    "epochs": Renamed("training.num_train_epochs"),
    "max_epochs": Renamed("training.num_train_epochs"),
    "max_train_steps": Renamed("training.max_steps", _unlimited),
    "lr_scheduler": Renamed("training.lr_scheduler_type"),
    "scheduler_type": Renamed("training.lr_scheduler_type"),
    "label_smoothing": Renamed("training.label_smoothing_factor"),
    "max_gradient_norm": Renamed("training.max_grad_norm"),
    "gradient_clipping": Renamed("training.max_grad_norm"),
    "optimizer": Renamed("training.optim", _adamw),
    "llrd": Renamed("training.layerwise_lr_decay"),
    "layer_wise_lr_decay": Renamed("training.layerwise_lr_decay"),
    "max_seq_length": Renamed("dataset.max_length"),
    "max_sequence_length": Renamed("dataset.max_length"),
    "dataset_name": Renamed("dataset.path"),
    "dataset_path": Renamed("dataset.path"),
    "dataset_config_name": Renamed("dataset.name"),
    "dataset_config": Renamed("dataset.name"),
    "dataset_revision": Renamed("dataset.revision"),
    "train_file": Renamed("dataset.data_files.train"),
    "validation_file": Renamed("dataset.data_files.validation"),
    "test_file": Renamed("dataset.data_files.test"),
    "train_split_name": Renamed("dataset.splits.train"),
    "validation_split_name": Renamed("dataset.splits.validation"),
    "test_split_name": Renamed("dataset.splits.test"),
    "text_column_name": Renamed("dataset.text_column"),
    "label_column_name": Renamed("dataset.label_column"),
    "max_val_samples": Renamed("dataset.max_eval_samples"),
    "max_test_samples": Renamed("dataset.max_predict_samples"),
    "model_name_or_path": Renamed("model.checkpoint"),
    "model_name": Renamed("model.checkpoint"),
    "model_id": Renamed("model.checkpoint"),
    "pretrained_model_name_or_path": Renamed("model.checkpoint"),
    "model_revision": Renamed("model.revision"),
    "tokenizer_name": Renamed("model.tokenizer"),
    "tokenizer_name_or_path": Renamed("model.tokenizer"),
    "attention_probs_dropout_prob": Renamed("model.attention_dropout"),
    "hidden_dropout_prob": Renamed("model.hidden_dropout"),
    "project": Renamed("tracking.project_name"),
    "wandb_project": Renamed("tracking.project_name"),
}

# Values that mean the same as one of the recipe's, by the recipe's own key.
TRANSLATED: dict[str, Callable[[Any], Any]] = {
    "training.optim": _adamw,
    "training.max_steps": _unlimited,
    "evaluation.metric_for_best_model": _without_eval,
    "tracking.report_to": _listed,
}

# Values that have no equivalent, by the recipe's own key.
ANSWERED_VALUES: dict[str, dict[str, Answered]] = {
    "problem_type": {
        "multi_label_classification": Answered("several labels per text are not built yet", "use one label per text"),
        "regression": Answered("regression is not built yet", "use single_label_classification"),
    },
    "training.lr_scheduler_type": {
        "reduce_lr_on_plateau": Answered(
            "a schedule here is a function of the step alone", "use linear or cosine, and early_stopping_patience"
        ),
        "greedy": Answered("a schedule here is a function of the step alone", "use linear or cosine"),
    },
    "tracking.report_to": {
        "all": Answered("what is installed differs between machines", "name the trackers, such as [tensorboard]"),
    },
    "saving.save_strategy": {
        "best": Answered(
            "the best weights are kept at every evaluation anyway", "set save_strategy to no, steps or epoch"
        ),
    },
}

_BATCH = "it would make the result depend on the number of devices"
_GLOBAL = "give training.global_batch_size = per-device batch × devices × accumulation"
_DERIVED = Answered("it follows from training.global_batch_size and the memory of the device", "leave it out")
_EVAL_BATCH = Answered("it follows from the memory of the device and changes no score", "leave it out")
_PER_DEVICE = Answered(_BATCH, _GLOBAL, "training.global_batch_size")
_CONFIG = "the accelerate config decides it, not the recipe"
_PRECISION = Answered(_CONFIG, "set mixed_precision in the accelerate config")
_SHARDING = Answered(_CONFIG, "say it in an accelerate config (accelerate config writes one)")
_COMPILE = Answered(_CONFIG, "set dynamo_backend in the accelerate config")
_DEVICE = Answered(_CONFIG, "use the accelerate config of that kind of device, such as cpu.yaml")
_DDP = Answered("the program sets it so that every process does the same work", "leave it out")
_LOADER = Answered("tokenised data are read in place and batches made by the program", "leave it out")
_LAYOUT = Answered("no padding is computed where the encoder allows it, and little elsewhere", "leave it out")
_COMMAND = "it says how to run, not what to compute"
_OUTPUT = Answered(_COMMAND, "give --output_dir on the command line")
_RESUME = Answered(_COMMAND, "give --resume on the command line")
_CHECKPOINTING = Answered("it saves memory and changes no result", "give --gradient_checkpointing on the command line")
_VERBS = Answered("the splits and eval_strategy say what is trained and evaluated", "leave it out")
_HUB = Answered("a run leaves a folder and uploads nothing", "upload OUTPUT_DIR/model with `hf upload` afterwards")
_SECRET = Answered("a shared file is no place for a secret", "run `hf auth login`, or set HF_TOKEN")
_EVAL_MEMORY = Answered("evaluation never gathers more than one row of logits per example", "leave it out")
_LOGS = Answered("the main process alone shows progress and writes metrics.jsonl and run.json", "leave it out")
_TRACKER = Answered("trackers read such settings from environment variables of their own", "set those")
_LOGGED = Answered("metrics.jsonl and the trackers have a line every tracking.logging_steps", "give logging_steps")
_SAVED = Answered("a checkpoint always holds all that resuming needs, as safetensors", "leave it out")
_EXACT = Answered(
    "a step's order and dropout are functions of the seed and the step", "leave it out: resuming is exact"
)
_SEEDS = Answered("one seed makes weights, order and dropout", "give training.seed")
_COLUMNS = Answered("only text_column, text_pair_column and label_column are read", "leave it out")
_TRUST = Answered(
    "code from the Hub is trusted only from the command line, never from a shared recipe",
    "give --trust_remote_code on the command line",
)
_CACHE = Answered(_COMMAND, "leave it out; HF_HOME moves the cache")
_OPTIMIZER = Answered("the optimizers here have no further arguments", "leave it out")
_SUM = Answered("the loss is the sum over the global batch ÷ its true size, in every case", "leave it out")
_LORA = Answered("all weights are trained; adapters are not built", "use freeze_layers to train fewer")
_STREAM = Answered("data are memory-mapped, which holds any size of fine-tuning set", "leave it out")
_NOTHING = Answered("nothing here depends on it", "leave it out")

ANSWERED: dict[str, Answered] = {
    # batches
    **dict.fromkeys(
        ["per_device_train_batch_size", "per_gpu_train_batch_size", "train_batch_size", "batch_size"], _PER_DEVICE
    ),
    **dict.fromkeys(["micro_batch_size", "effective_batch_size", "total_batch_size"], _PER_DEVICE),
    **dict.fromkeys(["gradient_accumulation_steps", "accumulation_steps"], _DERIVED),
    **dict.fromkeys(["per_device_eval_batch_size", "per_gpu_eval_batch_size", "eval_batch_size"], _EVAL_BATCH),
    "auto_find_batch_size": Answered(
        "micro-batches follow a token budget and change no result", "leave it out, or give --max_tokens_per_device N"
    ),
    "average_tokens_across_devices": _SUM,
    # hardware
    **dict.fromkeys(["fp16", "bf16", "mixed_precision", "half_precision_backend", "fp16_backend"], _PRECISION),
    "tf32": Answered(_CONFIG, "leave it out; torch computes float32 in full unless the environment says otherwise"),
    **dict.fromkeys(["fp16_opt_level", "fp16_full_eval", "bf16_full_eval", "torch_dtype", "dtype"], _PRECISION),
    **dict.fromkeys(["fsdp", "fsdp_config", "fsdp_min_num_params", "parallelism_config", "sharded_ddp"], _SHARDING),
    "fsdp_transformer_layer_cls_to_wrap": _SHARDING,
    "deepspeed": Answered("DeepSpeed is not supported: it owns the optimizer step", "leave it out"),
    **dict.fromkeys(["torch_compile", "torch_compile_backend", "torch_compile_mode", "torchdynamo"], _COMPILE),
    **dict.fromkeys(["no_cuda", "use_cpu", "use_mps_device", "device", "n_gpu", "local_rank", "xpu_backend"], _DEVICE),
    **dict.fromkeys(["use_ipex", "tpu_num_cores", "tpu_metrics_debug", "jit_mode_eval", "accelerator_config"], _DEVICE),
    **dict.fromkeys(["ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"], _DDP),
    **dict.fromkeys(["ddp_backend", "ddp_timeout", "ddp_timeout_sec", "ddp_static_graph", "dispatch_batches"], _DDP),
    **dict.fromkeys(["split_batches", "mp_parameters", "past_index", "batch_eval_metrics"], _NOTHING),
    **dict.fromkeys(["torch_empty_cache_steps", "use_liger_kernel", "liger_kernel_config", "use_cache"], _NOTHING),
    **dict.fromkeys(["optim_args", "optim_target_modules", "adafactor"], _OPTIMIZER),
    **dict.fromkeys(["activation_checkpointing", "activation_checkpointing_kwargs"], _CHECKPOINTING),
    **dict.fromkeys(["gradient_checkpointing", "gradient_checkpointing_kwargs"], _CHECKPOINTING),
    # reading
    **dict.fromkeys(["dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"], _LOADER),
    **dict.fromkeys(["dataloader_prefetch_factor", "dataloader_multiprocessing_context"], _LOADER),
    **dict.fromkeys(["dataloader_in_order", "num_workers", "preprocessing_num_workers"], _LOADER),
    "dataloader_drop_last": Answered("the last batch of an epoch is trained on, with its true size", "leave it out"),
    **dict.fromkeys(
        ["group_by_length", "length_column_name", "train_sampling_strategy"],
        Answered(
            "no padding is computed, or little, while the order over global batches stays random",
            "leave it out",
        ),
    ),
    **dict.fromkeys(["pad_to_max_length", "pad_to_multiple_of"], _LAYOUT),
    **dict.fromkeys(["padding", "padding_strategy"], _LAYOUT),
    **dict.fromkeys(["remove_unused_columns", "remove_columns", "text_column_delimiter"], _COLUMNS),
    "text_column_names": Answered("one or two columns are read", "give dataset.text_column and text_pair_column"),
    "label_names": Answered("it named tensors there", "give the names of the classes as dataset.labels"),
    "num_labels": Answered("it follows from the labels", "leave it out, or give dataset.labels", "dataset.labels"),
    "id2label": Answered("ids follow the order of dataset.labels", "give dataset.labels", "dataset.labels"),
    "label2id": Answered("ids follow the order of dataset.labels", "give dataset.labels", "dataset.labels"),
    "remove_splits": Answered("a split that no role names is not read", "leave it out"),
    "shuffle_train_dataset": Answered(
        "training order is shuffled in every epoch", "leave it out; dataset.shuffle_seed shuffles before slicing"
    ),
    "task_name": Answered(
        "a task is a configuration of a dataset", "give dataset.path: nyu-mll/glue and dataset.name", "dataset.path"
    ),
    "data_dir": Answered("it is a folder of data", "give it as dataset.path", "dataset.path"),
    "streaming": _STREAM,
    **dict.fromkeys(["cache_dir", "overwrite_cache"], _CACHE),
    "trust_remote_code": _TRUST,
    **dict.fromkeys(["token", "use_auth_token", "hub_token"], _SECRET),
    "config_name": Answered("the checkpoint's own config is used", "give model.from_config for a new model"),
    **dict.fromkeys(["use_fast_tokenizer", "ignore_mismatched_sizes"], _NOTHING),
    **dict.fromkeys(["use_lora", "lora", "lora_r", "peft"], _LORA),
    "do_regression": Answered("regression is not built yet", "leave it out and give the texts labels"),
    "neftune_noise_alpha": Answered("noise on embeddings is not built", "leave it out"),
    # evaluation
    **dict.fromkeys(["eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"], _EVAL_MEMORY),
    **dict.fromkeys(["prediction_loss_only", "include_for_metrics", "include_inputs_for_metrics"], _EVAL_MEMORY),
    **dict.fromkeys(
        ["eval_delay", "eval_on_start", "evaluate_during_training"],
        Answered("evaluations follow eval_strategy and eval_steps from the first", "give evaluation.eval_strategy"),
    ),
    "predict_with_generate": Answered("a classifier generates nothing", "leave it out"),
    **dict.fromkeys(["do_train", "do_eval", "do_predict", "do_test"], _VERBS),
    # saving and resuming
    **dict.fromkeys(["output_dir", "overwrite_output_dir"], _OUTPUT),
    **dict.fromkeys(["resume_from_checkpoint", "restore_callback_states_from_checkpoint"], _RESUME),
    **dict.fromkeys(["save_safetensors", "save_only_model", "save_on_each_node"], _SAVED),
    "enable_jit_checkpoint": Answered("a signal always saves a checkpoint before the run stops", "leave it out"),
    **dict.fromkeys(["ignore_data_skip", "full_determinism"], _EXACT),
    "data_seed": _SEEDS,
    **dict.fromkeys(["push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push"], _HUB),
    **dict.fromkeys(["hub_revision", "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token"], _HUB),
    # logging
    **dict.fromkeys(["logging_strategy", "logging_first_step"], _LOGGED),
    "logging_nan_inf_filter": Answered("a loss that is not finite stops the run and saves nothing", "leave it out"),
    **dict.fromkeys(["logging_dir", "run_name"], _OUTPUT),
    **dict.fromkeys(["log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "verbose"], _LOGS),
    **dict.fromkeys(["include_num_input_tokens_seen", "include_tokens_per_second", "skip_memory_metrics"], _LOGS),
    **dict.fromkeys(["trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"], _TRACKER),
    "debug": _NOTHING,
    "ray_scope": Answered("searches over recipes are overrides on the command line", "leave it out"),
}
