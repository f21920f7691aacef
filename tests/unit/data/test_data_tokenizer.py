import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from support.word_tokenizer import save_tokenizer

from switchtitan.data.tokenizer import fetch_tokenizer, read_tokenizer, train_tokenizer
from switchtitan.errors import CorpusError


def test_a_trained_tokenizer_round_trips_any_string(documents: list[str]) -> None:
    tokenizer = train_tokenizer(documents, 300)
    assert 257 <= tokenizer.vocab_size <= 300
    for text in [*documents, "unseen \x00 ★ Ж\r\n\t  end", "<|endoftext|> in a text"]:
        (ids,) = tokenizer.encode_documents([text])
        assert tokenizer.tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.eos_id not in ids


def test_training_twice_gives_the_same_tokenizer(documents: list[str]) -> None:
    assert train_tokenizer(documents, 290).sha256 == train_tokenizer(iter(documents), 290).sha256


def test_documents_are_encoded_in_full_without_special_tokens(tmp_path: Path) -> None:
    file = save_tokenizer(tmp_path / "tokenizer.json", "</s>")
    tokenizer = read_tokenizer(file)
    assert tokenizer.encode_documents(["a b a b", "b"]) == [[1, 2, 1, 2], [2]]
    assert read_tokenizer(tmp_path).sha256 == tokenizer.sha256


@pytest.mark.parametrize("token", ["</s>", "<|endoftext|>", "<eos>"])
def test_common_end_tokens_are_found(tmp_path: Path, token: str) -> None:
    tokenizer = read_tokenizer(save_tokenizer(tmp_path / "tokenizer.json", "<pad>", token))
    assert (tokenizer.eos_token, tokenizer.eos_id, tokenizer.vocab_size) == (token, 4, 5)


@pytest.mark.parametrize("setting", ["<stop>", {"content": "<stop>", "lstrip": False}])
def test_settings_next_to_the_tokenizer_name_the_end_token(tmp_path: Path, setting: object) -> None:
    save_tokenizer(tmp_path / "tokenizer.json", "</s>", "<stop>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": setting}))
    assert read_tokenizer(tmp_path).eos_token == "<stop>"


def test_vocabulary_size_is_the_largest_id_plus_one(tmp_path: Path) -> None:
    file = save_tokenizer(tmp_path / "tokenizer.json", "</s>", ids_from=70)
    assert read_tokenizer(file).vocab_size == 73


def test_a_tokenizer_without_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no end-of-document token; expected one of </s>"):
        read_tokenizer(save_tokenizer(tmp_path / "tokenizer.json", "[SEP]"))


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no file .*tokenizer\.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CorpusError, match=r"tokenizer\.json: .*cannot read it"):
        read_tokenizer(tmp_path)


class _Hub(BaseHTTPRequestHandler):
    """Serves one file of one repository like the hub."""

    contents = b""

    def do_HEAD(self) -> None:
        self._answer(with_contents=False)

    def do_GET(self) -> None:
        self._answer(with_contents=True)

    def _answer(self, with_contents: bool) -> None:
        if self.path != "/some/name/resolve/main/tokenizer.json":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", '"abc"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self.contents)))
        self.end_headers()
        if with_contents:
            self.wfile.write(self.contents)

    def log_message(self, *arguments: object) -> None:
        return


def test_a_tokenizer_is_fetched_from_a_hub_and_then_cached(tmp_path: Path) -> None:
    file = save_tokenizer(tmp_path / "tokenizer.json", "</s>")
    handler = type("Hub", (_Hub,), {"contents": file.read_bytes()})
    server = HTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    program = (
        "from switchtitan.data.tokenizer import fetch_tokenizer, is_cached\n"
        "assert not is_cached('some/name')\n"
        "print(fetch_tokenizer('some/name').sha256)\n"
        "assert is_cached('some/name')\n"
    )
    # The hub's client reads its address on import.
    endpoint = f"http://127.0.0.1:{server.server_port}"
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hub"),
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_OFFLINE": "0",
    }
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    server.shutdown()
    server.server_close()
    assert result.stdout.strip() == read_tokenizer(file).sha256, result.stderr


def test_a_name_unknown_to_the_hub_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match="tokenizer = 'no-such/tokenizer': cannot download"):
        fetch_tokenizer("no-such/tokenizer")
