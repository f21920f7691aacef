"""Runs that take steps on fake CUDA: every method, and every option that a step depends on."""

from pathlib import Path

from support.packages import HAS_TORCHAO
from support.tiny import METHOD_KEYS, tiny_config
from switchtitan.job.config import JobConfig

NUM_RANKS = 8
# One sequence per rank and micro-batch.
_BASE = ("--training.local_batch_size", "1")
# A square, a wide and a tall weight: steps of all seven would take twice as long.
_TARGETS = ("--method.targets", "q_proj", "v_proj", "up_proj")
# One block is enough for options that do not copy activations.
_SHALLOW, _TWO_BLOCKS, _DEEP = (("--model.num_layers", str(number)) for number in (1, 2, 3))

_ON_HOST = ("--method.candidates_device", "host")
_LEAST_MOVING = ("--method.order", "least_moving", "--method.freeze_steps", "1")
_BF16 = ("--training.frozen_dtype", "bfloat16")
_REPLICATED = ("--parallelism.frozen_weights", "replicate")
_HSDP = ("--parallelism.replicate", "2")
_ACCUMULATE = ("--training.global_batch_size", "16")
_SHARDED = ("--parallelism.accumulate_gradients", "sharded")
_GATHER_ONCE = ("--parallelism.frozen_weights", "gather_once")
_UNITS = ("--parallelism.blocks_per_unit", "2")
_FULL = ("--activation_checkpoint.mode", "full")
_OFFLOAD = (*_FULL, "--activation_checkpoint.offload", "true")
_TIED = ("--model.tied_head", "true")
_LLAMA3 = (
    *("--model.rope_type", "llama3", "--model.rope_factor", "8", "--model.rope_low_freq_factor"),
    *("1", "--model.rope_high_freq_factor", "4", "--model.rope_original_positions", "8"),
)
_LINEAR = ("--model.rope_type", "linear", "--model.rope_factor", "2")
_QWEN2 = ("--model.name", "qwen2")
_COLA = ("--model.name", "cola", "--model.rank", "4")
_MUON = ("--optimizer.name", "muon")
# Matrices of at least 4096 elements have moments in 8 bits.
_WIDE = ("--model.hidden_size", "64", "--model.intermediate_size", "128")

CASES: dict[str, list[str]] = {
    **{method: [method] for method in METHOD_KEYS},
    **{f"{method}, HSDP": [method, *_HSDP] for method in METHOD_KEYS},
    "constant candidates": ["switchlora", "--method.candidates", "constant"],
    "bf16 candidates": ["switchlora", "--method.candidates_dtype", "bfloat16"],
    "host candidates": ["switchlora", *_ON_HOST],
    "bf16 host candidates, HSDP": [
        "switchlora",
        *_ON_HOST,
        *_HSDP,
        *("--method.candidates_dtype", "bfloat16"),
    ],
    "bf16 weights": ["switchlora", *_BF16],
    "bf16 weights, replicated": ["switchlora", *_BF16, *_REPLICATED],
    "replicated weights": ["switchlora", *_REPLICATED],
    "lora, replicated weights": ["lora", *_REPLICATED],
    "one shard per replica": ["switchlora", "--parallelism.replicate", "8"],
    "no resharding": ["switchlora", "--parallelism.reshard_after_forward", "false"],
    "bf16 compute": ["switchlora", "--training.dtype", "bfloat16"],
    "reset both moments, dropout": [
        "switchlora",
        *("--method.reset_moments", "both"),
        *("--method.dropout", "0.1"),
        *("--optimizer.weight_decay", "0.1"),
    ],
    "reset momentum, other learning rate": [
        "switchlora",
        *("--method.reset_moments", "momentum"),
        *("--method.init", "lora"),
        *("--optimizer.other_lr", "1e-3"),
    ],
    "rescale moments": ["switchlora", "--method.reset_moments", "rescaled"],
    "rescale moments, HSDP": ["switchlora", "--method.reset_moments", "rescaled", *_HSDP],
    "least moving": ["switchlora", *_LEAST_MOVING],
    "least moving, constant candidates, HSDP": [
        "switchlora",
        *_LEAST_MOVING,
        *_HSDP,
        *("--method.candidates", "constant"),
    ],
    "keep moments, freeze nothing": [
        "switchlora",
        *("--method.reset_moments", "none"),
        *("--method.freeze_steps", "0"),
    ],
    "accumulation": ["switchlora", *_ACCUMULATE],
    "accumulation, HSDP": ["switchlora", *_ACCUMULATE, *_HSDP],
    "sharded accumulation": ["switchlora", *_ACCUMULATE, *_SHARDED],
    "sharded accumulation, HSDP": ["switchlora", *_ACCUMULATE, *_SHARDED, *_HSDP],
    "frozen weights gathered once": ["switchlora", *_ACCUMULATE, *_GATHER_ONCE],
    "frozen weights gathered once, recomputation": [
        "lora",
        *(*_GATHER_ONCE, *_UNITS, *_DEEP, *_FULL, *_ACCUMULATE),
    ],
    "frozen weights gathered once, HSDP": ["switchlora", *_GATHER_ONCE, *_HSDP],
    "units of two blocks": ["switchlora", *_DEEP, "--parallelism.blocks_per_unit", "2"],
    "bf16 moments": ["full_rank", "--optimizer.moments_dtype", "bfloat16"],
    "bf16 moments, low rank": ["switchlora", "--optimizer.moments_dtype", "bfloat16"],
    "full recomputation": ["switchlora", *_FULL],
    "selective recomputation": ["switchlora", "--activation_checkpoint.mode", "selective"],
    "offload": ["switchlora", *_OFFLOAD, *_DEEP],
    "offload and accumulation": ["full_rank", *_OFFLOAD, *_TWO_BLOCKS, *_ACCUMULATE],
    "offload and host candidates": ["switchlora", *_OFFLOAD, *_TWO_BLOCKS, *_ON_HOST],
    "factored": ["lora", "--method.contraction", "factored"],
    "merged": ["lora", "--method.contraction", "merged"],
    "dense gradient": ["lora", "--method.contraction", "dense_gradient"],
    "random resets": ["relora", "--method.reset_moments", "random"],
    "resets to zero": ["relora", "--method.reset_moments", "zero"],
    "resets of replicated weights": ["relora", *_REPLICATED],
    "no clipping": ["full_rank", "--training.max_grad_norm", "none"],
    "skip": ["full_rank", "--training.on_nonfinite", "skip"],
    "sgd": ["full_rank", "--optimizer.name", "sgd"],
    "sgd, low rank": ["lora", "--optimizer.name", "sgd"],
    "scale": ["full_rank", "--optimizer.name", "scale"],
    "scale, low rank": ["lora", "--optimizer.name", "scale"],
    "adafactor": ["full_rank", "--optimizer.name", "adafactor"],
    "muon": ["full_rank", *_MUON],
    "muon, HSDP": ["full_rank", *_MUON, *_HSDP],
    "muon, switched": ["switchlora", *_MUON, "--training.dtype", "bfloat16"],
    "muon, switched, HSDP": [
        "switchlora",
        *_MUON,
        *_HSDP,
        *("--method.reset_moments", "both"),
        *("--optimizer.weight_decay", "0.1"),
    ],
    "muon, low rank, bf16 compute": ["lora", *_MUON, "--training.dtype", "bfloat16"],
    "tied head": ["switchlora", *_TIED, *_LLAMA3],
    "tied head, accumulation, HSDP": ["full_rank", *_TIED, *_ACCUMULATE, *_HSDP],
    "biases": ["switchlora", *_QWEN2, *_LINEAR],
    "biases, HSDP": ["full_rank", *_QWEN2, *_TIED, *_HSDP],
    "CoLA": ["full_rank", *_COLA],
    "CoLA without silu, HSDP": ["full_rank", *_COLA, "--model.activation", "none", *_HSDP],
}
if HAS_TORCHAO:
    CASES["adamw8bit"] = ["full_rank", "--optimizer.name", "adamw8bit", *_WIDE]


PERIOD = 2
"""Steps after which all that happens in a case repeats."""
_OFTEN = {
    # Of 6 vectors, 1 and 2 in turn. Their counterparts are frozen for two steps.
    "switchlora": ("--method.interval", "4"),
    "relora": ("--method.reset_interval", "2", "--method.restart_warmup_steps", "1"),
    **dict.fromkeys(("galore", "fira", "apollo", "apollo_mini"), ("--method.update_interval", "2")),
}
"""Method -> settings with this period: bases are renewed in steps 3, 5, ..., and resets follow
steps 2, 4, ..."""

LONG = {"switchlora", "host candidates", "least moving", "relora"}
"""Cases of which all steps up to the tenth are observed, with switches of many other vectors."""
_NUM_STEPS_OF_LONG = 10


def num_steps_of(name: str) -> int:
    """Returns the number of steps of a case: the first, which fills caches, and a period."""
    return _NUM_STEPS_OF_LONG if name in LONG else 1 + PERIOD


COUNTED_ON_CPU = {
    *METHOD_KEYS,
    *(f"{method}, HSDP" for method in METHOD_KEYS),
    "host candidates",
    "least moving",
    "replicated weights",
    "accumulation",
    "accumulation, HSDP",
    "sharded accumulation",
    "sharded accumulation, HSDP",
    "frozen weights gathered once",
    "frozen weights gathered once, HSDP",
    "scale",
    "tied head",
    "biases",
    "muon",
    "muon, HSDP",
    "muon, switched",
    "muon, switched, HSDP",
}
"""Cases whose collectives are compared with those of the same run on a CPU."""


def config_of(folder: Path, settings: list[str]) -> JobConfig:
    """Returns the configuration of a case, on `NUM_RANKS` ranks."""
    method, *overrides = settings
    if _SHALLOW[0] not in overrides:
        overrides += _SHALLOW
    if method != "full_rank":
        overrides += _TARGETS
    overrides += _OFTEN.get(method, ())
    return tiny_config(folder, method, *_BASE, *overrides, num_ranks=NUM_RANKS)
