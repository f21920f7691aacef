"""Small documents, token files and tokenizers, for tests of corpora."""

import gzip
import json
import random
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

WORDS = ["alpha", "beta", "gamma", "épsilon", "ζeta", "日本", "naïve", "🙂", "if", "the"]
WORDS += ["of\tand\r\nnext"]


def make_documents(count, seed=0):
    """Documents of 5 to 40 words, partly non-ASCII, with both kinds of line ends."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(WORDS, k=draw.randint(5, 40))) + f" #{number}\n"
        for number in range(count)
    ]


def write_json_lines(file, documents, key="text"):
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"url": "x", key: document}) + "\n" for document in documents)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines.encode()))
    elif file.suffix == ".zst":
        import zstandard

        file.write_bytes(zstandard.compress(lines.encode()))
    else:
        file.write_text(lines, encoding="utf-8")


def write_parquet(file, row_group_size=None, **columns):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=row_group_size)


def write_nanogpt(file, documents, eos_id, dtype="uint16"):
    """Writes token ids without a header, as nanoGPT does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    flat = [token for ids in documents for token in (*ids, eos_id)]
    file.write_bytes(np.array(flat, dtype=dtype).tobytes())


def save_tokenizer(file, *special_tokens, ids_from=0, template="</s> $A"):
    """A word-level tokenizer that truncates and pads by default, which a corpus must ignore, and
    puts a text into a template."""
    vocabulary = {"[UNK]": ids_from, "a": ids_from + 1, "b": ids_from + 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    special = [(token, tokenizer.token_to_id(token)) for token in special_tokens]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template.replace("</s>", special_tokens[0]), special_tokens=special
    )
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file))
    return file


# Datasets

TEXTS = make_documents(23, seed=1)
DRAW = random.Random(5)
EOS = 3
IDS = [[DRAW.randrange(4, 9) for _ in range(DRAW.randint(1, 30))] for _ in range(23)]
TOKENIZER = SimpleNamespace(vocab_size=10, eos_id=EOS, dtype="uint16")


def write_texts(folder):
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02d}.txt").write_bytes(text.encode())
    (folder / "README").write_text("not part of it")


def write_lines(kind, key="body"):
    def write(folder):
        write_json_lines(folder / f"0.{kind}", TEXTS[:9], key)
        write_json_lines(folder / "sub" / f"1.{kind}", TEXTS[9:], key)

    return write


def write_parquets(folder):
    # Spark writes folders that are named like files.
    (folder / "1.parquet").mkdir()
    for name, part in (("0.parquet", TEXTS[:9]), ("1.parquet/1.parquet", TEXTS[9:])):
        write_parquet(folder / name, id=list(range(len(part))), body=part, row_group_size=4)


def write_ids(folder):
    """What follows the last end is a document too."""
    write_nanogpt(folder / "a.bin", IDS[:-1], EOS)
    with (folder / "a.bin").open("ab") as stream:
        stream.write(np.array(IDS[-1], dtype="<u2").tobytes())


def write_hub(folder):
    """A repository with a configuration of two splits."""
    for number, part in enumerate((TEXTS[:9], TEXTS[9:])):
        write_parquet(folder / f"train-{number}.parquet", id=part, body=part)
    files = (
        "data_files:\n  - {split: train, path: train-*}\n  - {split: validation, path: train-0*}"
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: en\n  {files}\n---\n")


def write_c4(folder):
    """As the hub has it."""
    for name, part in (("train.00000", TEXTS[:9]), ("train.00001", TEXTS[9:])):
        write_json_lines(folder / "en" / f"c4-{name}-of-00002.json.gz", part)
    write_json_lines(folder / "en" / "c4-validation.00000-of-00001.json.gz", TEXTS[:5])


class Row(NamedTuple):
    """A dataset, its files, and its documents."""

    dataset: str
    write: object
    documents: list = TEXTS
    keys: dict = MappingProxyType({})
    split: str | None = None


BODY = {"text_column": "body"}
VALIDATION = {**BODY, "hub_config": "en", "hub_split": "validation"}
ROWS = {
    "text": Row("text", write_texts),
    "jsonl": Row("jsonl", write_lines("jsonl"), keys=BODY),
    "jsonl.gz": Row("jsonl", write_lines("json.gz"), keys=BODY),
    "jsonl.zst": Row("jsonl", write_lines("jsonl.zst"), keys=BODY),
    "parquet": Row("parquet", write_parquets, keys=BODY),
    "hub": Row("hub", write_hub, keys={**BODY, "hub_config": "en"}, split="train"),
    "one split of hub": Row("hub", write_hub, TEXTS[:9], VALIDATION),
    "c4": Row("c4", write_c4, split="train"),
    "validation of c4": Row("c4", write_c4, TEXTS[:5], split="validation"),
    "nanogpt": Row("nanogpt", write_ids, IDS),
}
