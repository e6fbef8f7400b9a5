"""The orders that src/batch/order.rs pins, and the sides of documents that src/tokens/split.rs pins, written from their
definitions: ChaCha8, a Feistel network with cycle walking, SplitMix64, SHA-256.

Run: python3 orders.py
"""

import hashlib
import struct

MASK32 = (1 << 32) - 1
MASK64 = (1 << 64) - 1


def quarter(s, a, b, c, d):
    def rotate(x, n):
        return ((x << n) | (x >> (32 - n))) & MASK32

    for x, y, z, n in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        s[x] = (s[x] + s[y]) & MASK32
        s[z] = rotate(s[z] ^ s[x], n)


def words(seed, use, stream):
    """32-bit words of the key stream; the key is the seed and the use, little-endian, then zeros."""
    key = struct.unpack("<8I", struct.pack("<QQ16x", seed, use))
    block = 0
    while True:
        start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *key]
        start += [block & MASK32, block >> 32, stream & MASK32, stream >> 32]
        state = list(start)
        for _ in range(4):
            for column in ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)):
                quarter(state, *column)
            for diagonal in ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)):
                quarter(state, *diagonal)
        yield from ((x + y) & MASK32 for x, y in zip(state, start))
        block += 1


def mix(state):
    z = (state + 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def permutation(length, seed, epoch, use=0):
    stream = words(seed, use, epoch)
    keys = [next(stream) | next(stream) << 32 for _ in range(8)]
    bits = max(10, (length - 1).bit_length())
    left = bits // 2

    def network(x):
        widths = (left, bits - left)
        l, r = x >> widths[1], x % 2 ** widths[1]
        for key in keys:
            l, r = r, l ^ mix(r ^ key) % 2 ** widths[0]
            widths = (widths[1], widths[0])
        return l * 2 ** widths[1] + r

    def at(index):
        x = network(index)
        while x >= length:
            x = network(x)
        return x

    return at


def order(length, seed, epoch):
    at = permutation(length, seed, epoch)
    return [at(index) for index in range(length)]


def held_out(documents, fraction, seed):
    for document in documents:
        digest = hashlib.sha256(struct.pack(f"<{len(document)}I", *document)).digest()
        if mix(int.from_bytes(digest[:8], "little") ^ mix(seed)) < fraction * 2**64:
            yield document[0]


print(order(10, 0, 0))
print(order(10, 42, 1))
large = permutation((1 << 41) + 12345, 1 << 40, (1 << 33) + 5)
print([large(index) for index in (0, 1, 2, 1 << 41)])
rows = permutation(1000, 7, 3, use=5 + 2)
print([rows(index) for index in (0, 1, 2, 999)])
print(list(held_out([(i, 7, i * 1000) for i in range(40)], 0.2, 42)))
