"""The token streams that tests/token_streams.rs expects, made with the Python package `tokenizers` (0.23.2, the version
of the Rust crate), and the ids that it gives with tokenizers that this crate trained.

Run, with VESPER_DATA naming the folder of real data:

    python3 token_streams.py > token_streams.json    (needs pyarrow, too, for sources.py)
    python3 token_streams.py trained.json   # checks tokenizers that the crate trained and saved
"""

import hashlib
import json
import os
import pathlib
import struct
import sys

import tokenizers

SEPARATOR = "<|endoftext|>"


def text(path):
    """One document a file, or several with separators between them."""
    pieces = path.read_bytes().decode().replace("\r\n", "\n").split(SEPARATOR)
    for index, piece in enumerate(pieces):
        piece = piece.lstrip("\n") if index > 0 else piece
        piece = piece.rstrip("\n") if index + 1 < len(pieces) else piece
        if piece.strip():
            yield piece


def jsonl(path):
    """The field "text" of each line."""
    for line in path.read_bytes().decode().splitlines():
        yield json.loads(line)["text"]


def conversations(path):
    """Blank lines between documents."""
    yield from (part for part in path.read_bytes().decode().split("\n\n") if part.strip())


def contexts(path):
    """The texts that the questions are about."""
    for article in json.loads(path.read_bytes())["data"]:
        yield from (paragraph["context"] for paragraph in article["paragraphs"])


def documents(name):
    """What sources.py reads from a source: records of every format as text."""
    from sources import DOCUMENTS

    yield from (text for text, _ in DOCUMENTS[name]())


TABLE = "parquet/tinystories-v2-gpt4/data/%s-00000-of-00001.parquet"
# Every format, as the crate reads it by itself.
EVERY_FORMAT = [
    "tinystories/tinystories-v1-train-first2316.txt",
    "french/dialogue",
    "instruct/c4_demo.jsonl",
    "instruct/v1_sft_demo.jsonl",
    "instruct/instruction-data-rasbt.json",
    "squad/piaf-v1.1.json",
    "squad/dev-v1.1.json",
    "squad/dev-v2.0-cs224n-half.json",
    TABLE % "train",
    TABLE % "validation",
]

STREAMS = [
    ("tokenizers/camembert-base", "</s>", text, "french/novels", 3),
    ("tokenizers/camembert-base", "</s>", text, "french/debian/debian-faq-fr.txt", 1),
    ("tokenizers/camembert-base", "</s>", conversations, "french/dialogue/rhapsodie.claire-like.txt", 1),
    ("tokenizers/camembert-base", "</s>", contexts, "squad/piaf-v1.1.json", 1),
    ("tokenizers/gpt2", SEPARATOR, text, "english/tinyshakespeare.txt", 1),
    ("tokenizers/gpt2", SEPARATOR, text, "tinystories/tinystories-v2-gpt4-train-first1727.txt", 1),
    ("tokenizers/gpt2", SEPARATOR, jsonl, "instruct/c4_demo.jsonl", 1),
    ("tokenizers/gpt2", SEPARATOR, contexts, "squad/dev-v1.1.json", 1),
    ("tokenizers/gpt2", SEPARATOR, text, "french/novels", 2),
    ("models/stories260K", "</s>", text, "tinystories/tinystories-v1-valid-start.txt", 1),
    ("models/stories260K", "</s>", text, "french/debian/debian-faq-fr.txt", 1),
    ("models/stories260K", "</s>", conversations, "french/dialogue/rhapsodie.claire-like.txt", 1),
]
for source in EVERY_FORMAT:
    for tokenizer, end in (("tokenizers/camembert-base", "</s>"), ("tokenizers/gpt2", SEPARATOR)):
        STREAMS.append((tokenizer, end, documents, source, 1))


def stream(root, tokenizer, end, kind, source, files):
    loaded = tokenizers.Tokenizer.from_file(str(root / tokenizer / "tokenizer.json"))
    end = loaded.token_to_id(end)
    path = root / source
    if kind is documents:
        paths = [source]
    else:
        paths = sorted(path.iterdir())[:files] if path.is_dir() else [path]
    digest, count, tokens = hashlib.sha256(), 0, 0
    for path in paths:
        for document in kind(path):
            ids = loaded.encode(document, add_special_tokens=False).ids + [end]
            digest.update(struct.pack(f"<{len(ids)}I", *ids))
            count += 1
            tokens += len(ids)
    return {
        "tokenizer": tokenizer,
        "kind": kind.__name__,
        "source": source,
        "files": files,
        "documents": count,
        "tokens": tokens,
        "sha256": digest.hexdigest(),
    }


def check(path):
    """What a trained tokenizer gives here and what it gave the crate."""
    saved = json.loads(pathlib.Path(path).read_bytes())
    for row in saved:
        loaded = tokenizers.Tokenizer.from_str(json.dumps(row["tokenizer"]))
        for case in row["cases"]:
            plain = loaded.encode(case["text"], add_special_tokens=False).ids
            around = loaded.encode(case["text"]).ids
            assert plain == case["ids"] and around == case["with_special_tokens"], (case, plain, around)
            assert loaded.decode(plain) == case["decoded"], (case, loaded.decode(plain))
    print(f"{len(saved)} tokenizers load and agree")


if len(sys.argv) > 1:
    check(sys.argv[1])
else:
    root = pathlib.Path(os.environ["VESPER_DATA"])
    rows = ",\n".join("  " + json.dumps(stream(root, *row)) for row in STREAMS)
    print(f"[\n{rows}\n]")
