"""The validation loss is the mean over held-out tokens, for every batch size."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from support.tiny import full_tensors, tiny_config, tiny_trainer, train_steps

from switchtitan.data import open_corpus
from switchtitan.distributed.world import stop_world
from switchtitan.models import MODELS


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


@pytest.mark.parametrize("local_batch_size", ["1", "4", "8"])
def test_validation_loss_is_the_mean_over_the_first_held_out_tokens(corpora, local_batch_size):
    """160 tokens are 10 sequences: batches of 4 and 8 are padded with sequences that do not
    count."""
    folder = corpora / f"validation-{local_batch_size}"
    overrides = ("--training.local_batch_size", local_batch_size)
    trainer = tiny_trainer(folder, "full_rank", *overrides)
    train_steps(trainer, 3)
    ours = trainer.evaluators.validation(trainer.stepper.model)
    trainer.stepper.close()

    config = tiny_config(folder, "full_rank", *overrides)
    plain = MODELS.build(config.model)
    plain.load_state_dict(
        {
            name[6:]: tensor
            for name, tensor in full_tensors(trainer).items()
            if name.startswith("model.")
        }
    )
    sequences = open_corpus(config.data).split("validation", 16)
    losses = []
    for index in range(10):
        tokens, documents = sequences[index].tokens, sequences[index].document_ids
        with torch.no_grad():
            logits = plain(tokens[None, :-1], documents[None])
        losses.append(F.cross_entropy(logits[0].double(), tokens[1:]).item())
    # fp32 logits of batches of other shapes: about ten operations with rounding errors of 6e-8.
    assert ours == pytest.approx(sum(losses) / 10, rel=1e-6)
