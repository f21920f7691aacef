"""Low-rank pretraining of LLaMA-like models: SwitchLoRA on FSDP2 and torch.compile."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from switchtitan.library.applied import AppliedMethod

__version__ = "0.4.0"


def apply(
    model: "nn.Module", name: str = "switchlora", *, num_steps: int, seed: int = 0, **keys: Any
) -> "AppliedMethod":
    """Applies a method to any module, in place; for a training loop of your own.

        method = switchtitan.apply(model, "switchlora", num_steps=10_000, rank=128)
        optimizer = method.optimizer(lr=1e-2)

    Linear layers are replaced, and the model still computes the same, to rounding. Their weights
    and biases stay the given tensors, on their device, which may be meta; weights are frozen. Other
    parameters are not touched. Call before `fully_shard`, DistributedDataParallel and
    `torch.compile`.

    Args:
        name, keys: those of the section `[method]`, e.g. `rank`. Of `targets`, the default is all
            `nn.Linear` in each `nn.ModuleList`, and in each `nn.Sequential` of one class.
        num_steps: optimizer steps of the whole run, from which follows when vectors are switched.
        seed: of factors and candidates: the same on every rank, and when the run resumes.

    Raises:
        switchtitan.errors.ConfigError: names the key, its value and what was expected.
    """
    # Imported here: with torch.distributed.tensor it takes as long as `import torch`.
    from switchtitan.library.applied import AppliedMethod

    return AppliedMethod(model, name, num_steps, seed, keys)
