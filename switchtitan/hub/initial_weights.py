"""Opens the dense weights of a checkpoint or of a folder, and the model that a folder describes."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from switchtitan.checkpoint.load import SavedTensors, find_given, read_metadata
from switchtitan.checkpoint.save import MODEL, SUMS_FILE
from switchtitan.contracts import LowRankUpdate, ModelConfig
from switchtitan.distributed.precision import full_precision
from switchtitan.errors import CheckpointError, ConfigError
from switchtitan.files import sha256_of_file
from switchtitan.hub.huggingface import (
    CONFIG_NAME,
    ReadWeight,
    check_shapes,
    read_config,
    read_dense,
)
from switchtitan.hub.peft_folder import (
    ADAPTER_CONFIG_NAME,
    folder_of_model,
    folders_of,
    is_adapter,
    merging_reader,
)
from switchtitan.methods import METHODS
from switchtitan.models import MODELS, plain_model
from switchtitan.numerics.fixed_point import values_of


def find_weights(path: Path) -> Path:
    """Returns the absolute path of weights: a safetensors file, a folder in Hugging Face's layout
    or with a PEFT adapter, which is merged, or a checkpoint or run of any method, whose newest
    checkpoint is read, and its checksums compared. Raises a CheckpointError if there are none."""
    return (path if _has_safetensors(path) else find_given(path)).absolute()


class DenseCheckpoint:
    """The fp32 weights of the plain model that is equivalent to a checkpoint's.

    `checkpoint` is as `find_given` returns it, which has verified all its bytes. Reads only the
    modules that are asked for, and no buffers. Raises a CheckpointError if the checkpoint is not
    complete, its tensors are not its model's, or this version does not know its model or method.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.metadata = read_metadata(checkpoint)
        saved = self.metadata.identity
        try:
            self.config = MODELS.restore(saved.get("model", {})).on_any_machine()
            """The plain model's section."""
            section = METHODS.restore(saved.get("method", {}))
        except ConfigError as error:
            raise CheckpointError(
                f"{checkpoint}: this version of switchtitan does not know {error}"
            ) from error
        seed = self.metadata.identity_value("job", "seed", int)
        self.method = METHODS.build(section, self.metadata.step, seed)
        model = plain_model(self.config)
        self.method.prepare_model(model)
        trained = dict(model.named_parameters())
        self._tensors = SavedTensors(checkpoint)
        found = self._tensors.on_meta
        self.on_meta = {name: found[MODEL + name] for name in trained if MODEL + name in found}
        """The parameters as the method trains them, by name, on the meta device."""
        dense = self.method.dense_weights(self.on_meta)
        self._stored = {name for name in dense if dense[name] is self.on_meta.get(name)}
        check_shapes(dense, self.config, f"{checkpoint}")

    @full_precision()
    def read(self, name: str) -> Tensor:
        """Returns a weight; a CheckpointError if it cannot be read."""
        module = name.rpartition(".")[0]
        return self.method.dense_weights(self._read_trained(module))[name]

    def read_rows(self, name: str, rows: range) -> Tensor:
        """Returns rows of a weight: what is saved of them, or computed from its entire module."""
        if name in self._stored:
            return self._tensors.read_rows(MODEL + name, rows)
        return self.read(name)[rows.start : rows.stop]

    def _read_trained(self, module: str) -> dict[str, Tensor]:
        """Returns the parameters of a module and its children, as the method trains them."""
        prefix = f"{module}." if module else ""
        names = [MODEL + name for name in self.on_meta if name.startswith(prefix)]
        read = self._tensors.read_full(names)
        return {name.removeprefix(MODEL): tensor for name, tensor in read.items()}

    def reader_of_base(self) -> ReadWeight:
        """Returns what reads weights without their low-rank updates, in fp32. Raises a
        CheckpointError if the method has none."""
        updated = self.method.low_rank_updates(self.on_meta)
        if not updated:
            raise CheckpointError(
                f"--format peft: [method] name = {self.method.config.name!r} has no frozen weights "
                "with a low-rank update; export it without --format"
            )

        def read(name: str) -> Tensor:
            module = name.rpartition(".")[0]
            if module not in updated:
                return self.read(name)
            return values_of(self._read_trained(module)[name], torch.float32)

        return read

    def updates(self) -> Iterator[tuple[str, LowRankUpdate]]:
        """Yields the low-rank update of each layer, by name, one in memory at a time."""
        for layer in self.method.low_rank_updates(self.on_meta):
            yield from self.method.low_rank_updates(self._read_trained(layer)).items()


class DenseFolder:
    """Weights of a safetensors file, or of a folder in Hugging Face's layout or with an adapter;
    memory-mapped. See `open_weights`."""

    metadata = None

    def __init__(self, source: Path, config: ModelConfig | None = None) -> None:
        file = folders_of(source)[-1] / CONFIG_NAME
        if config is None or file.is_file():
            described = MODELS.restore(read_model_folder(file.parent))
            config = config or described
            _check_same_model(described, config, file)
        weights = without_copies(read_dense(folder_of_model(source)), config, source)
        check_shapes(weights, config, f"[checkpoint] initial_weights = {str(source)!r}")
        self.config, self.read = config, merging_reader(source, weights)

    def read_rows(self, name: str, rows: range) -> Tensor:
        """Returns rows of a weight."""
        return self.read(name)[rows.start : rows.stop]


def open_weights(source: Path, config: ModelConfig | None) -> DenseCheckpoint | DenseFolder:
    """Opens the plain model's weights at a path that `find_weights` returned.

    `config`, the model's section, is by default the checkpoint's, or the one that a config.json
    next to the weights describes. Raises a CheckpointError if the weights do not match it, a
    ConfigError if there is none, or it describes no model that is supported.
    """
    if _has_safetensors(source):
        return DenseFolder(source, config)
    dense = DenseCheckpoint(source)
    _check_same_model(dense.config, config or dense.config, source)
    return dense


def _has_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors")))


def _check_same_model(theirs: ModelConfig, ours: ModelConfig, source: Path) -> None:
    """Compares also what shapes do not show, e.g. the number of heads."""
    found, expected = theirs.architecture(), ours.architecture()
    differing = "; ".join(
        f"{key} = {found.get(key)!r}, [model] has {expected.get(key)!r}"
        for key in expected | found
        if found.get(key) != expected.get(key)
    )
    if differing:
        raise CheckpointError(
            f"{source} describes another model: {differing}. Change [model] to match."
        )


def checksum(source: Path) -> str:
    """Returns a checksum of the weight files at `source`, or of a checkpoint's checksums."""
    files = [source] if source.is_file() else [*source.glob(SUMS_FILE)]
    if not files:
        files = [file for of in folders_of(source) for file in sorted(of.glob("*.safetensors"))]
        if is_adapter(source):  # the scale of its factors
            files.append(source / ADAPTER_CONFIG_NAME)
    return hashlib.sha256("".join(map(sha256_of_file, files)).encode()).hexdigest()


# The model that a folder describes.
def read_model_folder(folder: Path) -> dict[str, object]:
    """Returns all keys of `[model]` that a folder's config.json determines, with `name`.

    The folder is in Hugging Face's layout, or has a PEFT adapter, whose base model is read. Raises
    a ConfigError if there is no config.json, or it describes a model that is not supported, which
    names the keys, and what is supported.
    """
    try:
        file = folder_of_model(folder) / CONFIG_NAME
        found = read_config(file)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    model_type, supported = found.get("model_type"), set[str]()
    for name, config_type in MODELS.config_types().items():
        supported |= config_type.huggingface_types
        if str(model_type) in config_type.huggingface_types:
            try:
                return {"name": name, **config_type.keys_from_huggingface(found)}
            except ConfigError as error:
                raise ConfigError(f"{file}: {error}") from error
    expected = ", ".join(map(repr, sorted(supported)))
    raise ConfigError(f"{file}: model_type = {model_type!r}: expected one of {expected}")


def without_copies(
    tensors: dict[str, Tensor], config: ModelConfig, path: Path
) -> dict[str, Tensor]:
    """Returns the weights without those that repeat another, such as a tied head's. Raises a
    CheckpointError if a copy differs from the weight that it repeats."""
    kept = dict(tensors)
    for copy, name in config.weight_copies().items():
        if copy not in kept:
            continue
        repeated = kept.pop(copy)
        weight = kept.setdefault(name, repeated)
        if weight.dtype != repeated.dtype or not torch.equal(weight, repeated):
            raise CheckpointError(
                f"{path}: {copy} and {name} differ, but the model's head is tied "
                "(tie_word_embeddings in config.json); remove one of them, or untie the head"
            )
    return kept
