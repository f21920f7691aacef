"""A LLaMA of two blocks, drawn in the default dtype, with or without a method's layers."""

import torch
import torch.nn.functional as F

from switchtitan.contracts import Reparametrized
from switchtitan.models import MODELS
from switchtitan.models.llama.config import LlamaConfig
from switchtitan.numerics.random import generator_for

SEED, VOCABULARY = 3, 29
LLAMA3 = {
    "rope_type": "llama3",
    "rope_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_positions": 16,
}
MODEL = LlamaConfig(
    name="llama",
    size="9m",
    hidden_size=12,
    intermediate_size=17,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=VOCABULARY,
    init_std=0.2,
)


def initial_tensors(layer, weight, generator_of):
    """All rows of a layer's initial tensors, those of the plain `weight` included."""
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers()) | {"weight": weight}
    rows = {name: range(len(tensor)) for name, tensor in tensors.items()}
    return layer.initial_tensors(weight, generator_of, rows)


@torch.no_grad()
def draw_model(method=None):
    """The model with its initial values, which are those of the plain model."""
    model = MODELS.build(MODEL)
    plain = {
        name: model.initial_value(name, parameter.shape, generator_for(SEED, name)).to(parameter)
        for name, parameter in model.named_parameters()
    }
    if method is not None:
        method.prepare_model(model)
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        own |= module.named_buffers(recurse=False)
        values = {name: plain.get(f"{prefix}.{name}") for name in own}
        if isinstance(module, Reparametrized):
            values = initial_tensors(
                module,
                plain[f"{prefix}.weight"],
                lambda name, prefix=prefix: generator_for(SEED, f"{prefix}.{name}"),
            )
        for name, tensor in own.items():
            tensor.copy_(values[name])
    return model


def transformers_llama(config):
    """The LLaMA of transformers with the shapes of our configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.sizes.hidden_size,
            intermediate_size=config.sizes.intermediate_size,
            num_hidden_layers=config.sizes.num_layers,
            num_attention_heads=config.sizes.num_heads,
            num_key_value_heads=config.kv_heads,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
        )
    )


def check_like_transformers(model, other, tokens, renamed=str):
    """The model of transformers, with the same weights, has the same logits and gradients.

    Args:
        renamed: gives the other model's name of a weight. Loading is strict.
    """
    weights = {renamed(name): weight for name, weight in model.state_dict().items()}
    other.load_state_dict(weights, strict=True)
    logits = model(tokens, torch.zeros_like(tokens, dtype=torch.int32))
    expected = other(tokens).logits
    # fp32 rounding; sums run in another order.
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, parameter in model.named_parameters():
        grad = other.get_parameter(renamed(name)).grad
        assert (parameter.grad - grad).norm() < 1e-5 * grad.norm(), name


def draw_batch(step):
    return torch.randint(VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(step))


def logits_of(model, step):
    """Of the batch of a step, without its last tokens."""
    tokens = draw_batch(step)[:, :-1]
    return model(tokens, torch.zeros_like(tokens, dtype=torch.int32))


def loss_and_gradients(model, step):
    """Sets the gradients of a step; returns its loss."""
    model.zero_grad()
    loss = F.cross_entropy(logits_of(model, step).flatten(0, 1), draw_batch(step)[:, 1:].flatten())
    loss.backward()
    return loss.item()
