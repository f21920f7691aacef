"""Frozen weights in bf16: training, bitwise resumption, export as a plain model, dtype."""

from collections.abc import Iterator

import pytest
import torch
from support.tiny import full_tensors, tiny_config, tiny_trainer, train_steps

from switchtitan.distributed.shards import gather_on_main, local
from switchtitan.distributed.world import stop_world
from switchtitan.errors import CheckpointError
from switchtitan.hub.dense_checkpoint import read_dense_checkpoint
from switchtitan.methods import METHODS
from switchtitan.methods.lowrank import low_rank_layers
from switchtitan.models import MODELS
from switchtitan.spectra.weight_change import checkpoint_spectra
from switchtitan.training.description import comparable_identity

BF16 = ("--training.frozen_dtype", "bfloat16", "--evaluation.interval", "100")


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


@pytest.mark.parametrize("method", ["switchlora", "relora"])
def test_a_run_resumes_bitwise_and_refuses_another_type(corpora, method):
    straight = tiny_trainer(corpora / f"bf16-straight-{method}", method, *BF16)
    frozen = {name: layer.weight for name, layer in low_rank_layers(straight.stepper.model).items()}
    start = {name: local(weight).clone() for name, weight in frozen.items()}
    assert {weight.dtype for weight in frozen.values()} == {torch.bfloat16}
    losses = train_steps(straight, 28)
    straight.stepper.close()
    assert losses[-1] < losses[0]
    assert not any(torch.equal(local(weight), start[name]) for name, weight in frozen.items())

    folder = corpora / f"bf16-resumed-{method}"
    first = tiny_trainer(folder, method, *BF16)
    assert train_steps(first, 14) == losses[:14]
    first.save()
    first.checkpointer.finish()
    check_what_others_make_of(first, method, folder)
    resumed = tiny_trainer(folder, method, *BF16)
    assert resumed.stepper.state.step == 14
    assert train_steps(resumed, 14) == losses[14:]
    resumed.stepper.close()
    tensors = full_tensors(resumed)
    for name, tensor in full_tensors(straight).items():
        assert torch.equal(tensors[name], tensor), name
    with pytest.raises(
        CheckpointError, match=r"training\.frozen_dtype: saved with 'bfloat16', now 'float32'"
    ):
        tiny_trainer(folder, method)


@torch.no_grad()
def check_what_others_make_of(trainer, method, folder):
    """Export, and the singular values of the change."""
    config = tiny_config(folder, method, *BF16)
    batch = next(trainer.stepper.batches)[0]
    trainer.stepper.close()
    expected = trainer.stepper.model(batch.tokens, batch.document_ids)
    built = METHODS.build(config.method, config.training.steps, config.job.seed)
    merged = built.dense_weights(
        gather_on_main(trainer.stepper.model.named_parameters(), is_main=True)
    )
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    checkpoint = trainer.checkpointer.latest
    for name, tensor in read_dense_checkpoint(checkpoint).items():
        assert torch.equal(tensor, merged[name]), name
    plain = MODELS.build(config.model)
    plain.load_state_dict(merged)
    # (W + s B A) x against W x + s B (A x): fp32 rounding errors of 6e-8 through two blocks;
    # logits are of order 1.
    torch.testing.assert_close(
        plain(batch.tokens, batch.document_ids), expected, rtol=1e-5, atol=1e-5
    )
    spectra = checkpoint_spectra(checkpoint)
    assert len(spectra) == 14
    assert all(values.isfinite().all() and values[0] > 0 for values in spectra.values())


@pytest.mark.parametrize(
    ("method", "settings", "warns"),
    [("switchlora", BF16, True), ("switchlora", (), False), ("relora", BF16, False)],
)
def test_a_method_that_rounds_frozen_weights_again_and_again_warns(
    corpora, caplog, method, settings, warns
):
    tiny_trainer(corpora / f"warns-{method}-{bool(settings)}", method, *settings).stepper.close()
    assert ("frozen_dtype" in caplog.text) == warns


def test_a_checkpoint_from_before_there_was_a_choice_is_one_of_float32():
    assert comparable_identity({"training": {"global_batch_size": 8}})["training"] == {
        "frozen_dtype": "float32",
        "global_batch_size": 8,
    }
