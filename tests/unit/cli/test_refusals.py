"""What commands refuse: status 2 and one message that names the key and what was given."""

import pytest
from support.commands import run
from support.comparisons import write_grid
from support.folders import contents, save_random_model
from support.tiny import TINY, tiny_config

from switchtitan.data.prepare import open_corpus
from switchtitan.data.tokenizer import train_tokenizer

# A row: words, and two parts of the message. Names in braces are of `places`.
TRAIN = [
    # Keys that do not exist or do not fit.
    ("--training.step 9", "--training.step 9", "steps"),
    ("--optimizer.tuned_hidden_size 8 --model.tied_head true", "tuned_hidden_size = 8", "tied"),
    ("--model.attention flash_attn", "[model] attention = 'flash_attn'", "CUDA"),
    # What is not there.
    ("--data.dataset text --data.path no/books {new_run}", "[data] path = ", "no/books"),
    ("--data.tokenizer no/t.json --data.vocab_size none {new_run}", "[data] tokenizer", "no/t"),
    ("--checkpoint.resume no/run {elsewhere}", "[checkpoint] resume = 'no/run'", "no complete"),
    ("--checkpoint.initial_weights no/w {elsewhere}", "[checkpoint] initial_weights", "'no/w'"),
    # What does not fit the corpus.
    ("--data.seq_len 900000 --evaluation.tokens 900000 {new_run}", "seq_len = 900000", "900,001"),
    ("--training.global_batch_size 900000 {new_run}", "global_batch_size = 900000", "corpus"),
    # What does not fit the checkpoints in the run's folder.
    ("--model.intermediate_size 30", "model.intermediate_size", "saved with 28, now 30"),
    ("--checkpoint.resume never", "[checkpoint] resume = 'never'", "checkpoints"),
]
TRAINED = [
    ("evaluate no/run", "no/run", "no complete checkpoint"),
    ("evaluate {run} --tokens 15", "--tokens 15", "[data] seq_len = 16"),
    ("evaluate {run} --split test", "no test split", "--split"),
    ("evaluate {other}", "{other}", "--corpus"),
    ("evaluate {export} --config {unprepared}", "no_corpora/pystdlib-", "switchtitan prepare"),
    ("evaluate {run} --text no/file", "--text no/file", "cannot be read"),
    ("evaluate {run} --text {empty}", "--text {empty}", "no text"),
    ("evaluate {run} --text {latin}", "--text {latin}", "UTF-8"),
    ("evaluate {run} --corpus no/corpus", "--corpus no/corpus", "index.json"),
    ("evaluate {export} --tokenizer {tokenizer} --corpus {corpus}", "{corpus}", "--text"),
    ("evaluate {run} --json {long}", "--json {long}", "cannot be written"),
    ("generate {run} --prompt-file no/file", "--prompt-file no/file", "cannot be read"),
    ("generate {run} --prompt x --top-p 1.5", "--top-p", "1.5"),
    ("generate {run} --prompt x --temperature 0 --top-k 3", "--top-k", "--temperature 0"),
    ("generate {other} --prompt x", "no tokenizer", "{other}"),
    ("generate {other} --prompt größe --tokenizer {export}", "vocabulary of 200", "--tokenizer"),
    ("export {run} --folder /proc/x", "/proc/x", "cannot be written"),
    ("export {run} --max-shard-size 5,000MB", "--max-shard-size", "5,000MB: expected a size"),
    ("report {run} --output {folder}/x.gmp", "x.gmp", ".html, .png"),
    ("report {folder} --output x.png", "{folder}", "no TensorBoard"),
]
OTHERS = [
    ("train --config {lora} --method.init balanced", '"balanced"', "write alpha = 1"),
    ("train --config {lora} --optimizer.tuned_hidden_size 8", "size = 8", "change [method]"),
    ("trian", "trian", "did you mean train?"),
    ("inspect corpora", "inspect", "prepare"),
    ("prepare --dataset textt", "dataset textt", "'text'"),
    ("prepare --data.pth x", "--data.pth x", "path"),
    ("prepare --dataset text --path no/folder", "no/folder", "no such"),
    ("prepare --corpus {corpus} --vocab_size 300", "vocab_size", "--corpus"),
    ("prepare --corpus {corpus} --show --split test", "no test split", "validation"),
    ("prepare --corpus {corpus} --show --split validation --seed 3", "--seed 3", "--split"),
    ("estimate {config} --world-size 2 --fitt 24", "--fitt 24", "--section.key"),
    ("estimate --json {grid} {config} --world-size 2", "--json {grid}", "not overwritten"),
    ("compare {lora}", "rows", "missing"),
    ("benchmark step {config}:method.rnk=3", "method.rnk=3", "rank"),
    ("benchmark step {config} --training.steps 9", "steps = 9", "at least 53"),
    ("benchmark gpu {config} --num-ranks 3", "global_batch_size", "3"),
    ("estimate {config} --world-size 3", "global_batch_size", "3"),
]
LAUNCH = [
    ("--nproc_per_node 2 train --config {config} --training.step 9", "--training.step 9", "steps"),
    ("--nproc_per_node two train", "--nproc_per_node two", "value"),
    ("--nproc_per_node 0 train", "--nproc_per_node 0", "integers >= 1"),
    ("--nnodes x train", "--nnodes x", "int"),
    ("{two} --rdzv_endpoint node-1:0 train", "RDZV_ENDPOINT=node-1:0", "HOST:PORT"),
    ("{two} --rdzv_endpoint fe80::1:1x train", "RDZV_ENDPOINT=fe80::1:1x", "HOST:PORT"),
    ("--nproc_per_node 2 trian", "launch trian", "train, benchmark"),
    ("evaluate outputs/mine", "launch evaluate", "-m MODULE"),
    ("{static} --master_addr none.invalid --master_port 1 train", "none.invalid:1", "resolved"),
]
ROWS = [
    *(("train --training.steps 20 --config {config} " + words, *parts) for words, *parts in TRAIN),
    *(("launch " + words, *parts) for words, *parts in LAUNCH),
    *TRAINED,
    *OTHERS,
]


@pytest.fixture(scope="module")
def places(trained, tmp_path_factory):
    """Names for the rows; what they name must not change."""
    home = tmp_path_factory.mktemp("refused")
    (home / "folder").mkdir()
    (home / "empty").write_text("")
    (home / "latin").write_bytes("größe".encode("latin-1"))
    save_random_model("qwen2, tied", home / "other", vocab_size=200)
    (home / "tokenizer.json").write_text(train_tokenizer(["other text"], 262).serialized)
    lora = TINY.format(folder=trained.run.parent, method="lora", method_keys="rank = 6")
    (home / "lora.toml").write_text(lora)
    grid = write_grid(home)
    unprepared = trained.config.read_text().replace("/../corpora", "/no_corpora")
    (home / "unprepared").write_text(unprepared)
    names = ("folder", "empty", "latin", "other", "unprepared")
    before = [contents(trained.run), contents(home)]
    yield {
        **{name: home / name for name in names},
        "run": trained.run,
        "config": trained.config,
        "export": trained.exported,
        "lora": home / "lora.toml",
        "tokenizer": home / "tokenizer.json",
        "corpus": open_corpus(tiny_config(trained.run.parent, "full_rank").data).folder,
        "grid": grid,
        "long": home / "folder" / ("x" * 300),
        "elsewhere": "--job.output_dir another/run --data.cache_dir no_corpora",
        "new_run": "--job.output_dir another/run",
        "two": "--nnodes 2 --rdzv_backend c10d",
        "static": "--nnodes 2 --rdzv_backend static",
    }
    assert [contents(trained.run), contents(home)] == before


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_mistake_ends_a_command_with_one_message_before_anything_is_written(
    row, places, tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.distributed.run.run", lambda _: pytest.fail("started ranks"))
    monkeypatch.chdir(tmp_path)
    words, *parts = (text.format(**places) for text in row)
    run(*words.split()).check_refused(*parts)
    assert not list(tmp_path.iterdir())
