"""A model with weights of every orientation, and gradients, full or sharded."""

import torch
from torch import nn

from support.optimizer_steps import placed
from switchtitan.optim.adamw import AdamWConfig

ADAM = AdamWConfig(lr=0.03, betas=(0.8, 0.97), eps=1e-2, weight_decay=0.2, decay_norms=True)
NUM_STEPS = 22
TARGETS = ("q_proj", "up_proj", "down_proj")
RANK = 3


class OddModel(nn.Module):
    """A square weight, a tall one, a wide one, and parameters that are not projected."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(5, 5, bias=False)
        self.up_proj = nn.Linear(5, 7)
        self.down_proj = nn.Linear(9, 5, bias=False)
        self.lm_head = nn.Linear(5, 11, bias=False)
        self.compute_dtype = torch.float32

    def blocks(self):
        return {}

    def output_head(self):
        return self.lm_head


def draw_model(mesh=None):
    """The model with fixed random values; sharded along dimension 0 over a mesh's last one."""
    model = OddModel()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in list(model.named_parameters()):
        value = torch.randn(parameter.shape, generator=generator)
        module_name, _, local_name = name.rpartition(".")
        setattr(model.get_submodule(module_name), local_name, nn.Parameter(placed(value, mesh)))
    return model


def draw_gradients(num_steps):
    """Gradients of every parameter for each step: a constant part and noise, scaled by 1 to 10.

    Singular values of the constant part are 30 % apart, so singular vectors are well-determined.
    """
    generator = torch.Generator().manual_seed(6)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    constant = {}
    for name, parameter in OddModel().named_parameters():
        if parameter.dim() == 1:
            constant[name] = draw(*parameter.shape)
        else:
            left, _, right = torch.linalg.svd(draw(*parameter.shape), full_matrices=False)
            constant[name] = left * 0.7 ** torch.arange(left.shape[1]) @ right
    for _ in range(num_steps):
        size = 10 ** torch.rand((), generator=generator)
        yield {name: (value + 0.1 * draw(*value.shape)) * size for name, value in constant.items()}


def give_gradients(model, gradients, mesh=None):
    for name, parameter in model.named_parameters():
        parameter.grad = placed(gradients[name].clone(), mesh)


def steps_next_to_adamw(model, optimizer):
    """Steps the optimizer of a drawn model; yields the gradients and the rate of each step.

    No step but the first compiles. Parameters that are not projected must equal those that torch's
    AdamW trains.
    """
    plain = draw_model()
    others = [
        name for name, _ in plain.named_parameters() if name.removesuffix(".weight") not in TARGETS
    ]
    adamw = torch.optim.AdamW(
        [plain.get_parameter(name) for name in others],
        betas=ADAM.betas,
        eps=ADAM.eps,
        weight_decay=ADAM.weight_decay,
        fused=True,
    )
    for step, gradients in enumerate(draw_gradients(NUM_STEPS)):
        lr_factor = (step + 1) / NUM_STEPS
        lr = ADAM.lr * lr_factor
        optimizer.set_lr(lr_factor)
        adamw.param_groups[0]["lr"] = lr
        give_gradients(model, gradients)
        give_gradients(plain, gradients)
        # Rates change in every step, bases in every fourth.
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            optimizer.step()
        adamw.step()
        for name in others:
            assert torch.equal(model.get_parameter(name), plain.get_parameter(name)), name
        yield gradients, lr
