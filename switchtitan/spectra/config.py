"""The section `[spectrum]`."""

from pydantic import Field

from switchtitan.config.section import Section


class SpectrumConfig(Section):
    """How often the rank of what training has added to the linear layers' weights is measured."""

    interval: int | None = Field(default=None, ge=1)
    """Optimizer steps between two measurements, at least 1; the last step is measured too. Each gathers the dense weights on
    the main rank and takes time in the order of out * in * min(out, in) per layer. No measurement unless set."""
