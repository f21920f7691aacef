"""The contracts between packages: interfaces of models, methods, optimizers and their sections."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from switchtitan.registry import NamedSection

IGNORED_TARGET = -100
"""A target token with this value does not count in the loss (torch's `ignore_index`)."""


class Batch(NamedTuple):
    """One micro-batch on one rank."""

    tokens: Tensor
    """[batch, seq] int64."""
    targets: Tensor
    """[batch, seq] int64: the next token, or `IGNORED_TARGET`."""
    document_ids: Tensor
    """[batch, seq] int32: the same for all tokens of a document, increasing along a sequence."""

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on a device. The host does not wait if its memory is page-locked."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


class ModelConfig(NamedSection):
    """The base class of every `[model]` section."""

    huggingface_types: ClassVar[frozenset[str]] = frozenset()
    """The `model_type` of each `config.json` that `keys_from_huggingface` reads."""

    from_folder: str | None = None
    """A folder in Hugging Face's layout, relative to the working directory, whose config.json gives
    name and architecture. They are what is saved with the run; the folder is not read again.
    Keys of the same section must not contradict it; those of a base file are replaced. For its
    weights, set [checkpoint] initial_weights too; for its tokenizer, [data] tokenizer."""
    vocab_size: int = Field(gt=0)
    """Number of token ids of the embedding and the head."""

    def architecture(self) -> dict[str, object]:
        """Returns the keys that determine the weights, as plain values; by default all keys. Models
        with equal values can load each other's weights."""
        return self.model_dump(mode="json")

    def huggingface_config(self, seq_len: int) -> dict[str, object] | None:
        """Returns the `config.json` with which transformers loads the weights by the same names;
        None if transformers has no such model. `seq_len` is that of training."""
        return None

    @classmethod
    def keys_from_huggingface(cls, found: Mapping[str, Any]) -> dict[str, object]:
        """Returns the keys of this section for a `config.json` of one of `huggingface_types`; a
        ConfigError names the keys that are missing, wrong or not supported."""
        raise NotImplementedError(f"{cls.__name__} has huggingface_types but reads no config.json")

    def weight_copies(self) -> dict[str, str]:
        """Returns other names that weights have in files, such as a tied head's -> their own."""
        return {}

    def on_any_machine(self) -> Self:
        """Returns this section with kernels that run anywhere; saved models are opened with it."""
        return self

    def check_device(self, device_type: str, compute_dtype: torch.dtype) -> None:
        """Raises an EnvironmentMismatchError if the model cannot train on "cpu" or "cuda"."""


class MethodConfig(NamedSection):
    """The base class of every `[method] name = "..."` section."""

    freezes_weights: ClassVar[bool] = False
    """Whether `Method.prepare_model` freezes some weights."""
    trains_bf16: ClassVar[bool] = False
    """Whether trained weights may be in bf16, with an optimizer that takes them so."""
    optimizers: ClassVar[frozenset[str] | None] = None
    """Names of the optimizers that the method can train with; None for all."""
    keeps_initial_weights: ClassVar[bool] = True
    """Whether a run starts from exactly the weights that it is given, up to rounding."""

    def completed(self, build_model: "Callable[[], TrainedModel]") -> Self:
        """Returns this section with values for keys whose default depends on the plain model."""
        return self

    def check_model(self, model: "TrainedModel") -> list[str]:
        """Returns error messages for the plain model, on the meta device; none by default."""
        return []

    def width_exponent(self, of_matrices: float) -> float | None:
        """Returns the `width_exponent` of what the method changes, given the optimizer's; None, the
        default: `[optimizer] tuned_hidden_size` was not checked for the method."""
        return None

    def depends_on_length(self) -> bool:
        """Returns whether a step depends on the number of steps of the run; default: no."""
        return False

    def check_length(self, num_steps: int) -> list[str]:
        """Returns error messages for a run of `num_steps` optimizer steps; none by default."""
        return []


MethodConfigT = TypeVar("MethodConfigT", bound=MethodConfig)
"""The class of a method's section."""


class OptimizerConfig(NamedSection):
    """The base class of every `[optimizer]` section."""

    needs_head: ClassVar[bool] = False
    """Whether it treats the head's weight apart, so that the head must not be tied."""
    trains_bf16: ClassVar[bool] = False
    """Whether it keeps the bits that weights in bf16 lack; see `optim.weights`."""
    has_8bit_moments: ClassVar[bool] = False
    """Whether it keeps moments of matrices in 8 bits."""
    orthogonalizes: ClassVar[bool] = False
    """Whether it orthogonalizes the updates of matrices in the model's blocks, as Muon does."""
    width_exponent: ClassVar[float | None] = None
    """e if the best rate of matrices in blocks goes as (1 / hidden size)^e; None: not checked."""
    lr: float = Field(gt=0)
    """Peak learning rate, above 0."""
    other_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate, above 0, of parameters that the method does not change: embedding, norms,
    head, biases, and layers that are not targets. At full rank: of all parameters but the weights
    of the linear layers in the model's blocks. Default: lr."""
    tuned_hidden_size: int | None = Field(default=None, gt=0)
    """Hidden size of the model with which lr and other_lr were tuned; set the key of the same name
    in [model] too. Rates are then multiplied by (tuned_hidden_size / hidden_size)^e: e is 1 for the
    head and, with adamw, matrices in blocks; 1/2 for matrices with muon and low-rank factors with
    adamw; 0 for factors with muon, embedding, norms and biases. lr * weight_decay stays. With adamw
    at full rank this is muP (arXiv 2203.03466, table 3) but for attention, which divides by the
    square root of a head's width: keep that width. The other exponents are ours. Refused where it
    was not checked. Logs show lr without factors. Default: the same rates at every width."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay, at least 0."""
    decay_norms: bool = False
    """Whether weight decay also applies to norms and other 1-dim parameters. Has no effect without
    weight decay."""

    def without_effect(self) -> list[str]:
        if self.decay_norms and self.weight_decay == 0:
            return ["decay_norms = true has no effect with weight_decay = 0"]
        return []


ApplyHead = Callable[[Tensor, nn.Module], Tensor]
"""(last hidden states [batch, seq, dim], head: [..., dim] -> logits [..., vocabulary]) -> logits or
a loss."""


def default_apply_head(hidden: Tensor, head: nn.Module) -> Tensor:
    """An `ApplyHead` that returns logits [batch, seq, vocabulary]."""
    logits: Tensor = head(hidden)
    return logits


SummedLoss = Callable[..., Tensor]
"""(hidden, head, targets [batch, seq], divisor=1) -> the sum of the losses / `divisor`, 0-dim; see
`models.loss`."""


class TrainedModel(Protocol):
    """What a method asks of a model: a `LanguageModel`, or any module as `library` shows it."""

    compute_dtype: torch.dtype

    def blocks(self) -> dict[str, nn.Module]: ...

    def output_head(self) -> nn.Module | None: ...

    def hidden_size(self) -> int | None: ...

    def named_modules(self) -> Iterable[tuple[str, nn.Module]]: ...

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...


class LanguageModel(nn.Module, ABC):
    """The base class of every model. Its linear layers are `nn.Linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.compute_dtype = torch.float32
        """dtype in which it multiplies. Sharding sets it."""

    @abstractmethod
    def blocks(self) -> dict[str, nn.Module]:
        """Returns the repeated blocks by qualified name, in order: what is sharded, compiled and
        recomputed as a unit."""

    def output_head(self) -> nn.Module | None:
        """Returns the module that maps hidden states to logits, for optimizers that treat it
        apart."""
        return None

    def hidden_size(self) -> int | None:
        """Returns the width of the hidden states if `[optimizer] tuned_hidden_size` was checked for
        this model; by default None."""
        return None

    def outer_units(self) -> list[list[nn.Module]]:
        """Returns lists of modules outside the blocks that are gathered before their first call.
        All other weights outside the blocks are gathered for the entire pass. Default: none."""
        return []

    @abstractmethod
    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Returns initial values of the plain model's parameter `name`, in fp32 on the CPU.

        `shape` is that of a block of consecutive rows, which has its own generator: a rank draws
        only rows that it holds.
        """

    @abstractmethod
    def num_flops_per_token(self, seq_len: int) -> int:
        """Returns FLOPs per token of forward and backward when all weights train at full rank."""

    @abstractmethod
    def forward(
        self, tokens: Tensor, document_ids: Tensor, apply_head: ApplyHead = default_apply_head
    ) -> Tensor:
        """Returns what `apply_head` computes, by default logits [batch, seq, vocabulary].

        A model with a `new_cache` has one more argument, `cache`, which is None in training. A
        sharded head is usable only inside `apply_head`.

        Args:
            tokens, document_ids: [batch, seq].
        """

    def new_cache(self, capacity: int, device: torch.device) -> object | None:
        """Returns what `forward` keeps of the tokens of one sequence, at most `capacity`, so that
        the next ones take less time. Default: None; each then takes a pass over all tokens."""
        return None


class Reparametrized(nn.Module, ABC):
    """A module that replaces a plain layer and initializes its tensors from that layer's weight."""

    sharded_buffers: tuple[str, ...] = ()
    """Local names of the buffers that are sharded over dimension 0, like parameters."""
    host_buffers: tuple[str, ...] = ()
    """Local names of the sharded buffers that stay in host memory on every device."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.plain_shape = (out_features, in_features)

    def forward_together(self, x: Tensor, others: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """Returns what this layer and others return for x [..., in], equal to rounding; all outputs
        but the last may share memory. Default: apply one after the other."""
        return self(x), *(layer(x) for layer in others)

    @abstractmethod
    def initial_tensors(
        self,
        weight: Tensor,
        generator_for: Callable[[str], torch.Generator],
        rows: Mapping[str, range],
    ) -> dict[str, Tensor]:
        """Returns fp32 values of its parameters and buffers, by local name.

        Args:
            weight: [out, in], the plain layer's initial weight; its rows `rows["weight"]`, or all
                rows if the module has no parameter `weight`.
            generator_for: local name -> generator of (the run's seed, qualified name), the same on
                every rank.
            rows: local name -> the rows to return; other tensors need not be computed. Those of
                `weight` are complete blocks of `distributed.initial`.
        """


@dataclass
class ParameterGroup:
    """Parameters, by qualified name, with one peak learning rate and one weight decay."""

    parameters: dict[str, nn.Parameter]
    lr: float
    weight_decay: float


class TrainingOptimizer(ABC):
    """The optimizer of a training step. Not a `torch.optim.Optimizer`, but see `library`."""

    @abstractmethod
    def parameter_groups(self) -> list[ParameterGroup]:
        """Returns its live groups: a change of `lr` acts after the next `set_lr`."""

    @abstractmethod
    def step(self) -> None: ...

    @abstractmethod
    def zero_grad(self) -> None: ...

    @abstractmethod
    def set_lr(self, lr_factor: float) -> None:
        """Sets every learning rate to its configured value times `lr_factor`."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Returns scalars of the last step by TensorBoard tag. May wait for the device."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state as flat tensors, DTensors where sharded. To restore a state, load into
        these tensors in place, then call `load_state_dict`."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def replicated(self) -> dict[str, Tensor]:
        """Returns what ranks compute alike outside of the state, such as random keys, to compare.

        Plain tensors, equal on every rank, or DTensors, equal on all replicas.
        """
        return {}


class LowRankUpdate(NamedTuple):
    """A part of a layer's weight [out, in]: scale * lora_b^T lora_a."""

    lora_a: Tensor
    """[rank, in]."""
    lora_b: Tensor
    """[rank, out]: B is stored transposed."""
    scale: float


class Method(ABC, Generic[MethodConfigT]):
    """A way to parametrize and train a model's weights, e.g. full rank or LoRA.

    Args:
        config: the method's section.
        num_steps: length of the run in optimizer steps.
        seed: the job's seed. A method draws all random values with
            `numerics.random.generator_for`, so that they are equal on every rank.
    """

    def __init__(self, config: MethodConfigT, num_steps: int, seed: int) -> None:
        self.config, self.num_steps, self.seed = config, num_steps, seed

    def prepare_model(self, model: LanguageModel) -> None:
        """Replaces layers. Called once, on the meta device, before any wrapping. Default: none."""

    @abstractmethod
    def build_optimizer(
        self, model: TrainedModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        """Builds the optimizer of the sharded model; `compile_step`: compile the update."""

    def dense_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the fp32 weights of an equivalent plain model, by its names. Default: the same.

        Args:
            tensors: full (unsharded) tensors by their names in the prepared model: all parameters
                of some modules. May contain buffers, which must not affect the result.
        """
        return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}

    def starting_weight(self, name: str, weight: Tensor) -> Tensor:
        """Returns the dense weight that a linear layer in a block starts from, from the plain one.

        Default: the same. Others set `keeps_initial_weights` to False in their section.
        """
        return weight

    def low_rank_updates(self, tensors: Mapping[str, Tensor]) -> dict[str, LowRankUpdate]:
        """Returns the low-rank parts of weights by the layer's name; by default none."""
        return {}
