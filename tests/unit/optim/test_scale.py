"""SCALE equals a plain reading of its algorithm, and knows which parameter is the head."""

import pytest
import torch
from support.scale_parameters import HEAD, SHAPES, TRANSPOSED, give_gradients, start, trained
from support.tiny import tiny_config
from torch import Tensor, nn

from switchtitan.contracts import TrainingOptimizer
from switchtitan.errors import ConfigError
from switchtitan.methods.full_rank import FullRank, FullRankConfig
from switchtitan.methods.lora import Lora, LoraConfig
from switchtitan.models import MODELS
from switchtitan.optim import OPTIMIZERS, trained_parameters
from switchtitan.optim.scale import Scale, ScaleConfig

CONFIG = ScaleConfig(
    lr=0.03, other_lr=0.007, vector_lr=0.05, weight_decay=0.2, momentum=0.8, betas=(0.7, 0.97)
)
NUM_STEPS = 12


def build(named: dict[str, nn.Parameter], config: ScaleConfig = CONFIG) -> TrainingOptimizer:
    return OPTIMIZERS.build(config, trained(named), False, 0)


class Reference:
    """SCALE for one matrix in float64, as a linear map [in, out]: columns are outputs."""

    def __init__(self, name: str, weight: Tensor) -> None:
        self.is_transposed, self.is_head = name not in TRANSPOSED, name == HEAD
        self.weight = self.turned(weight.detach().double().clone())
        self.mean = torch.zeros_like(self.weight)

    def turned(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.is_transposed else matrix

    def step(self, gradient: Tensor, lr: float) -> None:
        gradient = self.turned(gradient.double())
        self.mean = CONFIG.momentum * self.mean + (1 - CONFIG.momentum) * gradient
        taken = self.mean if self.is_head else gradient
        num_inputs = len(taken)
        for column in range(taken.shape[1]):
            direction = taken[:, column] / (taken[:, column].norm() / num_inputs**0.5)
            kept = (1 - lr * CONFIG.weight_decay) * self.weight[:, column]
            self.weight[:, column] = kept - lr * direction


def test_every_step_equals_the_reference():
    named, plain = start(), start()
    optimizer = build(named)
    references = {name: Reference(name, value) for name, value in named.items() if value.ndim == 2}
    norm = "layers.0.norm.weight"
    # 1-dim parameters do not decay.
    adamw = torch.optim.AdamW(
        [plain[norm]], betas=CONFIG.betas, eps=CONFIG.eps, weight_decay=0.0, fused=True
    )
    for step in range(NUM_STEPS):
        factor = (step + 1) / NUM_STEPS
        optimizer.set_lr(factor)
        adamw.param_groups[0]["lr"] = CONFIG.vector_lr * factor
        gradients = give_gradients(named, step)
        give_gradients(plain, step)
        optimizer.step()
        adamw.step()
        for name, reference in references.items():
            lr = CONFIG.lr if name.startswith("layers.") else CONFIG.other_lr
            reference.step(gradients[name], lr * factor)
            expected = reference.turned(reference.weight)
            # Values of order 1, each step rounded at 6e-8.
            torch.testing.assert_close(named[name].double(), expected, rtol=2e-6, atol=2e-6)
        assert torch.equal(named[norm], plain[norm])
    assert optimizer.metrics() == {
        "optimizer/lr": CONFIG.lr,
        "optimizer/other_lr": CONFIG.other_lr,
        "optimizer/vector_lr": CONFIG.vector_lr,
    }


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if len(shape) == 2])
def test_a_first_update_has_the_size_of_the_learning_rate_for_each_output_and_not_each_input(name):
    named, before = start(), start()
    give_gradients(named, 0)
    config = ScaleConfig(lr=0.03)
    build(named, config).step()
    update = named[name] - before[name]
    over_inputs, over_outputs = (0, 1) if name in TRANSPOSED else (1, 0)
    sizes = update.square().mean(over_inputs).sqrt()
    torch.testing.assert_close(sizes, torch.full_like(sizes, config.lr), rtol=1e-4, atol=0)
    assert update.square().mean(over_outputs).sqrt().std() > 0.01 * config.lr


def test_a_gradient_of_zero_moves_nothing():
    named, before = start(), start()
    give_gradients(named, 0)
    for parameter in named.values():
        assert parameter.grad is not None
        parameter.grad.zero_()
    build(named, ScaleConfig(lr=0.03)).step()
    for name, parameter in named.items():
        assert torch.equal(parameter, before[name]), name


def test_only_the_head_has_momentum_and_only_vectors_have_moments():
    state = build(start()).state_dict()
    norm = "layers.0.norm.weight"
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        f"{HEAD}.momentum": SHAPES[HEAD],
        f"{norm}.exp_avg": SHAPES[norm],
        f"{norm}.exp_avg_sq": SHAPES[norm],
        f"{norm}.step": (),
    }


def test_the_rate_of_vectors_is_by_default_that_of_matrices():
    config = ScaleConfig(lr=0.03, other_lr=0.007)
    named, before = start(), start()
    give_gradients(named, 0)
    optimizer = build(named, config)
    optimizer.step()
    norm = "layers.0.norm.weight"
    # Adam's first update is its rate.
    moved = (named[norm] - before[norm]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.007), rtol=1e-4, atol=0)
    assert "optimizer/vector_lr" not in optimizer.metrics()


def test_methods_tell_which_parameters_are_the_head_and_stored_transposed(tmp_path):
    for method, config in (
        (FullRank, FullRankConfig()),
        (Lora, LoraConfig(rank=6)),
    ):
        with torch.device("meta"):
            model = MODELS.build(tiny_config(tmp_path, config.name).model)
        built = method(config, 10, 0)
        built.prepare_model(model)
        optimizer = built.build_optimizer(model, ScaleConfig(lr=0.01), False)
        assert isinstance(optimizer, Scale)
        assert [name for name in optimizer.state_dict() if "momentum" in name] == [
            "lm_head.weight.momentum"
        ]
        expected = {"model.embed_tokens.weight"} | {
            name for name, _ in model.named_parameters() if name.endswith("lora_b")
        }
        assert optimizer._over_rows == expected


def test_a_model_that_names_no_head_is_refused():
    named = start()
    headless = [entry._replace(is_head=False) for entry in trained(named)]
    with pytest.raises(ConfigError, match=r'"scale".* names no head .*choose another optimizer'):
        OPTIMIZERS.build(CONFIG, headless, False, 0)


def test_a_tied_head_is_no_head(tmp_path):
    config = tiny_config(tmp_path, "full_rank", "--model.tied_head", "true")
    with torch.device("meta"):
        model = MODELS.build(config.model)
    parameters = trained_parameters(model, (), model.blocks(), model.output_head())
    assert not any(entry.is_head for entry in parameters)
    (embedding,) = (entry for entry in parameters if entry.input_dim == 0)
    assert embedding.name == "model.embed_tokens.weight"
