"""Models that transformers saved train on with SwitchLoRA, resume, are evaluated and exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import run
from support.continued import write_continued_config
from support.folders import draw_tokens, logits_of_transformers, save_random_model
from support.word_tokenizer import save_tokenizer

from switchtitan.checkpoint import read_metadata
from switchtitan.hub.dense_checkpoint import read_dense_checkpoint, saved_model_config
from switchtitan.models import MODELS

TOKENS = draw_tokens(2, 40)
STEPS = ("--training.steps", "50", "--checkpoint.interval", "25", "--evaluation.interval", "50")


@pytest.fixture(scope="module", params=["llama3, tied", "mistral", "qwen2", "qwen2, tied"])
def continued(request: pytest.FixtureRequest, corpora: Path) -> tuple[str, Path, Path]:
    """Kind, run and configuration of a model that trained 50 steps; its folder is gone."""
    kind = request.param
    home = corpora / f"continued {kind}"
    folder = save_random_model(kind, home / "model")
    config = write_continued_config(home, folder)
    outcome = run("train", "--config", config, *STEPS)
    assert outcome.status == 0, outcome.errors
    evaluated = run("evaluate", folder, "--config", config, "--json", home / "before.json")
    assert evaluated.status == 0, evaluated.errors
    folder.rename(home / "moved")
    return kind, home, config


def loss_in(file: Path) -> float:
    return float(json.loads(file.read_text())["loss"])


def test_the_loss_starts_at_that_of_the_folder_and_falls(
    continued: tuple[str, Path, Path], tmp_path: Path
) -> None:
    _, home, _ = continued
    outcome = run("evaluate", home / "run", "--json", tmp_path / "after.json")
    assert outcome.status == 0, outcome.errors
    before, after = loss_in(home / "before.json"), loss_in(tmp_path / "after.json")
    assert after < before - 1
    saved = read_metadata(home / "run" / "checkpoints" / "step-000000050")
    # W - s B A + s B A rounds each weight twice.
    assert saved.train_state["first_validation_loss"] == pytest.approx(before, rel=1e-5)


def test_an_export_has_the_logits_and_the_layout_of_the_run(
    continued: tuple[str, Path, Path], tmp_path: Path
) -> None:
    kind, home, _ = continued
    outcome = run("export", "--checkpoint", home / "run", "--folder", tmp_path / "out")
    assert outcome.status == 0, outcome.errors
    checkpoint = home / "run" / "checkpoints" / "step-000000050"
    model = MODELS.build(saved_model_config(checkpoint))
    model.load_state_dict(read_dense_checkpoint(checkpoint))
    with torch.no_grad():
        expected = model(TOKENS, torch.zeros(TOKENS.shape, dtype=torch.int32))
    exported = logits_of_transformers(tmp_path / "out", TOKENS)
    torch.testing.assert_close(exported, expected, atol=1e-5, rtol=1e-5)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    (given,) = (home / "moved").glob("*.safetensors")
    after, before = load_file(file), load_file(given)
    assert {name: value.shape for name, value in after.items()} == {
        name: value.shape for name, value in before.items()
    }
    assert ("lm_head.weight" in after) != ("tied" in kind)
    # All of it trains: biases, norms and the embedding too.
    assert not [name for name, value in after.items() if torch.equal(value, before[name])]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == ("tied" in kind)
    assert config["max_position_embeddings"] == 256


def test_the_run_resumes_from_its_own_configuration_without_the_folder(
    continued: tuple[str, Path, Path], tmp_path: Path
) -> None:
    _, home, config = continued
    shutil.copytree(home / "run", tmp_path / "run")
    saved = ("train", "--config", tmp_path / "run" / "config.toml")
    moved = ("--job.output_dir", tmp_path / "run", "--training.steps", "52")
    outcome = run(*saved, *moved)
    assert outcome.status == 0, outcome.errors
    assert "step-000000050" in outcome.output + outcome.errors
    run("train", "--config", config, *STEPS).check_refused(
        "[model] from_folder = ", "no file", "config.json"
    )


def test_tokens_beyond_the_embedding_are_refused_before_the_corpus_is_prepared(
    tmp_path: Path,
) -> None:
    folder = save_random_model("llama", tmp_path / "model")
    config = write_continued_config(tmp_path / "home", folder)
    trained = run("train", "--config", config, *STEPS, "--data.vocab_size", "1001")
    trained.check_refused("[data] vocab_size = 1001: expected at most [model] vocab_size = 1000")
    save_tokenizer(folder / "tokenizer.json", "</s>", ids_from=998)
    config.write_text(config.read_text().replace("vocab_size = 270", f"tokenizer = '{folder}'"))
    run("train", "--config", config, *STEPS).check_refused(
        "[model] vocab_size = 1000: the tokenizer ([data] tokenizer = ", "has 1001 tokens"
    )
    assert not [file for file in (tmp_path / "corpora").iterdir() if file.suffix != ".lock"]


def test_keys_that_contradict_the_folder_and_bad_folders_are_refused(tmp_path: Path) -> None:
    folder = save_random_model("llama", tmp_path / "model")
    config = write_continued_config(tmp_path / "home", folder)
    train = ("train", "--config", config)
    run(*train, "--model.num_layers", "3", "--model.name", "qwen2").check_refused(
        "--model.num_layers 3: contradicts from_folder = ",
        "which says 2",
        "--model.name qwen2: contradicts from_folder = ",
        'which says "llama"',
    )
    run(*train, "--method.targets", "lm_head", "--model.tied_head", "true").check_refused(
        "--model.tied_head true: contradicts from_folder"
    )
    (folder / "config.json").write_text('{"model_type": "gemma"}')
    run(*train).check_refused("[model] from_folder = ", "model_type = 'gemma': expected one of")


def test_a_tied_head_is_no_target(tmp_path: Path) -> None:
    folder = save_random_model("qwen2, tied", tmp_path / "model")
    config = write_continued_config(tmp_path / "home", folder)
    run("train", "--config", config, "--method.targets", "q_proj,lm_head").check_refused(
        "the model has no linear layer called 'lm_head'"
    )
