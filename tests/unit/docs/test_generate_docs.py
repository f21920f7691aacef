"""`scripts/generate_docs.py`: what it generates is current, and made from the measurements."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def generate_docs():
    spec = importlib.util.spec_from_file_location(
        "generate_docs", ROOT / "scripts" / "generate_docs.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current(generate_docs):
    generate_docs.main(["--check"])


def test_check_fails_and_writes_nothing_if_a_page_is_not_current(
    generate_docs, tmp_path, monkeypatch, capsys
):
    page = tmp_path / "CONFIGURATION.md"
    page.write_text("old")
    monkeypatch.setattr(generate_docs, "CONFIGURATION", page)
    monkeypatch.setattr(generate_docs, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="1"):
        generate_docs.main(["--check"])
    assert page.read_text() == "old"
    assert "outdated: CONFIGURATION.md" in capsys.readouterr().err


def test_every_key_has_a_type_a_default_and_a_sentence(generate_docs):
    page = generate_docs.configuration_page()
    assert "## [training]" in page
    assert '## [method] name = "switchlora"' in page
    keys = page.split("\n- **`")[1:]
    assert all(": " in key and ("; default: " in key or "; required." in key) for key in keys)
    assert all(len(key.split(".\n", 1)) == 2 for key in keys)


def test_a_table_is_made_from_its_measurement(generate_docs, tmp_path):
    environment = {"device": "a CPU", "num_threads": 2, "torch": "2.13", "commit": "abc"}
    sides = {
        "train_configs/a.toml": {"step_s": 2.0, "optimizer_s": 0.5, "tokens_per_s": 8.0},
        "train_configs/b.toml:method.rank=4,method.alpha=2": {
            "step_s": 1.0, "optimizer_s": 0.25, "tokens_per_s": 16.0,
            "ratio": 0.5, "ratio_interval_95": [0.4, 0.6],
        },
    }  # fmt: skip
    (tmp_path / "step.json").write_text(json.dumps({"environment": environment, "steps": sides}))
    text = "before\n<!-- table step -->\nold\n<!-- end -->\n<!-- table other -->\n<!-- end -->\n"
    written = generate_docs.with_tables(text, tmp_path)
    assert "| a | 2000 | 500 | 8 | 1 |  |" in written
    assert "| b, rank=4, alpha=2 | 1000 | 250 | 16 | 0.500 | 0.400 to 0.600 |" in written
    assert "a CPU, 2 thread(s), torch 2.13, commit abc" in written
    assert "old" not in written
    assert "Not measured yet: `scripts/measure_performance.sh other`" in written
    assert generate_docs.with_tables(written, tmp_path) == written


def test_the_table_of_what_fits_has_a_row_per_method_and_a_column_per_size(generate_docs):
    sides = {
        f"train_configs/llama_350m_{method}:model.size={size}{keys}": {
            "batch_size": {"24": small, "80": large}
        }
        for size, small, large in (("1b", 3, 64), ("7b", 0, 5))
        for method, keys in (
            ("full_rank.toml", ",optimizer.name=adamw8bit"),
            ("lora.toml", f",method.rank={512 if size == '1b' else 1024}"),
        )
    }
    rows = generate_docs._fits({"fits": sides})
    assert rows == [
        ("", "1b", "7b"),
        ("full_rank, name=adamw8bit", "3 / 64+", "no / 5"),
        ("lora", "3 / 64+", "no / 5"),
    ]


def test_where_everything_fits_the_table_states_the_peaks(generate_docs):
    sides = {
        f"train_configs/llama_350m_lora.toml:model.size={size}": {
            "batch_size": {"24": 64, "80": 64},
            "peak": {"1": 2**30, "64": int(gib * 2**30)},
        }
        for size, gib in (("9m", 1.5), ("20m", 2.25))
    }
    assert generate_docs._fits({"fits": sides}) == [("", "9m", "20m"), ("lora", "1.50", "2.25")]


def test_every_table_has_a_measurement_of_its_name(generate_docs):
    names = generate_docs._TABLE.findall(generate_docs.PERFORMANCE.read_text())
    script = (ROOT / "scripts" / "measure_performance.sh").read_text()
    assert names
    assert all(f"measure_{name}()" in script for name in names)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("one_gpu", "350m_switchlora.toml"),
        ("one_gpu", "350m_switchlora.toml:activation_checkpoint.mode=full"),
        (
            "one_gpu_1b",
            "1b_switchlora.toml:method.candidates=constant,activation_checkpoint.mode=full",
        ),
        ("one_gpu_1b", "1b_full_rank.toml:activation_checkpoint.mode=full"),
    ],
)
def test_the_readme_states_the_measured_memory(name, side):
    record = json.loads((ROOT / "docs" / "measurements" / f"{name}.json").read_text())
    peak = record["estimates"][f"train_configs/llama_{side}"]["memory"]["peak"]
    readme = (ROOT / "README.md").read_text()
    text = readme.partition("**One 24 GB GPU.**")[2].partition("## Methods")[0]
    assert f"{peak / 2**30:.1f} GiB" in text
