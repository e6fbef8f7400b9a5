// Formats of GGUF: blocks of 32 elements with a scale to each. A unit is a quarter of a block. The blocks' sizes are
// even, and no more: everything is read two bytes at a time.
//
// The layouts are those of ggml's block_q4_0, block_q4_1, block_q5_0, block_q5_1 and block_q8_0.
#pragma once

#include "common.cuh"

// Bytes of memory that begins at an even address.
__device__ __forceinline__ uint32_t two_bytes(const uint8_t *from) { return *reinterpret_cast<const uint16_t *>(from); }

__device__ __forceinline__ uint32_t four_bytes(const uint8_t *from) {
    return two_bytes(from) | two_bytes(from + 2) << 16;
}

__device__ __forceinline__ uint2 eight_bytes(const uint8_t *from) {
    return make_uint2(four_bytes(from), four_bytes(from + 4));
}

// The number whose bits are the lower 16.
__device__ __forceinline__ float half_bits(uint32_t bits) {
    return __half2float(__ushort_as_half((unsigned short)(bits & 0xffffu)));
}

// 8 bytes as numbers, less `zero`: each byte is put below the exponent of 2^23, which is then taken away too.
__device__ __forceinline__ void numbers(uint2 bytes, float zero, float (&w)[8]) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        w[j] = __uint_as_float(__byte_perm(bytes.x, 0x4b000000u, 0x7440u + j)) - (8388608.0f + zero);
        w[4 + j] = __uint_as_float(__byte_perm(bytes.y, 0x4b000000u, 0x7440u + j)) - (8388608.0f + zero);
    }
}

// The low or the high halves of 8 bytes.
__device__ __forceinline__ uint2 nibbles(uint2 bytes, bool high) {
    const uint32_t shift = high ? 4 : 0;
    return make_uint2(bytes.x >> shift & 0x0f0f0f0fu, bytes.y >> shift & 0x0f0f0f0fu);
}

// Bits 0 to 3 as bit 4 of four bytes.
__device__ __forceinline__ uint32_t fifth(uint32_t bits) {
    return (bits & 1u) << 4 | (bits & 2u) << 11 | (bits & 4u) << 18 | (bits & 8u) << 25;
}

struct Q8_0 {
    static constexpr int V = 8;
    static constexpr bool SCALED = true, LEAST = false;
    struct Unit {
        uint2 q;
        uint32_t scale;
    };

    static __device__ __forceinline__ size_t bytes(uint32_t n) { return (size_t)n / 32 * 34; }

    static __device__ __forceinline__ Unit load(const uint8_t *row, uint32_t unit) {
        const uint8_t *const block = row + (size_t)(unit / 4) * 34;
        return {eight_bytes(block + 2 + unit % 4 * 8), two_bytes(block)};
    }

    static __device__ __forceinline__ void values(const Unit &u, float (&w)[8]) {
        numbers(make_uint2(u.q.x ^ 0x80808080u, u.q.y ^ 0x80808080u), 128.0f, w);  // from -128 ..= 127 to 0 ..= 255
    }

    static __device__ __forceinline__ float scale(const Unit &u) { return half_bits(u.scale); }
    static __device__ __forceinline__ float least(const Unit &) { return 0.0f; }
};

// Blocks of 4 bits: the first 16 elements in the low halves of 16 bytes, the others in the high ones; with a smallest
// value where MINIMUM says so, and with a fifth bit of each element in 4 more bytes where FIFTH does.
template <bool MINIMUM, bool FIFTH> struct Q4_Q5 {
    static constexpr int V = 8;
    static constexpr bool SCALED = true, LEAST = MINIMUM;
    static constexpr uint32_t HEAD = MINIMUM ? 4 : 2, SIZE = HEAD + (FIFTH ? 4 : 0) + 16;
    struct Unit {
        uint2 q;
        uint32_t scale;  // and the smallest value in the upper half
        uint32_t fifths;
        bool high;
    };

    static __device__ __forceinline__ size_t bytes(uint32_t n) { return (size_t)n / 32 * SIZE; }

    static __device__ __forceinline__ Unit load(const uint8_t *row, uint32_t unit) {
        const uint8_t *const block = row + (size_t)(unit / 4) * SIZE;
        Unit u;
        u.scale = MINIMUM ? four_bytes(block) : two_bytes(block);
        u.fifths = FIFTH ? two_bytes(block + HEAD + unit % 4 / 2 * 2) >> unit % 2 * 8 : 0;
        u.q = eight_bytes(block + SIZE - 16 + unit % 2 * 8);
        u.high = unit % 4 >= 2;
        return u;
    }

    static __device__ __forceinline__ void values(const Unit &u, float (&w)[8]) {
        uint2 q = nibbles(u.q, u.high);
        if (FIFTH) {
            q.x |= fifth(u.fifths);
            q.y |= fifth(u.fifths >> 4);
        }
        numbers(q, MINIMUM ? 0.0f : FIFTH ? 16.0f : 8.0f, w);
    }

    static __device__ __forceinline__ float scale(const Unit &u) { return half_bits(u.scale); }
    static __device__ __forceinline__ float least(const Unit &u) { return MINIMUM ? -half_bits(u.scale >> 16) : 0.0f; }
};

typedef Q4_Q5<false, false> Q4_0;
typedef Q4_Q5<true, false> Q4_1;
typedef Q4_Q5<false, true> Q5_0;
typedef Q4_Q5<true, true> Q5_1;
