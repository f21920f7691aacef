"""Checks of layer norms on fake CUDA tensors; each function runs in a new process."""

from pathlib import Path

import torch

from support.fake_cuda.cases import CASES
from support.fake_cuda.step_checks import Observed, observe, observed_stepper
from switchtitan.observability import MetricsConfig, Reporter
from switchtitan.training.layer_norms import LayerNorms

CHECKED = ("full_rank", "switchlora", "replicated weights", "switchlora, HSDP")


class ReadingEachLayer(LayerNorms):
    """A plant: reads the norm of every gradient."""

    def _measure_gradients(self) -> None:
        super()._measure_gradients()
        for _, parameter in self._parameters():
            if parameter.grad is not None:
                bool(torch.isfinite(parameter.grad.to_local().norm()))


def steps_with_norms(folder: str) -> dict[str, list[Observed]]:
    """Returns what is observed in two reported steps of each case, and of the plant."""
    hooks = {name: (CASES[name], LayerNorms) for name in CHECKED}
    hooks["plant"] = (CASES["full_rank"], ReadingEachLayer)
    found = {}
    for name, (settings, build) in hooks.items():
        with observed_stepper(Path(folder), settings, 0) as (stepper, races):
            config = MetricsConfig(interval=1, tensorboard=False, progress_bar=False)
            reporter = Reporter(config, Path(folder), num_steps=9, is_main=False)
            hook = build(stepper, reporter)

            def step(hook=hook, stepper=stepper) -> None:
                with hook.around(2):
                    stepper.step()

            found[name] = [observe(step, races) for _ in range(2)]
    return found
