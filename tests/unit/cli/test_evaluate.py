"""`switchtitan evaluate` prints the loss of the run, for every method, and of its export."""

import json

import pytest
from support.checkpoints import rewrite_metadata
from support.tiny import METHOD_KEYS, tiny_config
from support.trained import train_and_save

from switchtitan.builders.saved_config import saved_config
from switchtitan.checkpoint import CheckpointMetadata, layout
from switchtitan.cli import evaluate, export
from switchtitan.config.toml_text import resolved_toml, toml_value
from switchtitan.data import open_corpus
from switchtitan.distributed.config import CompileConfig
from switchtitan.files import sha256_of_file


def saved_run(folder, method):
    """Trains a tiny run, saves it, and returns its own validation loss."""
    trainer = train_and_save(folder, method)
    return trainer.evaluators.validation(trainer.stepper.model)


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_the_loss_of_a_checkpoint_equals_its_runs(corpora, tmp_path, method, capsys):
    folder = corpora / f"evaluate-{method}"
    own = saved_run(folder, method)
    evaluate.main([str(folder / "run"), "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    # Merging rounds each weight once; a loss of 160 tokens in float32 differs by less.
    assert result["loss"] == pytest.approx(own, rel=1e-5)
    assert (result["split"], result["tokens"]) == ("validation", 160)
    assert f"loss        {own:.4f}" in capsys.readouterr().out


def test_an_export_has_the_loss_of_its_checkpoint_and_tokens_are_counted(corpora, tmp_path, capsys):
    folder = corpora / "evaluate-export"
    own = saved_run(folder, "switchlora")
    export.main(["--checkpoint", str(folder / "run"), "--folder", str(tmp_path / "exported")])
    (config,) = folder.glob("*.toml")
    arguments = [str(tmp_path / "exported"), "--config", str(config)]
    capsys.readouterr()
    evaluate.main(arguments)
    assert f"loss        {own:.4f}" in capsys.readouterr().out
    evaluate.main([*arguments, "--tokens", "70"])  # four sequences of 16
    assert "validation, 64 tokens" in capsys.readouterr().out
    for wrong, message in (
        (["--tokens", "15"], "--tokens 15: expected at least one sequence"),
        (["--split", "test"], "error: --split test: the corpus in "),
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main([*arguments, *wrong])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def mixture(tmp_path, *options):
    """The option with a mixture of a short source, and a long one that has most sequences."""
    for name, count in (("short", 30), ("long", 300)):
        (tmp_path / name).mkdir()
        for number in range(count):
            text = f"{name} rows of matrix {number}\n" * (3 + number % 7)
            (tmp_path / name / f"{number}.txt").write_text(text)
    sources = [
        {"weight": weight, "dataset": "text", "path": str(tmp_path / name)}
        for weight, name in ((1, "short"), (9, "long"))
    ]
    return ["--data.max_bytes", "none", "--data.sources", toml_value(sources), *options]


@pytest.mark.parametrize("tokens", ["160", "1000000"], ids=["some", "all"])
def test_the_loss_of_a_mixture_equals_its_runs(corpora, tmp_path, tokens, capsys):
    folder = corpora / f"evaluate-mixture-{tokens}"
    options = mixture(tmp_path, "--evaluation.tokens", tokens, "--data.validation_fraction", "0.2")
    trainer = train_and_save(folder, "lora", *options)
    own = trainer.evaluators.validation(trainer.stepper.model)
    capsys.readouterr()
    evaluate.main([str(folder / "run"), "--json", "-"])
    result = json.loads(capsys.readouterr().out)
    assert result["loss"] == pytest.approx(own, rel=1e-5)
    first, _ = open_corpus(tiny_config(folder, "lora", *options).data).sources
    num_first = first.index.num_tokens("validation")
    # Negative control: the mixture has more held-out tokens than its first source.
    assert (result["tokens"] > num_first) == (tokens == "1000000")


def test_a_result_is_printed_before_a_file_that_cannot_be_written(corpora, capsys):
    folder = corpora / "evaluate-unwritable"
    own = saved_run(folder, "lora")
    capsys.readouterr()
    too_long = folder / ("x" * 300)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([str(folder / "run"), "--json", str(too_long)])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert f"loss        {own:.4f}" in shown.out
    assert f"--json {too_long}: the file cannot be written" in shown.err


def test_a_folder_in_place_of_the_file_is_refused_before_the_run_is_read(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([str(tmp_path / "no-run"), "--json", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"--json {tmp_path}: is a folder; give a file" in capsys.readouterr().err


def test_a_folder_with_a_name_that_is_too_long_is_missing(tmp_path, capsys):
    file = tmp_path / ("x" * 300) / "numbers.json"
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([str(tmp_path / "no-run"), "--json", str(file)])
    assert stopped.value.code == 2
    assert f"--json {file}: no folder {file.parent}; create it" in capsys.readouterr().err


def test_ctrl_c_ends_with_one_line(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate", interrupt)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["some/run"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\nstopped; nothing was written\n"


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_checkpoint_is_verified_by_reading_it_once(
    corpora, tmp_path, monkeypatch, command, capsys
):
    folder = corpora / f"hashed-{command}"
    saved_run(folder, "lora")
    (checkpoint,) = (folder / "run" / "checkpoints").iterdir()
    hashed = []

    def count(path, *advance):
        hashed.append(path.name)
        return sha256_of_file(path, *advance)

    monkeypatch.setattr("switchtitan.checkpoint.metadata.sha256_of_file", count)
    if command == "evaluate":
        evaluate.main([str(folder / "run")])
    else:
        export.main(["--checkpoint", str(folder / "run"), "--folder", str(tmp_path / "exported")])
    unhashed = layout.METADATA_FILE, layout.METADATA_CHECKSUM_FILE
    files = [path.name for path in checkpoint.iterdir() if path.name not in unhashed]
    assert sorted(hashed) == sorted(files)
    # Every byte counts: a changed one is found.
    shard = next(checkpoint.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SystemExit):
        evaluate.main([str(folder / "run")])
    assert "no complete checkpoint" in capsys.readouterr().err


def test_keys_of_training_do_not_stop_an_evaluation(corpora, tmp_path, monkeypatch, capsys):
    folder = corpora / "evaluate-training-keys"
    own = saved_run(folder, "full_rank")
    monkeypatch.setenv("CXX", "no-such-compiler")
    (config,) = folder.glob("*.toml")
    text = config.read_text().replace("global_batch_size = 8", "global_batch_size = 7")
    for section, key in (
        ("metrics", "communication = true"),
        ("parallelism", "replicate = 2"),
        ("compile", "blocks = true"),
    ):
        text = text.replace(f"[{section}]", f"[{section}]\n{key}")
    (tmp_path / "training.toml").write_text(text)
    arguments = [str(folder / "run"), "--config", str(tmp_path / "training.toml")]
    evaluate.main(arguments)
    assert f"loss        {own:.4f}" in capsys.readouterr().out
    (tmp_path / "training.toml").write_text(text.replace("tokens = 160", "tokens = 15"))
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(arguments)
    assert stopped.value.code == 2
    assert "[evaluation] tokens = 15" in capsys.readouterr().err


def test_a_model_trained_with_flash_attention_is_used_without_it(corpora, tmp_path, capsys):
    folder = corpora / "evaluate-flash"
    own = saved_run(folder, "lora")
    (checkpoint,) = (folder / "run" / "checkpoints").iterdir()

    def set_attention(metadata):
        assert metadata["identity"]["model"]["attention"] == "sdpa"
        metadata["identity"]["model"]["attention"] = "flash_attn"
        config = metadata["run"]["config"]
        assert 'attention = "sdpa"' in config
        metadata["run"]["config"] = config.replace('attention = "sdpa"', 'attention = "flash_attn"')

    rewrite_metadata(checkpoint, set_attention)
    evaluate.main([str(folder / "run")])
    assert f"loss        {own:.4f}" in capsys.readouterr().out
    export.main(["--checkpoint", str(folder / "run"), "--folder", str(tmp_path / "exported")])
    assert "flash_attn" not in (tmp_path / "exported" / "config.json").read_text()


def test_a_checkpoint_of_a_compiled_run_is_evaluated_without_a_compiler(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "full_rank")
    compiled = config.model_copy(update={"compile": CompileConfig(blocks=True)})
    monkeypatch.setenv("CXX", "no-such-compiler")
    metadata = CheckpointMetadata.model_construct(run={"config": resolved_toml(compiled)})
    assert saved_config(metadata) == compiled


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/run"], "for other weights, pass --config FILE"),
        ([], "required: TARGET"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
