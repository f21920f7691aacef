"""Commands that measure, plan and describe: one run of each, and the numbers that are theirs."""

import json
import math

from support.commands import result_of, run, succeed
from support.comparisons import finish_all, write_grid
from support.tiny_documents import make_documents, write_json_lines
from torch.distributed.checkpoint import FileSystemReader

from switchtitan.data.config import DataConfig
from switchtitan.data.loader import build_train_batches
from switchtitan.data.prepare import open_corpus
from switchtitan.workbench.benchmark.estimate import MAX_BATCH_SIZE
from switchtitan.workbench.comparison.comparison import Comparison
from switchtitan.workbench.comparison.config import load_comparison


def test_steps_are_compared_in_a_table_and_a_record(trained, tmp_path):
    sides = [str(trained.config), f"{trained.config}:method.rank=4"]
    file = tmp_path / "record.json"
    words = ("step", *sides, "--rounds", 2, "--steps-per-round", 2, "--json", file)
    words = (*words, "--data.seq_len", 8)
    run("estimate", trained.config, "--world-size", 2, "--json", file)  # is overwritten
    outcome = succeed("benchmark", *words)
    record = json.loads(file.read_text())
    assert record["command"] == "switchtitan benchmark " + " ".join(map(str, words))
    *_, first, second = outcome.output.splitlines()
    assert first.endswith(f"  {sides[0]}")
    assert second.endswith(f"  {sides[1]}")
    assert record["environment"]["num_threads"] >= 1
    reference, other = record["steps"].values()
    assert reference["ratio"]["value"] == 1
    assert other["ratio"]["low"] <= other["ratio"]["value"] <= other["ratio"]["high"]
    assert round(other["tokens_per_s"] * other["step_s"]) == 8 * 8
    assert 0 < min(other["rounds_s"]) <= other["step_s"] <= max(other["rounds_s"])


def test_estimates_are_in_a_record_and_auto_is_bfloat16(trained):
    sides = [f"{trained.config}:training.dtype={key}" for key in ("auto", "bfloat16", "float32")]
    record = result_of("estimate", *sides, "--world-size", 2)
    auto, short, long = (record["estimates"][side] for side in sides)
    assert auto == short
    assert auto["memory"]["peak"] < long["memory"]["peak"]
    assert short["parameters"] == long["parameters"]
    checkpoint = trained.run / "checkpoints" / "step-000000015"
    saved = FileSystemReader(checkpoint).read_metadata().state_dict_metadata.values()
    num_bytes = [math.prod(tensor.size) * tensor.properties.dtype.itemsize for tensor in saved]
    assert short["checkpoint_bytes"] == sum(num_bytes)
    assert long["memory"]["peak"] == sum(long["memory"]["at_peak"].values())


def test_the_largest_micro_batch_that_fits_is_in_a_record(trained):
    record = result_of("estimate", trained.config, "--world-size", 2, "--fit", 1e-4, 80)
    (found,) = record["fits"].values()
    assert found["batch_size"] == {"0.0001": 0, "80": MAX_BATCH_SIZE}


def test_a_seed_shows_what_a_run_with_it_reads_first(tmp_path):
    write_json_lines(tmp_path / "in" / "a.jsonl", make_documents(60))
    keys = ("--dataset", "jsonl", "--path", tmp_path / "in", "--vocab_size", 300)
    outcome = succeed("prepare", *keys, "--cache_dir", tmp_path / "corpora")
    (index,) = (tmp_path / "corpora").glob("jsonl-*/index.json")
    assert str(index.parent) in outcome.output
    config = DataConfig(
        dataset="jsonl", path=tmp_path / "in", vocab_size=300, cache_dir=tmp_path / "corpora"
    )
    corpus = open_corpus(config)
    assert corpus.folder == index.parent
    words = ("--corpus", corpus.folder, "--seq-len", 40, "--show", 2)
    result = result_of("prepare", *words, "--seed", 7)
    assert result["fingerprint"] == corpus.fingerprint
    sizes = {"global_batch_size": 2, "local_batch_size": 2}
    batches = build_train_batches(corpus.split("train", 40), seed=7, **sizes, rank=0, num_ranks=1)
    (batch,) = next(batches)
    batches.close()
    assert [sequence["tokens"] for sequence in result["sequences"]] == batch.tokens.tolist()
    text = run("prepare", "--corpus", corpus.folder, "--show").output
    assert corpus.index.tokenizer.eos_token in text.partition("---")[2]
    assert f"{corpus.index.num_tokens('train'):,} tokens" in text


def test_finished_runs_of_a_comparison_are_reported(tmp_path):
    file = write_grid(tmp_path)
    finish_all(Comparison(load_comparison(file), tmp_path))
    outcome = succeed("compare", file, "--report-only")
    folder = tmp_path / "out" / "reports" / file.stem
    assert outcome.output.split() == [str(folder / "report.md")]
    # Six runs choose rates of two rows, and three rows are reported on two seeds.
    assert len((folder / "runs.csv").read_text().splitlines()) == 1 + 6 + 6


def test_a_machine_that_runs_tests_can_train_but_not_into_a_folder_of_the_system(tmp_path):
    outcome = run("doctor", "--output-dir", tmp_path / "outputs")
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output.splitlines()[-1] == "training works here"
    assert list(tmp_path.iterdir()) == []
    refused = run("doctor", "--json", "--output-dir", "/proc/outputs")
    assert refused.status == 1
    record = json.loads(refused.output)
    assert not record["can_train"]
    (writing,) = [found for found in record["findings"] if found["name"] == "writing"]
    assert writing["status"] == "missing"
