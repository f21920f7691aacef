"""Models that transformers saved train on with SwitchLoRA, resume, are evaluated and exported."""

import shutil

import pytest
import torch
from support.commands import result_of, run
from support.folders import draw_tokens, logits_of_transformers, save_random_model
from support.tiny import write_continued_config
from support.tiny_documents import save_tokenizer

from switchtitan.checkpoint.load import read_metadata
from switchtitan.hub.dense_checkpoint import DenseCheckpoint
from switchtitan.models import MODELS

STEPS = ("--training.steps", "30", "--checkpoint.interval", "30", "--evaluation.interval", "30")


@pytest.fixture(scope="module", params=["llama3, tied", "qwen2"])
def continued(request, corpora):
    """Kind, home, configuration and first loss of a model that trained; its folder has moved."""
    kind = request.param
    home = corpora / f"continued {kind}"
    folder = save_random_model(kind, home / "model")
    config = write_continued_config(home, folder)
    outcome = run("train", "--config", config, *STEPS)
    assert outcome.status == 0, outcome.errors
    before = result_of("evaluate", folder, "--config", config)["loss"]
    folder.rename(home / "moved")
    return kind, home, config, before


def test_the_loss_starts_at_that_of_the_folder_and_falls(continued):
    _, home, _, before = continued
    assert result_of("evaluate", home / "run")["loss"] < before - 0.5
    saved = read_metadata(home / "run" / "checkpoints" / "step-000000030")
    # W - s B A + s B A rounds each weight twice.
    assert saved.train_state["first_validation_loss"] == pytest.approx(before, rel=1e-5)


def test_an_export_has_the_logits_and_the_layout_of_the_run(continued, tmp_path):
    from safetensors.torch import load_file

    _, home, _, _ = continued
    outcome = run("export", home / "run", "--folder", tmp_path / "out")
    assert outcome.status == 0, outcome.errors
    checkpoint = DenseCheckpoint(home / "run" / "checkpoints" / "step-000000030")
    model = MODELS.build(checkpoint.config)
    model.load_state_dict(checkpoint.read())
    tokens = draw_tokens(2, 40)
    with torch.no_grad():
        expected = model(tokens, torch.zeros(tokens.shape, dtype=torch.int32))
    exported = logits_of_transformers(tmp_path / "out", tokens)
    torch.testing.assert_close(exported, expected, atol=1e-5, rtol=1e-5)
    after, before = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", home / "moved")
    )
    assert {name: value.shape for name, value in after.items()} == {
        name: value.shape for name, value in before.items()
    }


def test_the_run_resumes_from_its_own_configuration_without_the_folder(continued, tmp_path):
    _, home, config, _ = continued
    shutil.copytree(home / "run", tmp_path / "run")
    moved = ("--job.output_dir", tmp_path / "run", "--training.steps", "32")
    outcome = run("train", "--config", tmp_path / "run" / "config.toml", *moved)
    assert outcome.status == 0, outcome.errors
    assert "step-000000030" in outcome.output + outcome.errors
    run("train", "--config", config, *STEPS).check_refused("from_folder = ", "config.json")


def test_what_contradicts_the_folder_is_refused(tmp_path):
    folder = save_random_model("qwen2, tied", tmp_path / "model")
    config = write_continued_config(tmp_path / "home", folder)
    train = ("train", "--config", config)
    for keys, parts in (
        (("--model.num_layers", "3"), ("--model.num_layers 3", "from_folder")),
        (("--model.name", "llama"), ("--model.name llama", "from_folder")),
        (("--model.tied_head", "false"), ("--model.tied_head false", "from_folder")),
        (("--method.targets", "q_proj,lm_head"), ("lm_head", "no linear layer")),
        (("--data.vocab_size", "1001"), ("vocab_size = 1001", "vocab_size = 1000")),
    ):
        run(*train, *keys).check_refused(*parts)
    save_tokenizer(folder / "tokenizer.json", "</s>", ids_from=998)
    text = config.read_text()
    config.write_text(text.replace("vocab_size = 270", f"tokenizer = '{folder}'"))
    run(*train).check_refused("vocab_size = 1000", "1001 tokens")
    (folder / "config.json").write_text('{"model_type": "gemma"}')
    run(*train).check_refused("from_folder = ", "model_type = 'gemma'")
    # No corpus was prepared for them.
    assert not [file for file in (tmp_path / "corpora").iterdir() if file.suffix != ".lock"]
