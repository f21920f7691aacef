"""The coordinate check (Yang et al. 2022, arXiv 2203.03466, appendix D): by how much a step changes
what layers compute, over the hidden size. A learning rate can hold at every width only if that does
not depend on the width."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from switchtitan.contracts import Batch, LanguageModel
from switchtitan.distributed.config import CompileConfig
from switchtitan.distributed.shards import gather_on_main
from switchtitan.distributed.world import device_type, temporary_world
from switchtitan.errors import ConfigError
from switchtitan.job.checks import check
from switchtitan.job.config import JobConfig
from switchtitan.methods import METHODS
from switchtitan.models import MODELS, plain_model
from switchtitan.models.llama.config import LlamaFamilyConfig
from switchtitan.registry import Section
from switchtitan.workbench.benchmark.steppers import real_stepper

RESIDUAL = "residual stream"
_NUM_STEPS, _NUM_SEQUENCES = 4, 4
_RATE_FACTOR = 0.1
"""As early in a warm-up."""

Calls = dict[nn.Module, tuple[Tensor, Tensor]]
"""Module -> what it was called with, and what it returned."""


def at_hidden_size(config: JobConfig, hidden_size: int) -> JobConfig:
    """Returns the configuration at another hidden size: other widths and the rank in proportion,
    heads as wide as before. Raises a ConfigError if it cannot be trained, or is not of LLaMA's
    family."""
    model = config.model.on_any_machine()
    if not isinstance(model, LlamaFamilyConfig):
        raise ConfigError(f"[model] name = {model.name!r}: expected a model of LLaMA's family")
    ratio = hidden_size / model.sizes.hidden_size

    def widened(section: Section, **widths: int) -> dict[str, Any]:
        if (rank := getattr(section, "rank", None)) is not None:
            widths["rank"] = rank
        scaled = {key: max(1, round(width * ratio)) for key, width in widths.items()}
        return section.model_dump(mode="json") | scaled

    widths = {**model.sizes._asdict(), "num_kv_heads": model.kv_heads}
    widths.pop("num_layers")
    update = {
        "model": MODELS.restore(widened(model, **widths) | {"head_dim": model.head_width}),
        "method": METHODS.restore(widened(config.method)),
        "compile": CompileConfig(),
    }
    config = config.model_copy(update=update)
    check(config, 1, device_type())
    return config


def changes_in_a_step(config: JobConfig) -> dict[str, float]:
    """Returns the root mean square of changes in steps 2 to 4 of a run on one rank, at a tenth of
    its rates: the geometric mean over steps and all layers of a name.

    By name: of linear layers, the change of the output on the inputs of before, divided by their
    root mean square; of the embedding, that change; for `RESIDUAL`, that of the blocks' outputs.
    """
    logs: dict[str, list[float]] = {}
    method = METHODS.build(config.method, config.training.steps, config.job.seed)
    with temporary_world(), real_stepper(config) as stepper, torch.no_grad():
        stepper.lr_schedule = lambda step: _RATE_FACTOR
        batch = Batch(*(part[:_NUM_SEQUENCES] for part in next(stepper.batches)[0]))
        model, before = plain_model(config.model).eval(), Calls()
        for step in range(_NUM_STEPS):
            with torch.enable_grad():
                stepper.step()
            tensors = gather_on_main(stepper.model.named_parameters(), is_main=True)
            model.load_state_dict(method.dense_weights(tensors), assign=True)
            calls = record_calls(model, batch)
            for name, module in model.named_modules():
                if step and module in calls:
                    kind, change = _change(name, module, *before[module], calls[module][1])
                    logs.setdefault(kind, []).append(np.log(change))
            before = calls
    return {kind: float(np.exp(np.mean(of))) for kind, of in logs.items()}


def record_calls(model: LanguageModel, batch: Batch) -> Calls:
    """Returns the calls of a pass, of embedding, linear layers and blocks."""
    calls = Calls()

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] = inputs[0], output

    blocks = set(model.blocks().values())
    modules = (it for it in model.modules() if isinstance(it, nn.Linear | nn.Embedding))
    handles = [module.register_forward_hook(record) for module in (*modules, *blocks)]
    model(batch.tokens, batch.document_ids)
    for handle in handles:
        handle.remove()
    return calls


def _change(
    name: str, module: nn.Module, inputs: Tensor, before: Tensor, after: Tensor
) -> tuple[str, float]:
    if not isinstance(module, nn.Linear | nn.Embedding):
        return RESIDUAL, _rms(after - before)
    size = 1.0 if isinstance(module, nn.Embedding) else _rms(inputs)
    return name.rpartition(".")[2], _rms(module(inputs) - before) / size


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def slopes(by_hidden_size: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Returns by name the exponent e of the change, about hidden_size^e."""
    sizes, changes = np.log(list(by_hidden_size)), list(by_hidden_size.values())
    return {
        name: float(np.polyfit(sizes, np.log([of[name] for of in changes]), 1)[0])
        for name in changes[0]
    }
