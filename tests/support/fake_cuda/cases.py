"""Runs that take steps on fake CUDA: every method, and every option that a step depends on."""

from support.tiny import METHOD_KEYS, tiny_config
from switchtitan.optim import OPTIMIZERS

NUM_RANKS = 8
PERIOD = 2
"""Steps after which all that happens in a case repeats."""

_HSDP = "--parallelism.replicate 2"
_ACCUMULATE = "--training.global_batch_size 16"
_SHARDED = f"{_ACCUMULATE} --parallelism.accumulate_gradients sharded"
_KEPT = f"{_ACCUMULATE} --parallelism.reshard_after_forward false"
_REPLICATED = "--parallelism.frozen_weights replicate"
_ON_HOST = "--method.candidates_device host"
_TWO_BLOCKS, _THREE_BLOCKS = "--model.num_layers 2", "--model.num_layers 3"
_BF16 = "--training.dtype bfloat16"
_MUON = "--optimizer.name muon"
_TIED = "--model.tied_head true"
_LLAMA3 = (
    "--model.rope_type llama3 --model.rope_factor 8 --model.rope_low_freq_factor 1 "
    "--model.rope_high_freq_factor 4 --model.rope_original_positions 8"
)
_QWEN2 = "--model.name qwen2 --model.rope_type linear --model.rope_factor 2"
_COLA = "--model.name cola --model.rank 4"

CASES = {
    "full rank": "full_rank",
    "lora": f"lora {_REPLICATED}",
    "low rank": "low_rank --optimizer.name scale",
    "relora": "relora",
    "relora, HSDP": f"relora {_HSDP} --method.reset_moments zero",
    "relora, replicated weights": f"relora {_REPLICATED} --method.reset_moments random",
    "galore": "galore",
    "fira, HSDP": f"fira {_HSDP}",
    "apollo": "apollo",
    "apollo mini, HSDP": f"apollo_mini {_HSDP}",
    "sltrain": "sltrain",
    "switchlora": "switchlora",
    "switchlora, HSDP": f"switchlora {_HSDP}",
    "constant candidates": "switchlora --method.candidates constant",
    "host candidates": f"switchlora {_ON_HOST}",
    "host candidates, HSDP": f"switchlora {_ON_HOST} {_HSDP}",
    "int16 weights": "switchlora --training.frozen_dtype int16",
    "one shard per replica": f"switchlora --parallelism.replicate 8 {_BF16}",
    "both moments, dropout": "switchlora --method.reset_moments both --method.dropout 0.1 "
    "--optimizer.weight_decay 0.1",
    "momentum, other rate": "switchlora --method.reset_moments momentum --method.init lora "
    "--optimizer.other_lr 1e-3",
    "nothing reset or frozen": "switchlora --method.reset_moments none --method.freeze_steps 0 "
    "--parallelism.reshard_after_forward false",
    "accumulation, HSDP": f"switchlora {_ACCUMULATE} {_HSDP}",
    "sharded accumulation": f"switchlora {_SHARDED}",
    "sharded accumulation, HSDP": f"switchlora {_SHARDED} {_HSDP}",
    "gathered once": f"switchlora {_KEPT}",
    "gathered once, recomputation": f"lora {_KEPT} --parallelism.blocks_per_unit 2 "
    f"--activation_checkpoint.mode full {_THREE_BLOCKS}",
    "selective recomputation": "switchlora --activation_checkpoint.mode selective",
    "full recomputation, accumulation": f"full_rank {_TWO_BLOCKS} {_ACCUMULATE} "
    "--activation_checkpoint.mode full",
    "factored": "lora --method.contraction factored",
    "merged": "lora --method.contraction merged",
    "dense gradient": "lora --method.contraction dense_gradient",
    "sgd, no clipping": "full_rank --optimizer.name sgd --training.max_grad_norm none",
    "skip": "full_rank --training.on_nonfinite skip",
    "adafactor": "full_rank --optimizer.name adafactor",
    "muon, HSDP": f"full_rank {_MUON} {_HSDP}",
    "muon, low rank": f"lora {_MUON} {_BF16}",
    "muon, switched, HSDP": f"switchlora {_MUON} --method.reset_moments both {_HSDP}",
    "tied head": f"switchlora {_TIED} {_LLAMA3}",
    "biases": f"full_rank {_QWEN2} {_TIED}",
    "CoLA": f"full_rank {_COLA}",
    "CoLA, HSDP": f"full_rank {_COLA} --model.activation none {_HSDP}",
    # Rows of at least 64 elements have moments in 8 bits.
    "adamw8bit": "full_rank --optimizer.name adamw8bit "
    "--model.hidden_size 64 --model.intermediate_size 128",
    "muon8bit": "switchlora --optimizer.name muon8bit --method.rank 32 "
    "--model.hidden_size 128 --model.intermediate_size 256 --training.trained_dtype bfloat16",
}
"""Name -> a method, and options as on the command line."""
_named = " ".join(CASES.values()).split()
# Rows that are new need nothing here.
CASES |= {method: method for method in METHOD_KEYS if method not in _named}
for _name in set(OPTIMIZERS) - {*_named, "adamw"}:
    CASES[_name] = f"full_rank --optimizer.name {_name}"

LONG = {"switchlora", "host candidates"}
"""Cases of which more steps are observed, with switches of many other vectors."""

UNEVEN = {
    *("full rank", "lora", "low rank", "relora", "relora, HSDP", "relora, replicated weights"),
    *("galore", "fira, HSDP", "sltrain", "switchlora", "switchlora, HSDP", "constant candidates"),
    *("host candidates", "host candidates, HSDP", "int16 weights"),
    *("sharded accumulation", "gathered once", "muon, low rank", "tied head"),
}
"""Cases that the last rank takes too: it has fewer rows, or none, and must do the same."""

ON_CPU = {
    *("full rank", "low rank", "relora, HSDP", "galore", "sltrain", "switchlora, HSDP"),
    *("host candidates", "sharded accumulation, HSDP", "gathered once", "muon, HSDP"),
    "muon, switched, HSDP",
}
"""Cases whose collectives are compared with those of the same run on a CPU."""

_OFTEN = {
    # Of 6 vectors, 1 and 2 in turn. Their counterparts are frozen for two steps.
    "switchlora": "--method.interval 4",
    "relora": "--method.reset_interval 2 --method.restart_warmup_steps 1",
    **dict.fromkeys(("galore", "fira", "apollo", "apollo_mini"), "--method.update_interval 2"),
}
"""Method -> options with this period: bases are renewed in steps 3, 5, ..., and resets follow steps
2, 4, ..."""


def num_steps_of(name):
    """Returns the number of steps of a case: the first, which fills caches, and a period."""
    return 6 if name in LONG else 1 + PERIOD


def method_of(name):
    return CASES[name].split()[0]


def config_of(folder, name):
    """Returns the configuration of a case, on `NUM_RANKS` ranks."""
    method, *options = CASES[name].split()
    # One sequence per rank and micro-batch; one block, unless options copy activations.
    options += ["--training.local_batch_size", "1"]
    if "--model.num_layers" not in options:
        options += ["--model.num_layers", "1"]
    if method != "full_rank":
        # A square, a wide and a tall weight: steps of all seven would take twice as long.
        options += ["--method.targets", "q_proj", "v_proj", "up_proj"]
    options += _OFTEN.get(method, "").split()
    return tiny_config(folder, method, *options, num_ranks=NUM_RANKS)
