"""Random numbers depend only on the seed and the name or step."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_trainer, train_steps

from switchtitan.distributed.seeds import generator_for, seed_dropout
from switchtitan.distributed.world import stop_world

DROPOUT = ("--method.dropout", "0.3")
NO_DROPOUT = ("--method.dropout", "0.0")


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


def test_a_generator_depends_only_on_seed_and_name():
    def draw(seed: int, name: str) -> list[float]:
        return torch.rand(3, generator=generator_for(seed, name)).tolist()

    first = draw(1, "layer.weight")
    torch.rand(5)
    assert draw(1, "layer.weight") == first
    assert len({tuple(draw(seed, name)) for seed in (1, 2) for name in ("a", "b", "1:a")}) == 6


def test_dropout_depends_only_on_seed_step_and_rank():
    def draw(*place: int) -> tuple[float, ...]:
        seed_dropout(*place)
        return tuple(torch.rand(3).tolist())

    places = [(seed, step, rank) for seed in (1, 11) for step in (0, 1, 12) for rank in (0, 1, 2)]
    drawn = {place: draw(*place) for place in places}
    assert len(set(drawn.values())) == len(places)
    assert all(draw(*place) == values for place, values in drawn.items())


def losses_with_dropout(
    folder: Path, num_steps: int, dropout: tuple[str, str] = DROPOUT
) -> list[float]:
    # Earlier draws of the process must not matter.
    torch.seed()
    trainer = tiny_trainer(folder, "switchlora", *dropout)
    losses = train_steps(trainer, num_steps)
    if trainer.stepper.state.step == 4:
        trainer.save()
        trainer.checkpointer.finish()
    trainer.stepper.close()
    return losses


def test_a_run_with_dropout_resumes_bitwise(corpora):
    straight = losses_with_dropout(corpora / "dropout", 9)
    first = losses_with_dropout(corpora / "dropout-resumed", 4)
    assert first + losses_with_dropout(corpora / "dropout-resumed", 5) == straight
    without = losses_with_dropout(corpora / "dropout-none", 1, NO_DROPOUT)
    assert without != straight[:1], "dropout has no effect"


def test_an_evaluation_does_not_change_training(corpora):
    losses = []
    for name, evaluated in (("quiet", False), ("evaluated", True)):
        torch.seed()
        trainer = tiny_trainer(corpora / f"dropout-{name}", "switchlora", *DROPOUT)
        steps = []
        for _ in range(6):
            steps += train_steps(trainer, 1)
            if evaluated:
                trainer.evaluators.validation(trainer.stepper.model)
        trainer.stepper.close()
        losses.append(steps)
    assert losses[0] == losses[1]
