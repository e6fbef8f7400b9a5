"""The bytes of caches that tests/cache.rs pins, written from the format's description in docs/src/cache-format.md.

Run: python3 cache_format.py
"""

import hashlib
import struct


def sha(data):
    return hashlib.sha256(data).digest()


def header(magic, width, body):
    data = (magic + struct.pack("<III", 3, 0x0A0B0C0D, width) + body).ljust(224, b"\0")
    return data + sha(data)


def cache(width, vocab, documents, ignored, unknown=0, skipped=0, text_bytes=0, settings=b"\0" * 32, files=(), counts=(0, 0, 0, 0)):
    """The bytes of the manifest and of the only shard."""
    ids = [token for document in documents for token in document]
    data = struct.pack(f"<{len(ids)}{'H' if width == 2 else 'I'}", *ids)
    data += b"\0" * (-len(data) % 8)
    index, end = b"", 0
    for document in documents:
        end += len(document)
        index += struct.pack("<Q", end) + sha(struct.pack(f"<{len(document)}I", *document))[:8]
    for start, stop in ignored:
        index += struct.pack("<QQ", start, stop)
    content, tokenizer, limit = b"\1" * 32, b"\2" * 32, 1 << 26
    build = sha(b"vesper token cache 3" + content + tokenizer + struct.pack("<QQ", vocab, limit))
    numbers = struct.pack("<I7Q", 0, 0, 0, 0, len(ids), len(documents), len(ignored), unknown)
    shard_header = header(b"VSPSHARD", width, numbers + build + sha(data) + sha(index))
    shard = shard_header + data + index
    numbers = struct.pack("<I8Q", len(files), 1, len(ids), len(documents), vocab, unknown, skipped, text_bytes, limit)
    manifest = header(b"VSPTOKEN", width, numbers + content + tokenizer + settings + struct.pack("<4Q", *counts))
    manifest += struct.pack("<4Q", len(ids), len(documents), len(ignored), unknown) + sha(shard_header)
    for path, nanoseconds, seconds, length, digest in files:
        manifest += struct.pack("<IIqQ", len(path), nanoseconds, seconds, length) + digest + path
    return manifest + sha(manifest), shard


if __name__ == "__main__":
    for arguments in (
        (2, 300, [[1, 2, 3], [299, 5, 6, 7], [], [8] * 5], [(3, 5), (7, 12)], 6),
        (4, 70_000, [[69_999, 1], [2, 3, 4]], [], 0),
    ):
        print([hashlib.sha256(data).hexdigest() for data in cache(*arguments)])
