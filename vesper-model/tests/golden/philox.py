"""Which elements dropout keeps at p = 0.5, for tests/ops/dropout.rs: Philox 4x32-10 with the key 42 and the offset 7.

    python philox.py

Plain integers, written from the paper: Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3.
"""
MASK = 0xFFFFFFFF


def philox(counter, key):
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(b >> 32) ^ counter[1] ^ key[0], b & MASK, (a >> 32) ^ counter[3] ^ key[1], a & MASK]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return counter


assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # the authors' known answer
words = [word for block in range(6) for word in philox([block, 0, 7, 0], [42, 0])]
print([int(word >= 1 << 31) for word in words])
