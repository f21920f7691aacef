"""A compiled block and the compiled loss compute what they compute uncompiled."""

import pytest
import torch
from support.small_llama import draw_batch, draw_model

from switchtitan.methods.switchlora import SwitchLora, SwitchLoraConfig
from switchtitan.models.loss import CrossEntropy


@pytest.mark.usefixtures("fresh_compiler")
def test_a_block_of_adapter_layers_and_the_loss_have_the_same_value_and_gradients():
    config = SwitchLoraConfig(rank=5, alpha=3)
    tokens, results = draw_batch(0), []
    for is_compiled in (False, True):
        model = draw_model(SwitchLora(config, 10, seed=3))
        loss = CrossEntropy(compile_regions=is_compiled)
        if is_compiled:
            model.blocks()["model.layers.0"].compile(fullgraph=True, dynamic=False)
        documents = torch.zeros_like(tokens, dtype=torch.int32)
        value = model(
            tokens, documents, lambda hidden, head, loss=loss: loss(hidden, head, tokens, 3)
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append((value.detach(), *torch.autograd.grad(value, trained)))
    # Sums in another order, of terms of order 1, in fp32.
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
