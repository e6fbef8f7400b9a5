"""Two valid caches as first inputs of the fuzz target `cache`.

Run: python3 seeds.py corpus/cache
"""

import pathlib
import struct
import sys

sys.path.append(str(pathlib.Path(__file__).parent.parent / "tests" / "golden"))
from cache_format import cache  # noqa: E402

folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
file = (b"/a.txt", 5, 1000, 9, b"\4" * 32)
more = {"text_bytes": 9, "settings": b"\3" * 32, "files": [file], "counts": (8, 3, 2, 1)}
for name, arguments in (
    ("narrow", (2, 300, [[1, 2, 3], [299, 5, 6, 7], [], [8] * 5], [(3, 5), (7, 12)])),
    ("wide", (4, 70_000, [[69_999, 1], [2, 3, 4]], [])),
):
    manifest, shard = cache(*arguments, **more)
    data = bytearray(struct.pack("<H", len(manifest)) + manifest + shard)
    # One with an odd sum and one with an even one, for which the target makes the checksums anew: byte 220 of the
    # manifest is one of those that mean nothing.
    for parity in (0, 1):
        data[2 + 220] = 0
        data[2 + 220] = (sum(data) + parity) % 2
        (folder / f"{name}-{parity}").write_bytes(data)
