"""Writes the Parquet files of tables/ with pyarrow.     python tables.py"""

import os

import pyarrow as pa
import pyarrow.parquet as pq

folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tables")
os.makedirs(folder, exist_ok=True)


def write(name, table, **options):
    pq.write_table(table, os.path.join(folder, name + ".parquet"), **options)


texts = [f"Texte n°{i} : l'été. " * (i % 3 + 1) for i in range(25)]
numbered = pa.table({"id": list(range(25)), "text": texts, "noise": ["x" * 50] * 25})
for codec in ["none", "snappy", "gzip", "lz4", "brotli", "zstd"]:
    write(f"text-{codec}", numbered, compression=codec, row_group_size=10)
write("pages-v2", numbered, compression="snappy", data_page_version="2.0", data_page_size=64, use_dictionary=False)
large = pa.table({"text": pa.array(texts, pa.large_string())})
write("large", large.append_column("text2", pa.array(texts).dictionary_encode()))
write("empty", numbered.slice(0, 0))
write("nulls", pa.table({"text": ["un", None, "trois"]}))
write("bytes", pa.table({"text": pa.array(["un".encode(), b"d\xff", "trois".encode()], pa.binary())}))
write(
    "nested",
    pa.table(
        {
            "page": [{"title": "A", "body": "Un.", "n": 1}, {"title": "B", "body": "Deux.", "n": 2}, None],
            "parts": [["a", "b"], [], None],
            "items": [[{"t": "x", "k": 1}, {"t": "y", "k": 2}], [{"t": "z", "k": 3}], []],
            "page.body": ["whole 1", "whole 2", "whole 3"],
            "n": [1, 2, 3],
        }
    ),
)
write(
    "chats",
    pa.table(
        {
            "prompt": ["p", "q"],
            "messages": [
                [{"role": "user", "content": "Bonjour !"}, {"role": "assistant", "content": "Salut."}],
                [
                    {"role": "system", "content": "Bref."},
                    {"role": "user", "content": "Oui ?"},
                    {"role": "assistant", "content": "Non."},
                ],
            ],
        }
    ),
)
write(
    "questions",
    pa.table(
        {
            "id": ["a", "b"],
            "title": ["T", "T"],
            "context": ["Un été.", "Un été."],
            "question": ["Quand ?", "Qui ?"],
            "answers": pa.array(
                [{"text": ["été"], "answer_start": [3]}, {"text": [], "answer_start": []}],
                pa.struct([("text", pa.list_(pa.string())), ("answer_start", pa.list_(pa.int32()))]),
            ),
        }
    ),
)
write("instructions", pa.table({"output": ["Oui."], "instruction": ["Dis oui."], "input": [None]}, schema=pa.schema(
    [("output", pa.string()), ("instruction", pa.string()), ("input", pa.string())])))
