import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from switchtitan.data import Corpus, DataConfig, open_corpus, open_prepared, plan_corpus
from switchtitan.data.corpus_plan import hub_error, plan_from_name
from switchtitan.errors import CorpusError


@pytest.fixture
def copy(corpus: Corpus, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus.folder, tmp_path / corpus.name))


@pytest.fixture
def small_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Replaces the standard library by a few modules, so that it is prepared quickly."""
    root = tmp_path / "library"
    root.mkdir()
    for number in range(6):
        (root / f"module_{number}.py").write_text(
            f"def function_{number}():\n    return {number}\n" * 9
        )
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(root)})
    return root


def flip_a_byte(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)


def test_a_copy_has_the_same_fingerprint(corpus: Corpus, copy: Path) -> None:
    assert open_prepared(copy).fingerprint == corpus.fingerprint


@pytest.mark.parametrize("name", ["train-00000.bin", "validation-00000.bin", "tokenizer.json"])
@pytest.mark.parametrize("harm", [flip_a_byte, Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_damaged_file_is_named_with_the_fix(
    copy: Path, name: str, harm: Callable[[Path], object]
) -> None:
    harm(copy / name)
    with pytest.raises(CorpusError, match=f"{name}: .*; delete the folder {copy} and run again"):
        open_prepared(copy)


def test_a_damaged_index_is_named_with_the_fix(copy: Path) -> None:
    file = copy / "index.json"
    complete = json.loads(file.read_text())
    texts = [
        "",
        "{",
        "[]",
        json.dumps({**complete, "format_version": 99}),
        json.dumps({**complete, "dtype": "uint32"}),
    ]
    for text in texts:
        file.write_text(text)
        with pytest.raises(CorpusError, match=r"index\.json: the index .*delete the folder"):
            open_prepared(copy)
    file.unlink()
    with pytest.raises(CorpusError, match=r"index\.json: the index cannot be read"):
        open_prepared(copy)


def test_a_changed_number_in_the_index_is_noticed(copy: Path) -> None:
    """One that neither the fingerprint nor another file holds."""
    file = copy / "index.json"
    text = file.read_text().replace('"eos_id": 0', '"eos_id": 1')
    assert text != file.read_text()
    file.write_text(text)
    with pytest.raises(CorpusError, match=r"index\.json: the index or its checksum in .* damaged"):
        open_prepared(copy)


def test_a_corpus_of_an_earlier_version_has_no_checksum_of_its_index(copy: Path) -> None:
    (copy / "index.json.sha256").unlink()
    open_prepared(copy)


def test_damage_is_noticed_when_a_configuration_opens_the_corpus(
    jsonl_config: DataConfig, corpus: Corpus, tmp_path: Path
) -> None:
    config = jsonl_config.model_copy(update={"cache_dir": tmp_path})
    shutil.copytree(corpus.folder, plan_corpus(config).folder)
    flip_a_byte(plan_corpus(config).folder / "train-00000.bin")
    with pytest.raises(CorpusError, match="does not match its checksum"):
        open_corpus(config)


def test_a_split_shorter_than_a_sequence_is_refused(corpus: Corpus) -> None:
    with pytest.raises(
        CorpusError, match=r"= 9999: the validation split .* increase validation_fraction"
    ):
        corpus.split("validation", 9999)


def test_a_vocabulary_larger_than_the_models_is_refused(corpus: Corpus) -> None:
    corpus.check_vocabulary(corpus.vocab_size)
    with pytest.raises(
        CorpusError, match=rf"has {corpus.vocab_size} tokens; increase \[model\] vocab_size"
    ):
        corpus.check_vocabulary(corpus.vocab_size - 1)


def test_every_token_is_in_the_vocabulary(corpus: Corpus) -> None:
    sequences = corpus.split("train", 50)
    largest = max(int(sequences[index].tokens.max()) for index in range(len(sequences)))
    assert largest < corpus.vocab_size


@pytest.mark.parametrize("closed", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_an_unreachable_hub_is_noticed_at_once(
    closed: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in closed.items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    config = DataConfig(dataset="c4", tokenizer="t5-base", cache_dir=tmp_path)
    with pytest.raises(CorpusError, match=r"hub cannot be reached .*offline_dataset") as caught:
        open_corpus(config)
    assert next(iter(closed)).removeprefix("HF_ENDPOINT") in str(caught.value)
    assert time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_library")
def test_falling_back_to_the_offline_corpus_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = DataConfig(
        dataset="c4", tokenizer="t5-base", offline_dataset="pystdlib", cache_dir=tmp_path
    )
    corpus = open_corpus(config, show_progress=False)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "REQUESTED CORPUS UNAVAILABLE" in warning.getMessage()
    assert "fallback for dataset = 'c4', tokenizer = 't5-base'" in corpus.description
    assert corpus.fingerprint == open_corpus(DataConfig(cache_dir=tmp_path)).fingerprint
    assert corpus.folder != plan_from_name(config).folder


@pytest.mark.usefixtures("small_library")
def test_an_unreachable_tokenizer_also_falls_back_to_the_offline_corpus(
    monkeypatch: pytest.MonkeyPatch, jsonl_config: DataConfig, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = {"tokenizer": "no-such/name", "offline_dataset": "pystdlib", "cache_dir": tmp_path}
    corpus = open_corpus(jsonl_config.model_copy(update=settings), show_progress=False)
    assert corpus.name.startswith("pystdlib-")


def test_a_prepared_corpus_needs_no_hub(
    monkeypatch: pytest.MonkeyPatch, jsonl_config: DataConfig, corpus: Corpus, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = jsonl_config.model_copy(update={"tokenizer": "some/tokenizer", "cache_dir": tmp_path})
    shutil.copytree(corpus.folder, plan_from_name(config).folder)
    assert open_corpus(config).fingerprint == corpus.fingerprint


def test_any_answer_means_that_the_hub_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *arguments: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert hub_error() is None
    server.shutdown()
    server.server_close()
    assert hub_error() is not None


def test_a_folder_that_cannot_be_written_is_named(jsonl_config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    config = jsonl_config.model_copy(update={"cache_dir": tmp_path / "file" / "corpora"})
    with pytest.raises(CorpusError, match=r"cache_dir = '.*corpora'"):
        open_corpus(config)
