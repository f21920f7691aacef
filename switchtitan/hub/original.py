"""Dense weights from checkpoints of SwitchLoRA's original implementation.

The layout follows the functions that write it in github.com/asfsdsf/SwitchLoRA at commit 393e214:
`save_model` in llama/training_utils.py, `SwitchLoRAModel.save_pretrained` and `SwitchLoraLayer` in
switchlora/switch_lora.py. Tests build files from this description, since no original checkpoint was
available. The assumptions:

- A folder `model_<step>` holds `pytorch_model.bin`, or several files and
  `pytorch_model.bin.index.json`. Names are those of Hugging Face's LLaMA. Low-rank runs add
  `switch_lora_config.json` with `lora_alpha`.
- An adapted layer has `weight` [out, in], which does not contain the product of the factors
  (checkpoints are saved in training mode), `lora_A` [rank, in] and `lora_B` [out, rank]. The scale
  is lora_alpha / rank.
- Candidates, and bookkeeping such as `candidate_A_index_param` or `fixed_B_steps_param`, are not
  part of the dense weights and are ignored, as are the rotary frequencies of old versions of
  transformers. So the earlier publication (github.com/oddForPapergweiowio/SwitchLoRA at 5d9d65c),
  which numbers its candidates, can be read too.
"""

import json
import math
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from switchtitan.errors import CheckpointError, abbreviate
from switchtitan.files import file_inside
from switchtitan.hub.weight_files import find_weight_files

WEIGHTS_FILE = "pytorch_model.bin"
SCALE_FILE = "switch_lora_config.json"

_FACTORS = ("lora_A", "lora_B")
_IGNORED = re.compile(
    r"\.("
    r"candidates_[AB](\.\d+)?|candidates_[AB]_len_param|candidates_[AB]_weight_param(\.\d+)?"
    r"|candidate_[AB]_index_param|selected_[AB]_indices_param(\.\d+)?|fixed_[AB]_steps_param(\.\d+)?"
    r"|Wx|Ax|BAx|BA|deltaA|deltaB|deltaW|rotary_emb\.inv_freq"
    r")$"
)


def is_original(path: Path) -> bool:
    """Whether `path` is a folder in this layout."""
    return any((path / name).is_file() for name in (WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json"))


def read_original_dense(path: Path) -> dict[str, Tensor]:
    """Returns the plain model's weights of a full-rank or low-rank checkpoint, merged in fp32.

    Args:
        path: the folder `model_<step>`.

    Raises:
        CheckpointError: if files are missing or corrupted, or have another layout.
    """
    stored = _read_stored(path)
    dense = {name: tensor.float() for name, tensor in stored.items() if name.endswith(".weight")}
    unknown = [name for name in stored if name not in dense and not name.endswith(_FACTORS)]
    if unknown or not dense:
        raise CheckpointError(
            f"{path} is not a LLaMA checkpoint of the original implementation; "
            f"unknown names: {abbreviate(unknown) or 'none, and no weights'}"
        )
    layers = sorted({name.rpartition(".")[0] for name in stored if name.endswith(_FACTORS)})
    alpha = _read_alpha(path) if layers else 0.0
    for layer in layers:
        weight, lora_a, lora_b = _adapted_layer(stored, layer, path)
        product = lora_b.float() @ lora_a.float()
        dense[f"{layer}.weight"] = weight.float() + (alpha / lora_a.shape[0]) * product
    return dense


def _read_stored(path: Path) -> dict[str, Tensor]:
    """Reads weights and factors by stored name, with weights_only, so that no code in them runs."""
    stored: dict[str, Tensor] = {}
    for file in find_weight_files(path, WEIGHTS_FILE):
        try:
            part = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{file} holds objects other than tensors, which could run code, and is not "
                "loaded; save only the state dict"
            ) from error
        except Exception as error:  # torch.load raises many kinds for a damaged file
            raise CheckpointError(
                f"{file} is corrupted ({type(error).__name__}: {error}); replace it"
            ) from error
        if not isinstance(part, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in part.items()
        ):
            raise CheckpointError(f"{file} is not a state dict; expected tensors by name")
        _check_memory(part, file)
        stored.update({name: value for name, value in part.items() if not _IGNORED.search(name)})
    return stored


def _check_memory(part: dict[str, Tensor], file: Path) -> None:
    """Checks that copies of the tensors take no more memory than the file.

    Raises:
        CheckpointError: names the tensors that would, such as a repeated view of one number.
    """
    num_bytes = file.stat().st_size
    wrong = [
        name
        for name, value in part.items()
        if (value.layout, value.device.type) != (torch.strided, "cpu")
        or value.numel() * value.itemsize > num_bytes
    ]
    if wrong:
        raise CheckpointError(
            f"{file} holds tensors that are sparse or larger than the file: {abbreviate(wrong)}"
        )


def _adapted_layer(
    stored: dict[str, Tensor], layer: str, path: Path
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `weight`, `lora_A` and `lora_B` of a layer after checking their shapes."""
    parts = [stored.get(f"{layer}.{name}") for name in ("weight", *_FACTORS)]
    weight, lora_a, lora_b = parts
    if (
        weight is None
        or lora_a is None
        or lora_b is None
        or [part.ndim for part in (weight, lora_a, lora_b)] != [2, 2, 2]
        or weight.shape != (lora_b.shape[0], lora_a.shape[1])
        or lora_a.shape[0] != lora_b.shape[1]
    ):
        found = [None if part is None else list(part.shape) for part in parts]
        raise CheckpointError(
            f"{path}: {layer} has weight, lora_A, lora_B of shapes {found}; expected [out, in], "
            "[rank, in], [out, rank]. Quantized layers are not supported."
        )
    return weight, lora_a, lora_b


def _read_alpha(path: Path) -> float:
    file = path / SCALE_FILE
    if not file.is_file():
        raise CheckpointError(
            f'{file} is missing; write {{"lora_alpha": NUMBER}} there, with the lora_alpha of the '
            "run (its default was 1)"
        )
    try:
        text = file_inside(path, SCALE_FILE).read_text(encoding="utf-8")
        alpha = float(json.loads(text)["lora_alpha"])
        if not math.isfinite(alpha):
            raise ValueError(f"lora_alpha = {alpha}")
        return alpha
    except (ValueError, KeyError, TypeError, OverflowError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is corrupted ({error!r}); expected lora_alpha = a number"
        ) from error
