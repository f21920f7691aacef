"""transformers loads exported weights, and reading them back changes no value."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.held_weights import HeldWeights
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from switchtitan.errors import CheckpointError, CorpusError
from switchtitan.hub.export_folder import export_dense
from switchtitan.hub.huggingface import read_dense
from switchtitan.hub.initial_weights import read_initial_weights
from switchtitan.models import MODELS
from switchtitan.models.llama.config import LlamaConfig
from switchtitan.models.llama.dimensions import LlamaDimensions
from switchtitan.models.llama.rope import Rope

CONFIG = LlamaConfig(
    size="9m",
    hidden_size=36,
    num_heads=6,
    num_kv_heads=2,
    intermediate_size=29,
    num_layers=2,
    vocab_size=53,
    rope_theta=700.0,
)
DIMS = CONFIG.dimensions()


@pytest.fixture
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.1 * torch.randn(shape, generator=generator)
        for name, shape in DIMS.parameter_shapes().items()
    }


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_transformers_computes_our_logits_from_the_exported_folder(
    state: dict[str, Tensor], tmp_path: Path, max_shard_bytes: int
) -> None:
    export_dense(
        HeldWeights(state),
        CONFIG,
        tmp_path / "out",
        torch.float32,
        seq_len=64,
        max_shard_bytes=max_shard_bytes,
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = MODELS.build(CONFIG)
    ours.load_state_dict(state)
    tokens = torch.randint(0, 53, (2, 11), generator=torch.Generator().manual_seed(1))
    expected = ours(tokens, torch.zeros(2, 11, dtype=torch.int32))
    torch.testing.assert_close(theirs(input_ids=tokens).logits, expected, atol=1e-5, rtol=0)
    assert theirs.dtype == torch.float32
    assert theirs.config.max_position_embeddings == 64


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000, 1])
def test_export_and_read_change_neither_names_nor_values(
    state: dict[str, Tensor], tmp_path: Path, max_shard_bytes: int
) -> None:
    export_dense(
        HeldWeights(state), CONFIG, tmp_path / "out", torch.float32, max_shard_bytes=max_shard_bytes
    )
    back = read_initial_weights(tmp_path / "out", CONFIG).tensors
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_weights_saved_by_transformers_are_read_under_the_same_names(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    export_dense(HeldWeights(state), CONFIG, tmp_path / "out", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    back = read_initial_weights(tmp_path / "theirs", CONFIG).tensors
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_shards_stay_below_the_limit_and_hold_each_weight_once(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    limit = 20_000
    export_dense(
        HeldWeights(state), CONFIG, tmp_path / "out", torch.bfloat16, max_shard_bytes=limit
    )
    names: list[str] = []
    files = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(files) > 1
    for file in files:
        with safe_open(file, framework="pt") as opened:
            held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        assert sum(value.nbytes for value in held.values()) <= limit
        names += held
    assert sorted(names) == sorted(state)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * value.numel() for value in state.values())


def test_bf16_export_rounds_each_value_once(state: dict[str, Tensor], tmp_path: Path) -> None:
    export_dense(HeldWeights(state), CONFIG, tmp_path / "out", torch.bfloat16)
    back = read_dense(tmp_path / "out")
    assert all(torch.equal(back[name], value.bfloat16()) for name, value in state.items())
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    )


def test_exported_tokenizer_equals_the_given_one(state: dict[str, Tensor], tmp_path: Path) -> None:
    tokenizer = Tokenizer(
        models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "<unk>": 3}, unk_token="<unk>")
    )
    tokenizer.save(str(tmp_path / "given.json"))
    export_dense(
        HeldWeights(state),
        CONFIG,
        tmp_path / "out",
        torch.float32,
        tokenizer_file=tmp_path / "given.json",
        eos_id=0,
    )
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("b")["input_ids"] == tokenizer.encode("b").ids == [2]
    assert loaded.eos_token == "<eos>"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.eos_token_id == 0


def test_a_folder_with_files_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"out exists and is not empty; choose another"):
        export_dense(HeldWeights(state), CONFIG, tmp_path / "out", torch.float32)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_accepted(state: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_dense(HeldWeights(state), CONFIG, tmp_path / "out", torch.float32)
    assert read_dense(tmp_path / "out").keys() == state.keys()


def test_a_failed_export_leaves_nothing_behind(state: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(CorpusError, match=r"broken\.json is not a tokenizer"):
        export_dense(
            HeldWeights(state),
            CONFIG,
            tmp_path / "out",
            torch.float32,
            tokenizer_file=tmp_path / "broken.json",
            eos_id=0,
        )
    assert [file.name for file in tmp_path.iterdir()] == ["broken.json"]


def test_export_names_missing_unexpected_and_misshapen_weights(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    del state["lm_head.weight"]
    state["model.layers.0.self_attn.q_proj.lora_a"] = torch.zeros(2, 36)
    state["model.norm.weight"] = torch.zeros(35)
    with pytest.raises(CheckpointError) as caught:
        export_dense(HeldWeights(state), CONFIG, tmp_path / "out", torch.float32)
    caught.match(r"missing: lm_head\.weight")
    caught.match(r"unexpected: model\.layers\.0\.self_attn\.q_proj\.lora_a")
    caught.match(r"model\.norm\.weight \[35\] instead of \[36\]")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"num_heads": 3, "num_kv_heads": 1}, r"num_attention_heads = 6, the model has 3"),
        ({"rope_theta": 10000.0}, r"rope_theta = 700\.0, the model has 10000\.0"),
        ({"norm_eps": 1e-5}, r"rms_norm_eps = 1e-06, the model has 1e-05"),
        ({"vocab_size": 54}, r"vocab_size = 53, the model has 54"),
        ({"num_layers": 3}, r"num_hidden_layers = 2, the model has 3"),
    ],
)
def test_weights_of_another_model_are_refused(
    state: dict[str, Tensor], tmp_path: Path, override: dict, words: str
) -> None:
    export_dense(HeldWeights(state), CONFIG, tmp_path / "out", torch.float32)
    other = LlamaConfig(**{**CONFIG.model_dump(), **override})
    with pytest.raises(CheckpointError, match=words):
        read_initial_weights(tmp_path / "out", other)


def test_scaled_rotary_positions_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    export_dense(HeldWeights(state), CONFIG, tmp_path / "out", torch.float32)
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    config["rope_scaling"] = {"type": "linear", "factor": 2.0}
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"rope_type = 'linear'"):
        read_initial_weights(tmp_path / "out", CONFIG)


def test_a_single_file_is_read_without_a_folder(tmp_path: Path) -> None:
    save_file({"a.weight": torch.arange(6.0).view(2, 3)}, tmp_path / "weights.safetensors")
    assert torch.equal(
        read_dense(tmp_path / "weights.safetensors")["a.weight"], torch.arange(6.0).view(2, 3)
    )


def test_reading_maps_the_file_and_does_not_copy_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"big.weight": torch.zeros(64, 2**18)}, file)  # 64 MiB
    before = resident_bytes()
    tensor = read_dense(tmp_path)["big.weight"]
    assert resident_bytes() - before < 32 * 2**20
    assert tensor.sum() == 0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_damaged_and_missing_files_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist"):
        read_dense(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        read_dense(tmp_path)
    export_dense(
        HeldWeights(state), CONFIG, tmp_path / "out", torch.float32, max_shard_bytes=20_000
    )
    shard = sorted((tmp_path / "out").glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(
        CheckpointError, match=rf"{shard.name} is a corrupted or truncated safetensors file"
    ):
        read_dense(tmp_path / "out")
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"names {shard.name}, which"):
        read_dense(tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        '{"weight_map": {"a": "../outside.safetensors"}}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        read_dense(tmp_path)


def test_dimensions_reach_the_exported_config(state: dict[str, Tensor], tmp_path: Path) -> None:
    export_dense(HeldWeights(state), CONFIG, tmp_path / "out", torch.float32)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (
        LlamaDimensions(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            norm_eps=config.rms_norm_eps,
            rope=Rope(config.rope_parameters["rope_theta"]),
            tied_head=config.tie_word_embeddings,
            init_std=config.initializer_range,
        )
        == DIMS
    )
