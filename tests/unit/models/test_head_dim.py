"""Heads of a given width, whose number does not divide the width of the residual stream."""

import json

import pytest
import torch
from support.held_weights import HeldWeights

from switchtitan.errors import ConfigError
from switchtitan.hub.export_folder import export_dense
from switchtitan.hub.initial_weights import read_initial_weights
from switchtitan.hub.model_folder import read_model_folder
from switchtitan.models import MODELS

TOKENS = torch.randint(0, 53, (2, 11), generator=torch.Generator().manual_seed(0))
# On logits of about 1; sums of fp32 may run in another order.
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module", params=["Mistral", "Qwen2"])
def saved(request, tmp_path_factory):
    """The folder of a random model with 3 heads of 6 in a stream of 20, and its logits."""
    import transformers

    folder = tmp_path_factory.mktemp(request.param)
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=53,
        hidden_size=20,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=6,
        sliding_window=None,
        initializer_range=0.4,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{request.param}ForCausalLM")(config).eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(TOKENS).logits


def test_a_model_with_such_heads_computes_what_transformers_does_there_and_back(saved, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, expected = saved
    config = MODELS.restore(read_model_folder(folder))
    weights = read_initial_weights(folder, config).tensors
    model = MODELS.build(config)
    model.load_state_dict(weights)
    with torch.no_grad():
        found = model(TOKENS, torch.zeros_like(TOKENS, dtype=torch.int32))
    torch.testing.assert_close(found, expected, **TOLERANCE)

    export_dense(HeldWeights(weights), config, tmp_path / "out", torch.float32, seq_len=11)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(exported(TOKENS).logits, expected, **TOLERANCE)
    assert MODELS.restore(read_model_folder(tmp_path / "out")) == config


def test_such_a_number_of_heads_without_a_width_is_refused(saved, tmp_path):
    written = json.loads((saved[0] / "config.json").read_text())
    del written["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ConfigError, match=r"hidden_size = 20, num_heads = 3"):
        read_model_folder(tmp_path)
