"""A model that transformers saved trains on with SwitchLoRA, resumes and is evaluated."""

import shutil

import pytest
from support.commands import result_of, run, succeed
from support.folders import save_random_model
from support.tiny import write_continued_config
from support.tiny_documents import save_tokenizer

from switchtitan.checkpoint.load import read_metadata

STEPS = ("--training.steps", "30", "--checkpoint.interval", "30", "--evaluation.interval", "30")


@pytest.fixture(scope="module")
def continued(corpora):
    """Home, configuration and first loss of a model that trained; its folder has moved."""
    home = corpora / "continued"
    folder = save_random_model("llama3, tied", home / "model")
    config = write_continued_config(home, folder)
    succeed("train", "--config", config, *STEPS)
    before = result_of("evaluate", folder, "--config", config)["loss"]
    folder.rename(home / "moved")
    return home, config, before


def test_the_loss_starts_at_that_of_the_folder_and_falls(continued):
    home, _, before = continued
    assert result_of("evaluate", home / "run")["loss"] < before - 0.5
    saved = read_metadata(home / "run" / "checkpoints" / "step-000000030")
    # W - s B A + s B A rounds each weight twice.
    assert saved.train_state["first_validation_loss"] == pytest.approx(before, rel=1e-5)


def test_the_run_resumes_from_its_own_configuration_without_the_folder(continued, tmp_path):
    home, config, _ = continued
    shutil.copytree(home / "run", tmp_path / "run")
    moved = ("--job.output_dir", tmp_path / "run", "--training.steps", "32")
    outcome = succeed("train", "--config", tmp_path / "run" / "config.toml", *moved)
    assert "step-000000030" in outcome.output + outcome.errors
    run("train", "--config", config, *STEPS).check_refused("from_folder = ", "config.json")


def test_what_contradicts_the_folder_is_refused(tmp_path):
    folder = save_random_model("qwen2, tied", tmp_path / "model")
    config = write_continued_config(tmp_path / "home", folder)
    train = ("train", "--config", config)
    for keys, parts in (
        (("--model.num_layers", "3"), ("--model.num_layers 3", "from_folder")),
        (("--model.name", "llama"), ("--model.name llama", "from_folder")),
        (("--method.targets", "q_proj,lm_head"), ("lm_head", "no linear layer")),
        (("--data.vocab_size", "1001"), ("vocab_size = 1001", "vocab_size = 1000")),
    ):
        run(*train, *keys).check_refused(*parts)
    save_tokenizer(folder / "tokenizer.json", "</s>", ids_from=998)
    text = config.read_text()
    config.write_text(text.replace("vocab_size = 270", f"tokenizer = '{folder}'"))
    run(*train).check_refused("vocab_size = 1000", "1001 tokens")
    # No corpus was prepared for them.
    assert not [file for file in (tmp_path / "corpora").iterdir() if file.suffix != ".lock"]
