"""The `[spectrum]` section."""

from pydantic import Field

from switchtitan.config.section import Section


class SpectrumConfig(Section):
    """How often to measure the rank of the change of the linear layers' weights since step 0."""

    interval: int | None = Field(default=None, ge=1)
    """Optimizer steps between two measurements, at least 1; the last step is also measured.
    Default: no measurement. Each gathers the dense weights on the main rank and takes O(out * in *
    min(out, in)) time per layer."""
