"""The contracts between packages: what a model, a method, an optimizer and their sections must offer to the rest."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from switchtitan.config.section import NamedSection

IGNORED_TARGET = -100
"""A target token with this value does not count in the loss (torch's `ignore_index`)."""


class Batch(NamedTuple):
    """One micro-batch on one rank."""

    tokens: Tensor
    """[batch, seq] int64."""
    targets: Tensor
    """[batch, seq] int64: the next token, or `IGNORED_TARGET`."""
    document_ids: Tensor
    """[batch, seq] int32: equal for tokens of the same document, rising along a sequence."""


class ModelConfig(NamedSection):
    """The base class of every `[model]` section."""

    vocab_size: int = Field(gt=0)
    """Number of token ids that the embedding and the head know."""

    def architecture(self) -> dict[str, object]:
        """The keys that the weights belong to, as plain values: a model takes the weights of one with equal ones. By default
        all keys."""
        return self.model_dump(mode="json")

    def huggingface_config(self, seq_len: int) -> dict[str, object] | None:
        """The `config.json` with which transformers loads the weights under the same names; None if no class of theirs does.

        Args:
            seq_len: tokens per sequence in training.
        """
        return None

    def check_huggingface_config(self, found: Mapping[str, Any]) -> list[str]:
        """Return what a `config.json` next to the weights says that does not fit this model; nothing by default."""
        return []

    @abstractmethod
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear layer, the head included, by qualified name. Builds no model."""

    def check_device(self, device_type: str, compute_dtype: torch.dtype) -> None:
        """Check that the model can train on such a device.

        Args:
            device_type: "cpu" or "cuda".
            compute_dtype: dtype of activations.

        Raises:
            EnvironmentMismatchError: if it cannot. The default raises nothing.
        """


class MethodConfig(NamedSection):
    """The base class of every `[method] name = "..."` section."""

    freezes_weights: ClassVar[bool] = False
    """Whether `Method.prepare_model` freezes some weights."""

    optimizers: ClassVar[frozenset[str] | None] = None
    """Names of the optimizers that the method can train with; None for all."""
    treats_all_parameters: ClassVar[bool] = False
    """Whether no parameter is left for `[optimizer] other_lr`."""

    def check_model(self, linear_shapes: dict[str, tuple[int, int]]) -> list[str]:
        """Return error messages for a model with linear layers [out, in] of these names; none by default."""
        return []

    def check_length(self, num_steps: int) -> list[str]:
        """Return error messages for a run of `num_steps` optimizer steps; none by default."""
        return []


MethodConfigT = TypeVar("MethodConfigT", bound=MethodConfig)
"""The class of a method's section."""


class OptimizerConfig(NamedSection):
    """The base class of every `[optimizer]` section."""

    can_compile: ClassVar[bool] = True
    """Whether `[compile] optimizer` can be set."""
    max_ranks: ClassVar[int | None] = None
    """The most ranks that it can train on; None for any number."""
    lr: float = Field(gt=0)
    """Peak learning rate, above 0."""
    other_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate, above 0, of the parameters that the method leaves as they are: embedding, norms, head, biases and
    layers not among its targets. Unset: lr. Has no effect with full_rank."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay, at least 0."""
    decay_norms: bool = False
    """Whether weight decay applies to norms and other parameters of one dimension too. Has no effect without weight decay."""

    @model_validator(mode="after")
    def _check_decay_norms(self) -> "OptimizerConfig":
        if self.weight_decay == 0 and "decay_norms" in self.model_fields_set:
            raise ValueError("decay_norms has no effect with weight_decay = 0; remove it")
        return self


ApplyHead = Callable[[Tensor, nn.Module], Tensor]
"""What a model's last hidden states [batch, seq, dim] and its head are to yield; the head is a module that makes logits
[..., vocabulary] of hidden states [..., dim]."""


def default_apply_head(hidden: Tensor, head: nn.Module) -> Tensor:
    """An `ApplyHead`: logits [batch, seq, vocabulary]."""
    logits: Tensor = head(hidden)
    return logits


class CallBlock(Protocol):
    """How a model calls its blocks."""

    def __call__(self, block: nn.Module, hidden: Tensor, *args: object) -> Tensor:
        """`block(hidden, *args)`, with hidden states [batch, seq, dim] as argument and result."""
        ...


def default_call_block(block: nn.Module, hidden: Tensor, *args: object) -> Tensor:
    """A `CallBlock` that does nothing else."""
    output: Tensor = block(hidden, *args)
    return output


class SummedLoss(Protocol):
    """The training loss from a model's last hidden states."""

    def __call__(
        self, hidden: Tensor, head: nn.Module, targets: Tensor, divisor: int = 1
    ) -> Tensor:
        """The sum over targets [batch, seq], but `IGNORED_TARGET`, divided by `divisor`; 0-dim. The rest as in `ApplyHead`."""
        ...


class LanguageModel(nn.Module, ABC):
    """The base class of every model. Its linear layers are `nn.Linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.call_block: CallBlock = default_call_block
        """How `forward` calls each block; activation offloading puts its own function here."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids that the model can embed."""

    @abstractmethod
    def blocks(self) -> dict[str, nn.Module]:
        """The repeated blocks by qualified name, in order: the units of sharding, checkpointing and compilation."""

    @abstractmethod
    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The initial value, fp32 on the CPU, of the plain model's parameter `name`."""

    @abstractmethod
    def num_flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of forward and backward per token with all weights trained at full rank."""

    @abstractmethod
    def forward(
        self, tokens: Tensor, document_ids: Tensor, apply_head: ApplyHead = default_apply_head
    ) -> Tensor:
        """Logits [batch, seq, vocabulary] for tokens [batch, seq] and document ids [batch, seq].

        Args:
            apply_head: computes something else from the hidden states and the head, such as a loss in chunks. A sharded
                head is usable only inside this call.
        """


@runtime_checkable
class Reparametrized(Protocol):
    """A module that stands in for a plain layer and derives its own tensors from that layer's initial weight."""

    def initial_tensors(
        self, weight: Tensor, generator_for: Callable[[str], torch.Generator]
    ) -> dict[str, Tensor]:
        """Whole (unsharded) fp32 values of all own parameters and buffers, by local name.

        Args:
            weight: [out, in], with which the plain layer would start.
            generator_for: the generator that belongs to a local name, the same on every rank.
        """
        ...

    def sharded_buffers(self) -> tuple[str, ...]:
        """Local names of the buffers that are split over ranks along dimension 0, as parameters are."""
        ...

    def host_buffers(self) -> tuple[str, ...]:
        """Local names of those among them that stay in host memory, whatever device the module is on."""
        ...


class TrainingOptimizer(Protocol):
    """What the training step uses; not a torch Optimizer."""

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...

    def set_lr(self, lr_factor: float) -> None:
        """Sets every learning rate to its configured value times `lr_factor`."""
        ...

    def metrics(self) -> dict[str, float]:
        """Scalars of the last step, by TensorBoard tag; may wait for the device."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors (DTensors where sharded); loading into them in place and `load_state_dict` restores them."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class Method(ABC, Generic[MethodConfigT]):
    """A way to parametrize and train a model's weights, e.g. full rank or LoRA.

    Args:
        config: the method's own section.
        num_steps: length of the run in optimizer steps.
        seed: of the job. All that a method draws follows from it with
            `distributed.seeds.generator_for`, equal on every rank.
    """

    def __init__(self, config: MethodConfigT, num_steps: int, seed: int) -> None:
        self.config, self.num_steps, self.seed = config, num_steps, seed

    def prepare_model(self, model: nn.Module) -> None:
        """Replaces layers; called once, on the meta device, before any wrapping. Default: none."""

    @abstractmethod
    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        """The optimizer of the sharded model.

        Args:
            config: the section `[optimizer]`.
            compile_step: compile the update.
        """

    def dense_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the plain model that computes what a model of this method does.

        The only way from a method's tensors to a dense model: telemetry, export, warm starts and
        spectra of checkpoints call it. Default: the tensors themselves.

        Args:
            tensors: full (unsharded) tensors by their names in the prepared model. All parameters
                are there; buffers may be there and must not matter.

        Returns:
            fp32 tensors by the plain model's names.
        """
        return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
