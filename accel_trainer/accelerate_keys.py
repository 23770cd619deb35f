"""The keys of an accelerate config, as Accelerate 1.15 knows them, and what of it this program refuses.

A test holds the tables equal to the installed Accelerate's own classes and launcher. They are written out because importing
those takes torch along, and a config is checked in milliseconds.
"""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """The values that a key takes."""

    noun: str
    types: tuple[type, ...]
    choices: tuple[str, ...] = ()  # of text, in any case; a number counts as its digits
    exact: bool = False  # in this case alone


def one_of(*choices: str, exact: bool = False) -> Kind:
    """Text from a list."""
    return Kind(" or ".join(choices), (str,), choices, exact)


TEXT = Kind("text", (str,))
WHOLE = Kind("a whole number", (int,))
NUMBER = Kind("a number", (int, float))
SWITCH = Kind("true or false", (bool, str), ("true", "false", "yes", "no", "on", "off", "1", "0"))
BOOLEAN = Kind("true or false", (bool,))
LIST = Kind("a list", (list,))
SECTION = Kind("a section of keys", (dict,))
VERSION = Kind("1 or 2", (int, str), ("1", "2"))
SIZE = Kind("text or a whole number", (int, str))

PRECISIONS = ("no", "fp16", "bf16", "fp8")
ONE_PROCESS = ("NO", "MULTI_CPU")  # types whose launcher starts one, whatever num_processes says
PER_DEVICE = (
    *("MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA", "MULTI_XPU", "MULTI_HPU"),
    "MULTI_NEURON",
)
DISTRIBUTED_TYPES = (*ONE_PROCESS, *PER_DEVICE, "DEEPSPEED", "FSDP", "XLA", "MEGATRON_LM")
DYNAMO_BACKENDS = (
    *("no", "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt"),
    *("onnxrt", "tensorrt", "aot_torchxla_trace_once", "torchxla_trace_once", "tvm", "hpu_backend", "neuron"),
)
DYNAMO_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

# Types that this program refuses, and why; `hardware` refuses them too, however they were launched.
REFUSED = {
    "DEEPSPEED": "DeepSpeed owns the optimizer step and pickles its checkpoints; use multi_gpu.yaml instead",
    "MEGATRON_LM": "Megatron-LM owns the training loop; use multi_gpu.yaml instead",
}


class Must(NamedTuple):
    """What a setting of FSDP has to be."""

    values: tuple[str, ...]  # in lower case; empty: left out
    left_out: str  # what the launcher takes then
    why: str
    environment: str = ""  # variable that says it to the processes, where it is not FSDP_ and the key
    unsaid: str = "false"  # what Accelerate takes where it is not there


_NO = ("false", "no", "off", "0", "")
_SWITCHED = ("true", "yes", "on", "1", *_NO)

# Settings of FSDP by their keys, without the prefix; `hardware` holds them too, however FSDP was asked for.
FSDP_MUST = {
    "version": Must(("2",), "1", "the first FSDP keeps no tensor by its name", unsaid="1"),
    "auto_wrap_policy": Must(
        ("transformer_based_wrap",),
        "NO_WRAP",
        "weights are put together layer by layer: all at once they need the memory that FSDP saves, and smaller parts are not "
        "always called by themselves",
        unsaid="NO_WRAP",
    ),
    "transformer_layer_cls_to_wrap": Must(
        ("",), "", "which layers a model has is known", "FSDP_TRANSFORMER_CLS_TO_WRAP", ""
    ),
    "cpu_ram_efficient_loading": Must(
        _NO,
        "true",
        "every process makes the initial weights, from the recipe's seed; all but one would begin with none",
    ),
    "reshard_after_forward": Must(_SWITCHED, "true", "a strategy has a name in the first FSDP alone", unsaid="true"),
    "state_dict_type": Must(
        ("", "full_state_dict", "sharded_state_dict"),
        "",
        "Accelerate refuses another one, though a checkpoint is whole in any case",
        unsaid="",
    ),
    "offload_params": Must(_NO, "false", "training from the memory of the machine has not been tried"),
    "activation_checkpointing": Must(
        _NO, "false", "the trainer's own --gradient_checkpointing is held to repeat dropout"
    ),
    "activation_checkpointing_offload": Must(
        _NO, "false", "training from the memory of the machine has not been tried"
    ),
    "ignored_modules": Must(("",), "", "a checkpoint would lack what is not in shares", unsaid=""),
}
FSDP_PRECISIONS = ("no", "bf16")  # the loss scale of fp16, and fp8, have not been tried on shares


def fsdp_remedy(key: str) -> str:
    """What to do about a setting of FSDP."""
    values = FSDP_MUST[key].values
    if values[0] == "":
        return f"remove fsdp_{key}"
    wanted = "true or false" if values is _SWITCHED else values[0].upper() if "_" in values[0] else values[0]
    return f"write fsdp_{key}: {wanted}"


KEYS: dict[str, Kind] = {
    "compute_environment": one_of("LOCAL_MACHINE", "AMAZON_SAGEMAKER", exact=True),
    "distributed_type": one_of(*DISTRIBUTED_TYPES, exact=True),
    "mixed_precision": one_of(*PRECISIONS),
    "use_cpu": BOOLEAN,
    "debug": BOOLEAN,
    "num_processes": WHOLE,
    "machine_rank": WHOLE,
    "num_machines": WHOLE,
    "gpu_ids": TEXT,
    "main_process_ip": TEXT,
    "main_process_port": WHOLE,
    "rdzv_backend": TEXT,
    "same_network": BOOLEAN,
    "main_training_function": TEXT,
    "enable_cpu_affinity": BOOLEAN,
    "downcast_bf16": SWITCH,
    "tpu_name": TEXT,
    "tpu_zone": TEXT,
    "tpu_use_cluster": BOOLEAN,
    "tpu_use_sudo": BOOLEAN,
    "command_file": TEXT,
    "commands": LIST,
    "tpu_vm": LIST,
    "tpu_env": LIST,
    "fp16": BOOLEAN,  # of earlier versions: mixed_precision
    "dynamo_backend": one_of(*DYNAMO_BACKENDS),  # of earlier versions: dynamo_config
}

# Keys without the prefix that Accelerate allows before them.
_FP8 = {
    "backend": one_of("ao", "te", "msamp"),
    "use_autocast_during_eval": BOOLEAN,
    "margin": WHOLE,
    "interval": WHOLE,
    "format": one_of("HYBRID", "E4M3", "E5M2"),
    "amax_history_len": WHOLE,
    "amax_compute_algo": one_of("max", "most_recent"),
    "override_linear_precision": LIST,
    "opt_level": one_of("O1", "O2"),
    "enable_fsdp_float8_all_gather": SWITCH,
    "pad_inner_dim": SWITCH,
}
_FSDP = {
    "version": VERSION,
    "offload_params": SWITCH,
    "min_num_params": WHOLE,
    "sharding_strategy": Kind("a sharding strategy", (int, str)),
    "reshard_after_forward": Kind("true or false, or a sharding strategy", (bool, str)),
    "auto_wrap_policy": one_of("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"),
    "transformer_layer_cls_to_wrap": TEXT,
    "backward_prefetch": one_of("BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"),
    "state_dict_type": one_of("FULL_STATE_DICT", "LOCAL_STATE_DICT", "SHARDED_STATE_DICT"),
    "forward_prefetch": SWITCH,
    "use_orig_params": SWITCH,
    "cpu_ram_efficient_loading": SWITCH,
    "sync_module_states": SWITCH,
    "activation_checkpointing": SWITCH,
    "activation_checkpointing_offload": SWITCH,
    "ignored_modules": TEXT,
}
_DYNAMO = {
    "backend": one_of(*DYNAMO_BACKENDS),
    "mode": one_of(*DYNAMO_MODES),
    "use_fullgraph": BOOLEAN,
    "use_dynamic": BOOLEAN,
    "use_regional_compilation": BOOLEAN,
}
_DEEPSPEED = {
    "deepspeed_config_file": TEXT,
    "zero_stage": WHOLE,
    "offload_optimizer_device": one_of("none", "cpu", "nvme"),
    "offload_param_device": one_of("none", "cpu", "nvme"),
    "offload_optimizer_nvme_path": TEXT,
    "offload_param_nvme_path": TEXT,
    "gradient_accumulation_steps": SIZE,
    "gradient_clipping": Kind("a number", (int, float, str)),
    "zero3_init_flag": SWITCH,
    "zero3_save_16bit_model": SWITCH,
    "deepspeed_hostfile": TEXT,
    "deepspeed_exclusion_filter": TEXT,
    "deepspeed_inclusion_filter": TEXT,
    "deepspeed_multinode_launcher": TEXT,
    "deepspeed_moe_layer_cls_names": TEXT,
}
_PARALLELISM = {
    "dp_replicate_size": WHOLE,
    "dp_shard_size": WHOLE,
    "tp_size": WHOLE,
    "cp_size": WHOLE,
    "cp_backend": one_of("torch"),
    "cp_comm_strategy": one_of("allgather", "alltoall"),
    "sp_size": WHOLE,
    "sp_backend": one_of("deepspeed"),
    "sp_seq_length": SIZE,
    "sp_seq_length_is_variable": BOOLEAN,
    "sp_attn_implementation": TEXT,
}
_MEGATRON_LM = {
    **dict.fromkeys(["tp_degree", "pp_degree", "num_micro_batches", "recompute_num_layers"], WHOLE),
    **dict.fromkeys(["decoder_last_pipeline_num_layers", "expert_model_parallel_size"], WHOLE),
    **dict.fromkeys(["context_parallel_size"], WHOLE),
    **dict.fromkeys(["gradient_clipping", "attention_dropout", "hidden_dropout"], NUMBER),
    **dict.fromkeys(["recompute_granularity", "recompute_method", "attention_backend"], TEXT),
    **dict.fromkeys(["use_custom_fsdp", "no_load_optim", "eod_mask_loss", "no_save_optim"], SWITCH),
    **dict.fromkeys(["overlap_cpu_optimizer_d2h_h2d", "optimizer_cpu_offload", "sequence_parallelism"], SWITCH),
    **dict.fromkeys(["use_precision_aware_optimizer", "recompute_activations", "use_distributed_optimizer"], SWITCH),
    **dict.fromkeys(
        ["attention_softmax_in_fp32", "calculate_per_token_loss", "use_rotary_position_embeddings"], SWITCH
    ),
    "expert_tensor_parallel_size": SIZE,
}


class Nested(NamedTuple):
    """A section of the config."""

    keys: dict[str, Kind]  # as the launcher calls them
    prefix: str = ""  # that may be left out


def _prefixed(prefix: str, keys: dict[str, Kind]) -> dict[str, Kind]:
    return {prefix + key: kind for key, kind in keys.items()}


SECTIONS: dict[str, Nested] = {
    "fp8_config": Nested(_prefixed("fp8_", _FP8), "fp8_"),
    "fsdp_config": Nested(_prefixed("fsdp_", _FSDP), "fsdp_"),
    "dynamo_config": Nested(_prefixed("dynamo_", _DYNAMO), "dynamo_"),
    "deepspeed_config": Nested(_DEEPSPEED),
    "parallelism_config": Nested(_prefixed("parallelism_config_", _PARALLELISM)),
    "megatron_lm_config": Nested(_prefixed("megatron_lm_", _MEGATRON_LM)),
    "mpirun_config": Nested({"mpirun_hostfile": TEXT}),
}

# Options of `accelerate launch` that a config cannot hold.
OPTIONS = (
    *("num_cpu_threads_per_process", "max_restarts", "monitor_interval", "rdzv_conf", "log_dir", "role", "tee"),
    *("quiet", "module", "no_python", "vm", "env"),
)
