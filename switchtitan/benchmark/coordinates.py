"""The coordinate check (Yang et al. 2022, arXiv 2203.03466, appendix D): by how much a step changes
what layers compute, over the hidden size. A learning rate can hold at every width only if that does
not depend on the width."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from switchtitan.benchmark.steppers import real_stepper
from switchtitan.config import raise_together
from switchtitan.contracts import Batch, LanguageModel
from switchtitan.distributed.config import CompileConfig
from switchtitan.distributed.shards import full_tensor
from switchtitan.distributed.world import device_type, temporary_world
from switchtitan.job.checks import check
from switchtitan.job.config import JobConfig
from switchtitan.methods import METHODS
from switchtitan.models import MODELS, plain_model

RESIDUAL = "residual stream"
_NUM_STEPS, _NUM_SEQUENCES = 4, 4
_RATE_FACTOR = 0.1
"""As early in a warm-up."""
_WIDTHS = "hidden_size", "intermediate_size", "num_heads", "num_kv_heads"


class Call(NamedTuple):
    """What a module was called with, and what it returned."""

    inputs: Tensor
    output: Tensor


def at_hidden_size(config: JobConfig, hidden_size: int) -> JobConfig:
    """Returns the configuration, of LLaMA's family, at another hidden size: other widths and the
    rank in proportion, heads as wide as before. Raises a ConfigError if it cannot be trained."""
    model, method = (section.model_dump(mode="json") for section in (config.model, config.method))
    sizes = config.model.architecture()

    def scaled(width: object) -> int:
        return max(1, round(int(str(width)) * hidden_size / int(str(sizes["hidden_size"]))))

    model |= {key: scaled(sizes[key]) for key in _WIDTHS}
    model |= {"size": None, "head_dim": sizes["head_dim"]}
    if "rank" in method:
        method["rank"] = scaled(method["rank"])
    update = {"model": MODELS.restore(model), "method": METHODS.restore(method)}
    config = config.model_copy(update={**update, "compile": CompileConfig()})
    raise_together(check(config, 1, device_type()))
    return config


def changes_in_a_step(config: JobConfig) -> dict[str, float]:
    """Returns the root mean square of changes in steps 2 to 4 of a run, at a tenth of its rates.

    By name: for linear layers and the embedding, the change of the output on the inputs of before,
    divided by their root mean square; for `RESIDUAL`, that of the blocks' outputs. The geometric
    mean over layers of a name and steps.
    """
    logs: dict[str, list[float]] = {}
    method = METHODS.build(config.method, config.training.steps, config.job.seed)
    with temporary_world(), real_stepper(config) as stepper, torch.no_grad():
        stepper.lr_schedule = lambda step: _RATE_FACTOR
        batch = Batch(*(part[:_NUM_SEQUENCES] for part in next(stepper.batches)[0]))
        model = plain_model(config.model).eval()
        before: dict[nn.Module, Call] = {}
        for step in range(_NUM_STEPS):
            with torch.enable_grad():
                stepper.step()
            named = stepper.model.named_parameters()
            tensors = {name: full_tensor(value.detach()).cpu() for name, value in named}
            model.load_state_dict(method.dense_weights(tensors), assign=True)
            calls = record_calls(model, batch)
            for name, module in model.named_modules():
                if step and module in calls:
                    kind, change = _change(name, module, before[module], calls[module])
                    logs.setdefault(kind, []).append(np.log(change))
            before = calls
    return {kind: float(np.exp(np.mean(of))) for kind, of in logs.items()}


def record_calls(model: LanguageModel, batch: Batch) -> dict[nn.Module, Call]:
    """Returns the calls of a pass, of embedding, linear layers and blocks."""
    calls: dict[nn.Module, Call] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] = Call(inputs[0], output)

    blocks = set(model.blocks().values())
    modules = (it for it in model.modules() if isinstance(it, nn.Linear | nn.Embedding))
    handles = [module.register_forward_hook(record) for module in (*modules, *blocks)]
    model(batch.tokens, batch.document_ids)
    for handle in handles:
        handle.remove()
    return calls


def _change(name: str, module: nn.Module, before: Call, after: Call) -> tuple[str, float]:
    if not isinstance(module, nn.Linear | nn.Embedding):
        return RESIDUAL, _rms(after.output - before.output)
    size = 1.0 if isinstance(module, nn.Embedding) else _rms(before.inputs)
    return name.rpartition(".")[2], _rms(module(before.inputs) - before.output) / size


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def slopes(by_hidden_size: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Returns by name the exponent e of the change, about hidden_size^e."""
    sizes = np.log(list(by_hidden_size))
    return {
        name: float(np.polyfit(sizes, np.log([of[name] for of in by_hidden_size.values()]), 1)[0])
        for name in next(iter(by_hidden_size.values()))
    }
