"""The orders that src/batch/order.rs pins: ChaCha8 and Fisher-Yates, written from their definitions.

Run: python3 epoch_order.py
"""

import struct

MASK32 = (1 << 32) - 1
MASK64 = (1 << 64) - 1


def quarter(s, a, b, c, d):
    def rotate(x, n):
        return ((x << n) | (x >> (32 - n))) & MASK32

    for x, y, z, n in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        s[x] = (s[x] + s[y]) & MASK32
        s[z] = rotate(s[z] ^ s[x], n)


def words(seed, stream):
    """32-bit words of the key stream; the key is the seed, little-endian, then zeros."""
    key = struct.unpack("<8I", struct.pack("<Q24x", seed))
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


def epoch_order(windows, seed, epoch):
    stream = words(seed, epoch)

    def below(bound):
        while True:
            low = next(stream)
            product = (low | next(stream) << 32) * bound
            if product & MASK64 >= (1 << 64) % bound:
                return product >> 64

    order = list(range(windows))
    for last in range(windows - 1, 0, -1):
        other = below(last + 1)
        order[last], order[other] = order[other], order[last]
    return order


print(epoch_order(10, 0, 0))
print(epoch_order(10, 42, 1))
print(epoch_order(100, 1 << 40, (1 << 33) + 5)[:10])
