"""Training on all visible GPUs over NCCL: the same as on one, and the same after a resume."""

import shutil

import pytest
import torch
from support.ranks import run_on_gpus
from support.switchlora_layers import LARGER, MOST_DRIFT, effective_weights, relative_change
from support.tiny import METHOD_KEYS, full_tensors, tiny_trainer, train_steps

from switchtitan.methods.switchlora.method import SwitchLoraOptimizer

num_gpus = torch.cuda.device_count

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

NUM_STEPS, SAVED_STEP = 20, 10
# Sums over ranks, and products of smaller batches, have another order.
RELATIVE_LOSS_TOLERANCE = 1e-4
NUM_SWITCHES = 500
METHODS = [method for method in METHOD_KEYS if not method.endswith("_mini")]
HSDP = ("--parallelism.replicate", "2")


needs_several = pytest.mark.skipif("num_gpus() < 2", reason="one GPU would be compared with itself")


def batch():
    """A global batch of the same size on one GPU and on all."""
    size = str(4 * num_gpus())
    return "--training.global_batch_size", size, "--training.local_batch_size", "1"


def train(rank, folder, method, keys, num_ranks, num_steps):
    """Trains up to `num_steps`, resuming from the folder's newest checkpoint, and saves.

    Writes the main rank's losses, and the full tensors, to `result-<num_ranks>.pt`.
    """
    trainer = tiny_trainer(folder, method, *batch(), *keys, num_ranks=num_ranks)
    assert trainer.stepper.world.device == torch.device("cuda", rank)
    losses = train_steps(trainer, num_steps - trainer.stepper.state.step)
    tensors = {name: tensor.cpu() for name, tensor in full_tensors(trainer).items()}
    trainer.save()
    trainer.checkpointer.finish()
    trainer.stepper.close()
    if rank == 0:
        torch.save((losses, tensors), folder / f"result-{num_ranks}-{num_steps}.pt")


def result(folder, num_ranks, num_steps):
    return torch.load(folder / f"result-{num_ranks}-{num_steps}.pt")


def assert_same_losses(losses, expected):
    torch.testing.assert_close(
        torch.tensor(losses), torch.tensor(expected), rtol=RELATIVE_LOSS_TOLERANCE, atol=0
    )


@needs_several
@pytest.mark.parametrize(
    ("method", "keys"),
    [
        *((method, ()) for method in METHODS),
        *((method, ("--optimizer.name", "muon")) for method in ("full_rank", "switchlora")),
        *((method, HSDP) for method in ("full_rank", "switchlora", "galore")),
    ],
)
def test_all_gpus_train_as_one_does(corpora, method, keys):
    if keys == HSDP and num_gpus() % 2:
        pytest.skip(f"two replicas need an even number of GPUs, {num_gpus()} are visible")
    name = " ".join(["nccl", method, *keys])
    sharded, single = corpora / name, corpora / f"{name} on one"
    run_on_gpus(num_gpus(), train, sharded, method, keys, num_gpus(), NUM_STEPS)
    run_on_gpus(1, train, single, method, () if keys == HSDP else keys, 1, NUM_STEPS)
    losses, _ = result(sharded, num_gpus(), NUM_STEPS)
    assert_same_losses(losses, result(single, 1, NUM_STEPS)[0])
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["full_rank", "switchlora", "relora", "galore"])
def test_a_run_resumes_on_all_gpus_and_on_one(corpora, method):
    straight, saved = (corpora / f"{name} {method}" for name in ("straight", "saved"))
    run_on_gpus(num_gpus(), train, straight, method, (), num_gpus(), NUM_STEPS)
    run_on_gpus(num_gpus(), train, saved, method, (), num_gpus(), SAVED_STEP)
    expected = result(straight, num_gpus(), NUM_STEPS)[0][SAVED_STEP:]
    assert len(expected) == NUM_STEPS - SAVED_STEP
    for num_ranks in {num_gpus(), 1}:
        resumed = shutil.copytree(saved, corpora / f"resumed on {num_ranks} {method}")
        run_on_gpus(num_ranks, train, resumed, method, (), num_ranks, NUM_STEPS)
        assert_same_losses(result(resumed, num_ranks, NUM_STEPS)[0], expected)


def switch_only(rank, folder, num_ranks):
    """Switches many times without an update; the layers' functions must not change."""
    keys = (*LARGER, "--training.tf32", "true", "--training.steps", str(2 * NUM_SWITCHES))
    trainer = tiny_trainer(folder, "switchlora", *keys, *batch(), num_ranks=num_ranks)
    train_steps(trainer, 3)
    assert torch.backends.cuda.matmul.allow_tf32
    optimizer = trainer.stepper.optimizer
    assert isinstance(optimizer, SwitchLoraOptimizer)
    before, vectors = effective_weights(trainer.stepper.model), full_tensors(trainer)
    for _ in range(NUM_SWITCHES):
        optimizer.switch()
    optimizer.metrics()
    after = effective_weights(trainer.stepper.model)
    trainer.stepper.close()
    changed = full_tensors(trainer)
    for name, weight in before.items():
        assert relative_change(after[name], weight) < MOST_DRIFT, name
        # All vectors were exchanged.
        key = f"model.{name}.lora_a"
        assert not torch.equal(changed[key], vectors[key]), name


def test_switches_keep_the_layers_function_while_training_uses_tf32(corpora, monkeypatch):
    # Containers of GPU vendors set this.
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    run_on_gpus(num_gpus(), switch_only, corpora / "switches", num_gpus())
