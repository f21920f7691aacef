"""Low-rank models as dense ones."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from switchtitan.distributed.shards import full_tensor
from switchtitan.methods.lowrank.linear import LowRankLinear


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """See `contracts.Method.merged_state_dict`: W + s B A in fp32 for low-rank layers, all other parameters as they are."""
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    merged: dict[str, Tensor] = {}
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        own = {
            name: full_tensor(parameter.detach()).to("cpu", torch.float32)
            for name, parameter in module.named_parameters(recurse=False)
        }
        if isinstance(module, LowRankLinear):
            lora_a, lora_b = own.pop("lora_a"), own.pop("lora_b")
            own["weight"] = torch.addmm(own["weight"], lora_b, lora_a, alpha=module.scale)
        if is_main:
            merged |= {prefix + name: tensor for name, tensor in own.items()}
    return merged


def merge_factors(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The dense weights that whole tensors by qualified name amount to: W + s B A where there are factors, no candidates."""
    merged = {}
    for name, tensor in tensors.items():
        prefix, _, local_name = name.rpartition(".")
        if local_name in ("lora_a", "lora_b", "candidates_a", "candidates_b"):
            continue
        if local_name == "weight" and f"{prefix}.lora_a" in tensors:
            lora_a, lora_b = tensors[f"{prefix}.lora_a"], tensors[f"{prefix}.lora_b"]
            tensor = torch.addmm(tensor.to(lora_a.dtype), lora_b, lora_a, alpha=scale)
        merged[name] = tensor
    return merged
