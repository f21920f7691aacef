"""The section `[method] name = "switchlora"`."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from switchtitan.methods.lowrank.config import LowRankConfig


class SwitchLoraConfig(LowRankConfig):
    """`[method] name = "switchlora"`: SwitchLoRA (arXiv 2406.06564)."""

    resumable_keys: ClassVar[frozenset[str]] = LowRankConfig.resumable_keys | {"candidates_device"}
    optimizers: ClassVar[frozenset[str] | None] = frozenset({"adamw"})
    name: Literal["switchlora"] = "switchlora"
    """The method."""
    init: Literal["switchlora", "lora"] = "switchlora"
    """How factors and candidates start: `switchlora` balances both factors' gradients (the paper's eq. for initial standard
    deviations); `lora` starts A small and random, B and its candidates at zero."""
    candidates: Literal["swap", "constant"] = "swap"
    """What becomes of a vector that is switched out: `swap` keeps it as a candidate, and it comes back with what it has learnt;
    `constant` drops it, and candidates stay what they were drawn as, which takes no memory."""
    candidates_dtype: Literal["float32", "bfloat16"] = "float32"
    """What vectors wait in: `bfloat16` takes half the memory, and rounds what they have learnt to the nearest. A switch leaves
    the layer's function as it is with either. Only with swap."""
    candidates_device: Literal["device", "host"] = "device"
    """Where vectors wait: `host` keeps them in the host's memory, and fetches those of the next step in advance, which takes
    none of a GPU's. Without a GPU both are the same memory. Only with swap."""
    interval: float = Field(default=40, gt=0)
    """Mean number of steps between two switches of one vector at the start of training, at least 2 * freeze_steps."""
    decay: Literal["exponential", "sigmoid", "constant"] = "exponential"
    """How the switching frequency falls during training; `constant` keeps it."""
    decay_ratio: float = Field(default=0.1, gt=0, le=1)
    """The share of training, in (0, 1], after which the frequency has fallen to 0.3 (exponential) or 0.5 (sigmoid) of its
    start. Has no effect with constant."""
    freeze_steps: int = Field(default=5, ge=0)
    """Steps for which the counterpart of a switched vector gets no update; at least 0."""
    reset_moments: Literal["counterpart", "momentum", "both", "none"] = "counterpart"
    """Whose optimizer state, step count included, a switch resets: the switched vector's `counterpart`'s, `both`, or `none`;
    `momentum` resets the counterpart's first moment alone, which points where the old vector led, and leaves the scale of its
    gradients, so that its next updates are small instead of large."""

    @model_validator(mode="after")
    def _check_switching(self) -> "SwitchLoraConfig":
        if self.rank == 1:
            raise ValueError(
                "rank = 1 never switches: a vector and its counterpart's neighbour must differ; use at least 2"
            )
        if self.interval < 2 * self.freeze_steps:
            raise ValueError(
                f"interval = {self.interval:g} is below 2 * freeze_steps = {2 * self.freeze_steps}: vectors would be switched "
                "while frozen; raise interval or lower freeze_steps"
            )
        if self.decay == "constant" and "decay_ratio" in self.model_fields_set:
            raise ValueError('decay_ratio has no effect with decay = "constant"; remove it')
        for key in ("candidates_dtype", "candidates_device"):
            if self.candidates == "constant" and key in self.model_fields_set:
                raise ValueError(
                    f'{key} = "{getattr(self, key)}" has no effect with candidates = "constant", which stores none; remove it, '
                    'or set candidates = "swap"'
                )
        return self
