from pathlib import Path

import pytest
from pydantic import ValidationError

from switchtitan.data import DATASETS, DataConfig


def test_datasets_are_exactly_the_registered_ones() -> None:
    for name, row in DATASETS.items():
        path = Path("x") if row.path == "required" else None
        tokenizer = "t5-base" if row.holds_tokens else "train"
        assert DataConfig(dataset=name, path=path, tokenizer=tokenizer).dataset == name
    with pytest.raises(ValidationError, match="'pystdlib', 'english', 'c4'"):
        DataConfig(dataset="c5")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "text"}, "needs path"),
        ({"dataset": "pystdlib", "path": "x"}, "path = .* has no effect"),
        ({"dataset": "text", "path": "x", "text_column": "body"}, "text_column"),
        ({"dataset": "c4", "validation_fraction": 0.1}, "own split"),
        ({"dataset": "c4", "test_fraction": 0.1}, "test_fraction = 0.1 has no effect"),
        ({"tokenizer": "t5-base", "vocab_size": 300}, "vocab_size = 300 has an effect"),
        ({"dataset": "pystdlib", "offline_dataset": "pystdlib"}, "offline_dataset"),
        ({"dataset": "c4", "path": "x", "offline_dataset": "pystdlib"}, "offline_dataset"),
        ({"dataset": "jsonl", "path": "x", "hub_split": "train"}, "hub_split = 'train' has an"),
        ({"dataset": "nanogpt", "path": "x"}, "holds token ids and needs tokenizer"),
        ({"vocab_size": 256}, "greater than or equal to 257"),
    ],
)
def test_a_setting_without_effect_or_out_of_range_is_refused(given: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**given)


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(ValidationError, match=r"(?s)path.*text_column.*offline_dataset"):
        DataConfig(path=Path("x"), text_column="y", offline_dataset="pystdlib")


def test_a_tokenizer_name_is_local_if_a_file_of_that_name_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert DataConfig(tokenizer="t5-base").hub_tokenizer == "t5-base"
    (tmp_path / "t5-base").mkdir()
    assert DataConfig(tokenizer="t5-base").tokenizer_path == Path("t5-base")
    assert DataConfig(tokenizer="./missing").tokenizer_path == Path("missing")
    assert DataConfig(tokenizer="train").tokenizer_path is None


def test_fallback_config_needs_no_hub() -> None:
    config = DataConfig(dataset="c4", tokenizer="t5-base", offline_dataset="pystdlib", seq_len=77)
    fallback = config.fallback_config()
    assert config.needs_hub
    assert not fallback.needs_hub
    assert fallback.seq_len == 77
    DataConfig.model_validate(fallback.model_dump())  # it is valid by itself
