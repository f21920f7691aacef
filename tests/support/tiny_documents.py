"""Small documents and their files, for tests of corpora."""

import gzip
import json
import random
from pathlib import Path

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "épsilon",
    "ζeta",
    "日本",
    "naïve",
    "🙂",
    "if",
    "the",
    "of\tand\r\nnext",
]


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Documents of 5 to 40 words, partly non-ASCII, with both kinds of line ends."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(WORDS, k=draw.randint(5, 40))) + f" #{number}\n"
        for number in range(count)
    ]


def write_json_lines(file: Path, documents: list[str], key: str = "text") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"url": "x", key: document}) + "\n" for document in documents)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines.encode()))
    elif file.suffix == ".zst":
        import zstandard

        file.write_bytes(zstandard.compress(lines.encode()))
    else:
        file.write_text(lines, encoding="utf-8")
