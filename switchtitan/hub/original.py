"""Checkpoints of SwitchLoRA's original implementation, read into our names.

The layout was read from github.com/asfsdsf/SwitchLoRA at commit 393e214, in the functions that write it:
`save_model` in llama/training_utils.py, `SwitchLoRAModel.save_pretrained` and `SwitchLoraLayer` in
switchlora/switch_lora.py. Tests build files after that description; none of theirs was at hand.
What is relied on:

- A folder `model_<step>` with `pytorch_model.bin`, or several files and `pytorch_model.bin.index.json`, whose
  names are those of Hugging Face's LLaMA. Low-rank runs add `switch_lora_config.json` with `lora_alpha`.
- An adapted layer has `weight` [out, in], which does not contain the factors' product (checkpoints are saved
  in training mode), `lora_A` [rank, in], `lora_B` [out, rank], which is ours transposed, `candidates_A` [c, in] and
  `candidates_B` [c, out], c = min(out, in). The scale is lora_alpha / rank.
- `candidate_{A,B}_index_param` is the next vector to be switched, `selected_{A,B}_indices_param` the slot
  that each vector came from. Both follow from the number of switches so far, which is found from them.
- Further bookkeeping (`*_len_param`, `*_weight_param`, `fixed_*_steps_param`, `deltaW`, ...) holds no weights
  and is left out, as are rotary frequencies that old versions of transformers stored.

An earlier publication (github.com/oddForPapergweiowio/SwitchLoRA at 5d9d65c) numbers its candidates
(`candidates_A.0`, ...) and draws them at random, which our ring cannot go on from: its weights can be read
merged, not as factors.
"""

import json
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from switchtitan.errors import CheckpointError, abbreviate
from switchtitan.hub.weight_files import find_weight_files

_OUR_NAME = {
    "weight": "weight",
    "lora_A": "lora_a",
    "lora_B": "lora_b",
    "candidates_A": "candidates_a",
    "candidates_B": "candidates_b",
}
_LEFT_OUT = re.compile(
    r"\.("
    r"candidate_[AB]_index_param|selected_[AB]_indices_param(\.\d+)?|fixed_[AB]_steps_param(\.\d+)?"
    r"|candidates_[AB]_len_param|candidates_[AB]_weight_param(\.\d+)?|candidates_[AB]\.\d+"
    r"|Wx|Ax|BAx|BA|deltaA|deltaB|deltaW|rotary_emb\.inv_freq"
    r")$"
)


@dataclass(frozen=True)
class OriginalCheckpoint:
    """A low-rank run of the original implementation in our names, types as stored."""

    tensors: dict[str, Tensor]
    """All weights; adapted layers have weight, lora_a, lora_b [rank, out], candidates_a and candidates_b [c, out]."""
    rank: int
    alpha: float
    """Scale times rank."""
    num_switched: dict[str, int]
    """Per adapted layer, the vectors switched so far on each side, modulo the least common multiple of rank
    and c: the ring has no other state."""


def read_original(path: Path, alpha: float | None = None) -> OriginalCheckpoint:
    """Reads a low-rank checkpoint with its factors and candidates.

    Args:
        path: the folder `model_<step>`, or its `pytorch_model.bin` alone.
        alpha: lora_alpha of the run; needed where switch_lora_config.json is not there.

    Raises:
        CheckpointError: if files are missing or damaged, or the layout is not the one described above.
    """
    stored = _read_stored(path)
    tensors = _translate(stored, path)
    layers = _adapted_layers(tensors, path)
    if not layers:
        raise CheckpointError(
            f"{path} holds no lora_A: it is a full-rank checkpoint; read it as dense weights"
        )
    for layer in layers:
        out, into = tensors[f"{layer}.weight"].shape
        num_candidates = min(out, into)
        shapes = {"candidates_a": (num_candidates, into), "candidates_b": (num_candidates, out)}
        for name, shape in shapes.items():
            candidates = tensors.get(f"{layer}.{name}")
            if candidates is None or candidates.shape != shape:
                raise CheckpointError(
                    f"{path}: {layer} has no {name} {list(shape)}, which switching goes on from; "
                    "import the merged weights instead"
                )
    rank = tensors[f"{layers[0]}.lora_a"].shape[0]
    return OriginalCheckpoint(
        tensors,
        rank,
        _find_alpha(path, alpha),
        {layer: _count_switches(stored, layer, path) for layer in layers},
    )


def read_original_dense(path: Path, alpha: float | None = None) -> dict[str, Tensor]:
    """Reads any checkpoint, full-rank or low-rank, as the plain model's weights; merged and kept in fp32.

    Args:
        path: the folder `model_<step>`, or its `pytorch_model.bin` alone.
        alpha: lora_alpha of a low-rank run; needed where switch_lora_config.json is not there.

    Raises:
        CheckpointError: if files are missing or damaged, or the layout is not the one described above.
    """
    tensors = _translate(_read_stored(path), path)
    layers = _adapted_layers(tensors, path)
    dense = {name: value.float() for name, value in tensors.items() if name.endswith("weight")}
    if layers:
        alpha = _find_alpha(path, alpha)
    for layer in layers:
        lora_a, lora_b = tensors[f"{layer}.lora_a"].float(), tensors[f"{layer}.lora_b"].float()
        assert alpha is not None
        dense[f"{layer}.weight"] = dense[f"{layer}.weight"] + (alpha / lora_a.shape[0]) * (lora_b.T @ lora_a)
    return dense


def _read_stored(path: Path) -> dict[str, Tensor]:
    """All tensors by stored name. Pickles are read with weights_only: nothing in them can run code."""
    stored: dict[str, Tensor] = {}
    for file in find_weight_files(path, "pytorch_model.bin"):
        try:
            part = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{file} holds other things than tensors, which could run code, and is not opened; "
                "save the state dict alone"
            ) from error
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); fetch it again") from error
        if not isinstance(part, dict) or not all(isinstance(value, Tensor) for value in part.values()):
            raise CheckpointError(f"{file} is not a state dict; expected tensors by name")
        stored.update(part)
    return stored


def _translate(stored: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Weights, factors and candidates under our names; bookkeeping left out."""
    tensors: dict[str, Tensor] = {}
    unknown = []
    for name, value in stored.items():
        layer, _, local = name.rpartition(".")
        if local in _OUR_NAME:
            tensors[f"{layer}.{_OUR_NAME[local]}"] = (
                value.T.contiguous() if local == "lora_B" and value.ndim == 2 else value
            )
        elif not _LEFT_OUT.search(name):
            unknown.append(name)
    if unknown or not any(name.endswith(".weight") for name in tensors):
        raise CheckpointError(
            f"{path} is not a LLaMA checkpoint of the original implementation; "
            f"unknown names: {abbreviate(unknown) or 'none, but no weight either'}"
        )
    return tensors


def _adapted_layers(tensors: dict[str, Tensor], path: Path) -> list[str]:
    """Layers with low-rank factors, whose shapes are checked against their weight's."""
    layers = sorted({name.rpartition(".")[0] for name in tensors if name.endswith((".lora_a", ".lora_b"))})
    for layer in layers:
        parts = [tensors.get(f"{layer}.{name}") for name in ("weight", "lora_a", "lora_b")]
        weight, lora_a, lora_b = parts
        if (
            weight is None
            or lora_a is None
            or lora_b is None
            or [part.ndim for part in (weight, lora_a, lora_b)] != [2, 2, 2]
            or weight.shape != (lora_b.shape[1], lora_a.shape[1])
            or lora_a.shape[0] != lora_b.shape[0]
        ):
            found = [None if part is None else list(part.shape) for part in parts]
            raise CheckpointError(
                f"{path}: {layer} has weight, lora_A, lora_B (transposed) of shapes {found}; expected [out, in], "
                "[rank, in], [rank, out]. Quantised layers cannot be read."
            )
    return layers


def _find_alpha(path: Path, alpha: float | None) -> float:
    file = (path if path.is_dir() else path.parent) / "switch_lora_config.json"
    if not file.is_file():
        if alpha is None:
            raise CheckpointError(
                f"{file} is missing; give the run's lora_alpha as alpha (its default was 1)"
            )
        return alpha
    try:
        stored = float(json.loads(file.read_text(encoding="utf-8"))["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}); expected lora_alpha = a number") from error
    if alpha is not None and alpha != stored:
        raise CheckpointError(f"alpha = {alpha} was given, but {file} says {stored}; leave alpha out")
    return stored


def _count_switches(stored: dict[str, Tensor], layer: str, path: Path) -> int:
    """The number p of switches on each side, from where the ring stands.

    After p switches A's next row is p mod rank, and its vectors, from the last one switched backwards, came
    from slots p - 1, p - 2, ... mod c; B's are the same, shifted by rank // 2 columns.
    """
    rank = stored[f"{layer}.lora_A"].shape[0]
    num_candidates = stored[f"{layer}.candidates_A"].shape[0]
    try:
        next_a = int(stored[f"{layer}.candidate_A_index_param"])
        next_b = int(stored[f"{layer}.candidate_B_index_param"])
        slots_a = stored[f"{layer}.selected_A_indices_param"].tolist()
        slots_b = stored[f"{layer}.selected_B_indices_param"].tolist()
        next_slot = (slots_a[next_a - 1] + 1) % num_candidates
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {layer} does not say where its ring stands ({error!r})") from error
    for switches in range(next_slot, math.lcm(rank, num_candidates), num_candidates):
        if switches % rank == next_a and (rank // 2 + switches) % rank == next_b:
            ring = {
                (switches - back) % rank: (switches - back) % num_candidates for back in range(1, rank + 1)
            }
            expected_a = [ring[row] for row in range(rank)]
            expected_b = [ring[(column - rank // 2) % rank] for column in range(rank)]
            if (slots_a, slots_b) == (expected_a, expected_b):
                return switches
    raise CheckpointError(
        f"{path}: the candidates of {layer} were not switched in order (option discontinuous_switch); "
        "import the merged weights instead"
    )
