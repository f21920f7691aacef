"""Every method trains a model with a tied head and biases, and its weights are a plain model's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.tiny import METHOD_KEYS, full_tensors, tiny_config, tiny_trainer, train_steps
from torch import nn

from switchtitan.distributed.shards import gather_on_main
from switchtitan.distributed.world import stop_world
from switchtitan.methods import METHODS
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.models import MODELS

MODEL = ("--model.name", "qwen2", "--model.tied_head", "true", "--model.head_dim", "8")


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 271, (2, 16), generator=torch.Generator().manual_seed(0))
    return model(tokens, torch.zeros(2, 16, dtype=torch.int32)).clone()


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_a_run_trains_all_of_it_resumes_and_merges(corpora: Path, method: str) -> None:
    folder = corpora / f"tied-{method}"
    trainer = tiny_trainer(folder, method, *MODEL)
    before = full_tensors(trainer)
    assert not [name for name in before if "lm_head" in name]
    losses = train_steps(trainer, 8)
    trainer.save()
    trainer.checkpointer.finish()
    weights = gather_on_main(trainer.stepper.model.named_parameters(), is_main=True)
    config = tiny_config(folder, method, *MODEL)
    built = METHODS.build(config.method, config.training.steps, config.job.seed)
    dense = {name: value.clone() for name, value in built.dense_weights(weights).items()}
    losses += train_steps(trainer, 4)
    assert losses[-1] < losses[0]
    after = full_tensors(trainer)
    biases = [name for name in before if name.startswith("model.") and name.endswith(".bias")]
    assert len(biases) == 2 * 3
    assert not [name for name in biases if torch.equal(before[name], after[name])]
    trainer.stepper.close()

    resumed = tiny_trainer(folder, method, *MODEL)
    assert resumed.stepper.state.step == 8
    plain = MODELS.build(config.model)
    plain.load_state_dict(dense)
    # fp32 rounding of W + s B A; logits are of order 1.
    torch.testing.assert_close(logits(plain), logits(resumed.stepper.model), rtol=1e-5, atol=1e-5)
    assert train_steps(resumed, 4) == losses[8:]
    resumed.stepper.close()


def test_biases_and_the_tied_weight_take_the_rate_of_other_parameters(corpora: Path) -> None:
    keys = ("--optimizer.other_lr", "1e-30")
    trainer = tiny_trainer(corpora / "tied-other-lr", "switchlora", *MODEL, *keys)
    before = full_tensors(trainer)
    train_steps(trainer, 2)
    after = full_tensors(trainer)
    still = [name for name in before if name.endswith((".bias", "embed_tokens.weight"))]
    assert len([name for name in still if name.startswith("model.")]) == 7
    for name in still:
        if name.startswith("model."):
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-28)
    trainer.stepper.close()


@pytest.mark.parametrize("method", ["lora", "galore", "full_rank"])
def test_a_block_with_biases_compiles_to_one_graph(tmp_path: Path, method: str) -> None:
    torch._dynamo.reset()
    config = tiny_config(tmp_path, method, *MODEL)
    model = MODELS.build(config.model)
    METHODS.build(config.method, 40, 42).prepare_model(model)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, LowRankLinear) == (method == "lora")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    expected = logits(model)
    for block in model.blocks().values():
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
