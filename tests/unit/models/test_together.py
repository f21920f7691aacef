"""Two layers of one input in one product."""

import pytest
import torch
import torch.nn.functional as F
from support.observed import saved_besides
from support.tensors import draw
from torch import nn

from switchtitan.models.together import joined, joined_linear

IN, WIDTHS = 12, (20, 8)


@pytest.mark.parametrize("bias", [False, True])
# Partitioned as for Inductor, whose code generation does not change saved tensors.
@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"])
@pytest.mark.usefixtures("fresh_compiler")
def test_joined_layers_compute_what_two_products_do_and_save_their_inputs_alone(bias, backend):
    x, pair = draw(2, 3, IN).requires_grad_(), [nn.Linear(IN, width, bias=bias) for width in WIDTHS]
    trained = [x, *(parameter for layer in pair for parameter in layer.parameters())]
    for seed, tensor in enumerate(trained):
        tensor.data.copy_(draw(*tensor.shape, seed=seed))
    join = joined_linear
    if backend is not None:
        join = torch.compile(joined_linear, fullgraph=True, backend=backend)
    found, saved = saved_besides(trained, lambda: join(x, *pair))
    assert saved == []
    expected = torch.cat([F.linear(x, layer.weight, layer.bias) for layer in pair], dim=-1)
    grad = draw(*expected.shape, seed=10)
    results, references = (
        [out, *torch.autograd.grad(out, trained, grad)] for out in (found, expected)
    )
    for result, reference in zip(results, references, strict=True):
        # fp32: sums of at most 28 products, in another order.
        assert (result - reference).norm() <= 4e-7 * reference.norm()


def test_joined_outputs_are_split_where_the_layers_end():
    x, pair = draw(2, 3, IN).requires_grad_(), [nn.Linear(IN, width) for width in WIDTHS]

    def in_heads(y):
        return y.unflatten(-1, (-1, 4)).flip(-1)

    found = joined(x, *pair, in_heads)
    for one, layer in zip(found, pair, strict=True):
        torch.testing.assert_close(one, in_heads(layer(x)), rtol=0, atol=1e-6)
