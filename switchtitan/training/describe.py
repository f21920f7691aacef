"""The run's folder, and its description in the log, the results and the checkpoints."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from switchtitan.checkpoint import CheckpointMetadata
from switchtitan.config.section import Section
from switchtitan.config.toml_files import parse_toml
from switchtitan.config.toml_text import flatten, toml_value
from switchtitan.contracts import LanguageModel, ModelConfig
from switchtitan.data import Corpus
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.dtype import ComputeDtype, DtypeName
from switchtitan.distributed.world import World, device_name, mesh_shape
from switchtitan.errors import OutputError
from switchtitan.files import write_atomically
from switchtitan.job.config import JobConfig
from switchtitan.job.sections import TrainingConfig
from switchtitan.models import linear_shapes
from switchtitan.models.head import Head, TiedHead
from switchtitan.observability import configure_logging
from switchtitan.observability.environment import commit, versions
from switchtitan.training.step import TrainState

logger = logging.getLogger(__name__)

_OLD_FROZEN_DTYPE = "float32"
"""dtype of frozen weights in checkpoints that do not state it."""
_FORMER_BEHAVIOUR: dict[str, tuple[str, object]] = {
    "optimizer.decay_norms": ("optimizer.weight_decay", True),
}
"""Keys whose default is not what was done before they existed: a key without which they have no
effect, and the former behaviour as a value."""


def run_identity(config: JobConfig, corpus: Corpus) -> dict:
    """Returns what must be equal in a run and a checkpoint that it resumes from.

    It determines the meaning of the tensors and of the position in the data.
    """
    return {
        **identity_without_corpus(config),
        "corpus": {
            "name": corpus.name,
            "fingerprint": corpus.fingerprint,
            # The source of a mixture whose tokenizer the run has.
            **({"first_source": corpus.index.fingerprint} if corpus.parts else {}),
        },
    }


def identity_without_corpus(config: JobConfig) -> dict:
    """Returns the part of `run_identity` that is known before the corpus is prepared."""
    return {
        "model": _without_resumable_keys(config.model),
        "method": _without_resumable_keys(config.method),
        "optimizer": config.optimizer.model_dump(mode="json", include={"name"}),
        "data": {"seq_len": config.data.seq_len},
        "training": config.training.model_dump(
            mode="json", include={"global_batch_size", "frozen_dtype"}
        ),
        "job": {"seed": config.job.seed},
    }


def _without_resumable_keys(section: Section) -> dict[str, object]:
    return section.model_dump(mode="json", exclude=set(section.resumable_keys))


def comparable_identity(saved: Mapping[str, object]) -> dict[str, object]:
    """Converts a checkpoint's identity to the current form of `run_identity`."""
    comparable = dict(saved)
    training = saved.get("training")
    if isinstance(training, Mapping):
        comparable["training"] = {"frozen_dtype": _OLD_FROZEN_DTYPE, **training}
    return comparable


def compute_dtype_of(metadata: CheckpointMetadata) -> DtypeName:
    """Returns the compute dtype of the run that saved a checkpoint.

    Older checkpoints state it in their configuration only.
    """
    config = flatten(parse_toml(metadata.config, "the saved configuration"))
    saved = metadata.train_state.get("compute_dtype") or config.get("training.dtype")
    return "float32" if saved == "float32" else "bfloat16"


def describe_run(
    config: JobConfig,
    world: World,
    model: LanguageModel,
    corpus: Corpus,
    compute_dtype: ComputeDtype,
    checkpoint: Path | None,
    changes: list[str],
    step: int,
) -> None:
    """Logs the model, corpus, devices, dtype, starting point, and changes since the checkpoint.

    Args:
        step: optimizer steps done before.
    """
    counts = [
        f"{number / 1e6:.2f} M {kind}" for kind, number in count_parameters(model).items() if number
    ]
    logger.info("%s: %s", config.job.name, ", ".join(counts))
    logger.info("corpus %s: %s", corpus.name, corpus.description)
    replicate, shard = world.mesh.shape
    logger.info(
        "%d rank(s) on %s: replicate %d x shard %d",
        world.size,
        device_name(world.device),
        replicate,
        shard,
    )
    num_nodes = world.size // world.num_local_ranks
    if crosses_nodes_needlessly(model, shard, world.num_local_ranks):
        logger.info(
            "shards span %d machines: with [parallelism] replicate = %d, each machine has a "
            "replica, and only gradients cross the network",
            -(-shard // world.num_local_ranks),
            num_nodes,
        )
    for notice in keys_without_effect(config.parallelism, config.training, world.size):
        logger.info(notice)
    if (of_head := head_notice(model, config.model)) is not None:
        logger.info(of_head)
    logger.info("compute dtype: %s", compute_dtype)
    if checkpoint is None:
        logger.info("starting a new run in %s", config.job.output_dir)
    else:
        logger.info("resuming from %s", checkpoint)
    if changes and world.is_main:
        logger.warning("changed since that checkpoint: %s", "; ".join(changes))
    computes_in_bf16 = compute_dtype.dtype == torch.bfloat16
    widths = unaligned_widths(model)
    if world.device.type == "cuda" and computes_in_bf16 and widths:
        logger.info(
            "matrices of width %s: rows in bf16 are not multiples of 16 bytes, which tensor cores "
            "are fastest with; multiples of 8 are",
            ", ".join(map(str, widths)),
        )
    compiles = config.compile.blocks or config.compile.loss or config.compile.optimizer
    if compiles and step < config.training.steps:
        logger.info(
            "compiling: the first step takes a minute or more; later runs use the cache; "
            "speed and ETA are measured from the second step"
        )


def keys_without_effect(
    parallelism: ParallelismConfig, training: TrainingConfig, num_ranks: int
) -> list[str]:
    """Returns notices of keys that gain nothing on this number of ranks.

    Not errors, since one configuration serves several numbers of ranks. Not `frozen_weights =
    "replicate"` on one rank, where it saves the frozen weights' copies in the compute dtype, and
    not `blocks_per_unit`, which saves host time there too.
    """
    _, shard = mesh_shape(parallelism, num_ranks)
    num_micro_batches = training.global_batch_size // (num_ranks * training.local_batch_size)
    notices = []
    if parallelism.accumulate_gradients == "sharded" and num_micro_batches == 1:
        notices.append('accumulate_gradients = "sharded" has no effect: a step has one micro-batch')
    elif parallelism.accumulate_gradients == "sharded" and shard == 1:
        notices.append(
            'accumulate_gradients = "sharded" only takes time: each rank holds all gradients'
        )
    return [f"[parallelism] {notice}" for notice in notices]


def head_notice(model: nn.Module, config: ModelConfig) -> str | None:
    """Returns a notice if the loss holds all logits in memory, since the model has no `Head`.

    Names the last linear layer with one row per token id.
    """
    modules = dict(model.named_modules())
    if any(isinstance(module, Head | TiedHead) for module in modules.values()):
        return None
    heads = [
        f"{name} is a {_plain_class(modules[name]).__name__}, not a Head"
        for name, (num_rows, _) in linear_shapes(config).items()
        if num_rows == config.vocab_size and name in modules
    ]
    return f"{heads[-1] if heads else 'the model has no Head'}: the loss holds all logits in memory"


def _plain_class(module: nn.Module) -> type:
    """Returns the class that a module had before sharding."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def crosses_nodes_needlessly(model: nn.Module, shard: int, num_local_ranks: int) -> bool:
    """Whether a replica is spread over more ranks than one machine's, which have room for it.

    The bound is for GPUs of 40 GB or more: half of one for weights, gradients and moments in fp32.
    """
    num_values = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    return shard > num_local_ranks and 16 * num_values / num_local_ranks < 20e9


def unaligned_widths(model: LanguageModel) -> list[int]:
    """Returns the sizes of matrices in the model's blocks whose rows in bf16 are not aligned.

    Tensor cores load rows that start at multiples of 16 bytes, which are 8 numbers.
    """
    return sorted(
        {
            size
            for block in model.blocks().values()
            for parameter in block.parameters()
            if parameter.ndim == 2
            for size in parameter.shape
            if size % 8
        }
    )


def changed_keys(saved_toml: str, current_toml: str) -> list[str]:
    """Returns the keys whose values differ in two configurations, as `key: old -> new`.

    Leaves out names and folders, the compute dtype, which can be "auto", and keys that only one of
    the two has. A key that is newer than the saved configuration counts if its value differs from
    the former behaviour.
    """
    before, now = (
        flatten(parse_toml(text, "the saved configuration")) for text in (saved_toml, current_toml)
    )
    former = {
        key: value
        for key, (needed, value) in _FORMER_BEHAVIOUR.items()
        if key not in before and before.get(needed)
    }
    old = before | former
    return [
        f"{key}: {toml_value(old[key])}{' (before this key)' if key in former else ''} -> "
        f"{toml_value(now[key])}"
        for key in now
        if key in old
        and old[key] != now[key]
        and key not in ("job.name", "job.output_dir", "data.cache_dir", "training.dtype")
    ]


def run_facts(
    config: JobConfig, world: World, model: nn.Module, corpus: Corpus, compute_dtype: ComputeDtype
) -> dict[str, object]:
    """Returns the facts in `results.json`: configuration, hardware, versions, corpus and sizes."""
    return {
        "method": config.method.model_dump(mode="json"),
        "optimizer": config.optimizer.model_dump(mode="json"),
        "seed": config.job.seed,
        "compute_dtype": compute_dtype.name,
        "compute_dtype_reason": compute_dtype.reason,
        "device": device_name(world.device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_ranks": world.size,
        "num_threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit() if world.is_main else None,
        "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint},
        "num_parameters": count_parameters(model),
    }


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Counts the values of trainable parameters, frozen parameters and buffers over all ranks."""
    parameters = list(model.parameters())
    return {
        "trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "frozen": sum(parameter.numel() for parameter in parameters if not parameter.requires_grad),
        "buffers": sum(buffer.numel() for buffer in model.buffers()),
    }


CONFIG_FILE = "config.toml"
"""File in the output folder with the configuration that the run started with."""
_RESUMED_CONFIG = re.compile(r"config-from-step-(\d+)\.toml")


def newest_config_file(output_dir: Path) -> tuple[Path, int]:
    """Returns the file with the configuration of a run's last part, and the step it is from."""
    files = {0: output_dir / CONFIG_FILE}
    for file in output_dir.iterdir():
        if match := _RESUMED_CONFIG.fullmatch(file.name):
            files[int(match.group(1))] = file
    step = max(files)
    return files[step], step


def write_config(output_dir: Path, resolved: str, step: int) -> None:
    """Writes the configuration that a run has from `step` on, if it is another than before."""
    if step == 0:
        write_atomically(output_dir / CONFIG_FILE, resolved)
        return
    newest, _ = newest_config_file(output_dir)
    if not newest.is_file() or newest.read_text(encoding="utf-8") != resolved:
        write_atomically(output_dir / f"config-from-step-{step}.toml", resolved)


def start_output(config: JobConfig, resolved: str, world: World, state: TrainState) -> None:
    """Opens the run's log file and writes its configuration.

    A resumed run writes its configuration next to the first one, if it is another.

    Raises:
        OutputError: on every rank, if that fails.
    """

    def start() -> None:
        if not world.is_main:
            return
        output_dir = config.job.output_dir
        try:
            configure_logging(is_main=True, log_file=output_dir / "train.log")
            if state.step < config.training.steps:
                write_config(output_dir, resolved, state.step)
        except OSError as error:
            raise OutputError(
                f"[job] output_dir = {str(output_dir)!r}: cannot be written ({error}); free space, "
                "or choose another"
            ) from error

    world.together(start)
