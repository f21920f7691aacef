"""PEFT computes a run's logits from its exported adapter, and adapters of PEFT have here the scale
that they have there; those that compute otherwise are refused by key."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from support.commands import run
from support.folders import change_json, read_weights, save_random_model
from support.trained import train_and_save

from switchtitan.errors import CheckpointError
from switchtitan.hub.peft_folder import ADAPTER_CONFIG_NAME

TOKENS = torch.arange(2 * 13).reshape(2, 13) * 7 % 53
TOLERANCE = 1e-5
"""On logits of about 0.1; a merged weight and separate factors are rounded differently."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_random_model("llama", tmp_path_factory.mktemp("adapters") / "model")


def save_adapter(base, folder, **keys):
    """Saves an adapter whose factors are random; returns the logits that PEFT computes."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    keys = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **keys}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**keys))
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "lora_" in name:
                factor.add_(0.1 * torch.randn_like(factor))
        model.save_pretrained(folder)
        return model(TOKENS).logits


def merged_logits(base, folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_state_dict(read_weights(folder))
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """An adapter to change."""
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    save_adapter(base, folder)
    return folder


@pytest.mark.parametrize(
    "keys",
    [{}, {"use_rslora": True}, {"init_lora_weights": False}, {"init_lora_weights": "orthogonal"}],
)
def test_a_merged_adapter_has_the_logits_that_peft_computes(base, tmp_path, keys):
    expected = save_adapter(base, tmp_path / "adapter", **keys)
    found = merged_logits(base, tmp_path / "adapter")
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("bias", "all"),
        ("use_dora", True),
        ("init_lora_weights", "pissa"),
        ("a_key_of_a_later_version", 0.5),
        ("alpha_pattern", {"q_proj": 3}),
        ("lora_alpha", float("nan")),
        ("base_model_name_or_path", "owner/model"),
        ("r", 3),  # of factors of rank 4
    ],
)
def test_other_kinds_are_refused_by_key(plain, tmp_path, key, value):
    folder = shutil.copytree(plain, tmp_path / "adapter")
    change_json(folder / ADAPTER_CONFIG_NAME, {"a_key_of_a_later_version": []})
    read_weights(folder)
    change_json(folder / ADAPTER_CONFIG_NAME, {key: value})
    with pytest.raises(CheckpointError, match=ADAPTER_CONFIG_NAME) as refused:
        read_weights(folder)
    refused.match(rf"\b{key} = ")


@pytest.fixture(scope="module", params=["switchlora", "lora"])
def exported(corpora, request):
    """A run, its adapter and its logits."""
    home = corpora / f"export-peft-{request.param}"
    trainer = train_and_save(home, request.param)
    with torch.no_grad():
        logits = trainer.stepper.model(TOKENS, torch.zeros_like(TOKENS, dtype=torch.int32))
    words = ("--folder", home / "adapter", "--format", "peft")
    assert run("export", home / "run", *words).status == 0
    return SimpleNamespace(run=home / "run", folder=home / "adapter", logits=logits)


def test_peft_computes_the_logits_of_a_run_from_its_adapter(exported):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    theirs = AutoPeftModelForCausalLM.from_pretrained(exported.folder)
    # Two implementations of LLaMA in float32 differ by 1e-5.
    torch.testing.assert_close(theirs(TOKENS).logits, exported.logits, rtol=1e-5, atol=1e-5)
    with theirs.disable_adapter():
        assert not torch.allclose(theirs(TOKENS).logits, exported.logits, rtol=1e-3, atol=1e-3)
    for place in (exported.folder, exported.folder / "base"):
        tokenizer = AutoTokenizer.from_pretrained(place)
        assert tokenizer.decode(tokenizer("x = 1\n")["input_ids"]) == "x = 1\n"
