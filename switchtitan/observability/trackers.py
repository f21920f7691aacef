"""A run in Weights & Biases, which its scalars are sent to next to TensorBoard."""

import contextlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from switchtitan.errors import EnvironmentMismatchError


class WandbRun:
    """A run of the project `switchtitan`, or of `WANDB_PROJECT`; continues that of `output_dir`.

    Raises:
        EnvironmentMismatchError: if wandb does not start.
    """

    def __init__(
        self, output_dir: Path, run_name: str, hparams: Mapping[str, bool | float | str]
    ) -> None:
        import wandb

        file = output_dir / "wandb_run.txt"
        with contextlib.suppress(FileExistsError), file.open("x", encoding="utf-8") as new:
            new.write(uuid.uuid4().hex[:8])
        run_id = file.read_text(encoding="utf-8").strip()
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "switchtitan"),
                dir=str(output_dir),
                name=f"{run_name}-{run_id}",
                id=run_id,
                resume="allow",
                config=dict(hparams),
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:
            raise EnvironmentMismatchError(
                f"[metrics] trackers: wandb did not start ({' '.join(str(error).split())}); "
                "log in, or work offline (WANDB_MODE=offline), or remove it from trackers"
            ) from error
        # Its own step cannot go back, as that of a resumed run does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends one point per metric."""
        self._run.log({**values, "step": step})

    def close(self, is_finished: bool) -> None:
        """Ends the run; one that is not finished counts as failed."""
        self._run.finish(exit_code=0 if is_finished else 1)
