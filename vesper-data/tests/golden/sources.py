"""Writes sources.json: what Python reads from the files of VESPER_DATA, as counts and SHA-256 of the texts.

    VESPER_DATA=... python sources.py > sources.json      (needs pyarrow)

The texts of records with questions and answers are laid out here a second time, from the description of `Labels`.
"""

import glob, hashlib, json, os, sys

import pyarrow.parquet

root = os.environ["VESPER_DATA"]
read = lambda path: open(os.path.join(root, path), encoding="utf-8", newline="").read()


def text_file(path):
    stories = read(path).replace("\r\n", "\n").split("<|endoftext|>")
    for i, story in enumerate(stories):
        story = story.lstrip("\n") if i > 0 else story
        story = story.rstrip("\n") if i < len(stories) - 1 else story
        if story.strip():
            yield story, None


def turns(*parts):
    """The text of (label, text, learned) and the byte ranges that are learned."""
    text, ranges = b"", []
    parts = [part for part in parts if part[1].strip()]
    for i, (label, body, learned) in enumerate(parts):
        text += label.encode()
        start = len(text)
        text += ((" " if label else "") + body).encode() + (b"\n\n" if i < len(parts) - 1 else b"")
        if learned:
            ranges.append((start, len(text)))
    return text.decode(), ranges


def squad(path, whole):
    for article in json.loads(read(path))["data"]:
        for paragraph in article["paragraphs"]:
            parts = []
            for question in paragraph["qas"]:
                impossible = question.get("is_impossible", False)
                answer = "No answer." if impossible else question["answers"][0]["text"]
                parts.append([("Question:", question["question"], False), ("Answer:", answer, True)])
            context = ("", paragraph["context"], False)
            if whole:
                yield turns(context, *sum(parts, []))[0], None
            else:
                for part in parts:
                    yield turns(context, *part)


def instructions(path):
    for r in json.loads(read(path)):
        request = r["instruction"] + ("\n\n" + r["input"] if r["input"].strip() else "")
        yield turns(("User:", request, False), ("Assistant:", r["output"], True))


def chats(path):
    labels = {"user": "User:", "assistant": "Assistant:"}
    for line in read(path).splitlines():
        messages = json.loads(line)["messages"]
        content = lambda m: "\n".join(block["value"] for block in m["content"])
        yield turns(*((labels[m["role"]], content(m), m["role"] == "assistant") for m in messages))


def jsonl(path):
    for line in read(path).split("\n"):
        if line.strip():
            yield json.loads(line)["text"], None


def dialogue(path):
    for conversation in read(path).split("\n\n"):
        if conversation.strip():
            yield conversation.strip("\n"), None


def parquet(*paths):
    for path in paths:
        for text in pyarrow.parquet.read_table(os.path.join(root, path), columns=["text"])["text"].to_pylist():
            yield text, None


def digest(documents):
    total, count = hashlib.sha256(), 0
    for text, loss in documents:
        data = text.encode()
        total.update(len(data).to_bytes(8, "little") + data)
        for start, end in loss if loss is not None else [(2**64 - 1, 0)]:
            total.update(start.to_bytes(8, "little") + end.to_bytes(8, "little"))
        count += 1
    return {"documents": count, "sha256": total.hexdigest()}


stories = "parquet/tinystories-v2-gpt4/data/%s-00000-of-00001.parquet"
novels = sorted(glob.glob(os.path.join(root, "french/novels/*.txt")))
# The documents of each source: pairs of a text and the byte ranges that are learned.
DOCUMENTS = {
    "french/novels": lambda: (d for path in novels for d in text_file(path)),
    "tinystories/tinystories-v1-train-first2316.txt": lambda: text_file("tinystories/tinystories-v1-train-first2316.txt"),
    "instruct/wiki_demo.txt": lambda: ((line, None) for line in read("instruct/wiki_demo.txt").split("\n") if line.strip()),
    "instruct/c4_demo.jsonl": lambda: jsonl("instruct/c4_demo.jsonl"),
    "instruct/instruction-data-rasbt.json": lambda: instructions("instruct/instruction-data-rasbt.json"),
    "instruct/v1_sft_demo.jsonl": lambda: chats("instruct/v1_sft_demo.jsonl"),
    "french/dialogue": lambda: dialogue("french/dialogue/rhapsodie.claire-like.txt"),
    stories % "train": lambda: parquet(stories % "train"),
    stories % "validation": lambda: parquet(stories % "validation"),
}
for name in ["dev-v1.1", "dev-v2.0-cs224n-half", "piaf-v1.1", "piaf-ml-small"]:
    path = f"squad/{name}.json"
    DOCUMENTS[path] = lambda path=path: squad(path, False)
    DOCUMENTS[path + " as paragraphs"] = lambda path=path: squad(path, True)

if __name__ == "__main__":
    json.dump({name: digest(documents()) for name, documents in DOCUMENTS.items()}, sys.stdout, indent=2)
    print()
