// Formats of GGUF: blocks of 256 elements in groups with scales of their own, themselves small integers. A unit is 8
// elements of a group.
//
// The layouts are those of ggml's block_q2_K, block_q3_K, block_q4_K, block_q5_K and block_q6_K.
#pragma once

#include "decode_blocks.cuh"

// Two bits of each of 8 bytes.
__device__ __forceinline__ uint2 pairs_of_bits(uint2 bytes, uint32_t shift) {
    return make_uint2(bytes.x >> shift & 0x03030303u, bytes.y >> shift & 0x03030303u);
}

// One bit of each of 8 bytes, as bit `to`.
__device__ __forceinline__ uint2 single_bits(uint2 bytes, uint32_t shift, uint32_t to) {
    return make_uint2((bytes.x >> shift & 0x01010101u) << to, (bytes.y >> shift & 0x01010101u) << to);
}

__device__ __forceinline__ uint2 both(uint2 a, uint2 b) { return make_uint2(a.x | b.x, a.y | b.y); }

// 8 groups of 32 with scales and smallest values of 6 bits each. The head of a block is 16 bytes: two numbers, by which
// the scales and the smallest values are multiplied, and 12 bytes of both. Groups 2 i and 2 i + 1 share 32 bytes.
template <bool FIFTH> struct Q4K_Q5K {
    static constexpr int V = 8;
    static constexpr bool SCALED = true, LEAST = true;
    static constexpr uint32_t SIZE = FIFTH ? 176 : 144;
    struct Unit {
        uint4 head;
        uint2 q, fifths;
        uint32_t group;
    };

    static __device__ __forceinline__ size_t bytes(uint32_t n) { return (size_t)n / 256 * SIZE; }

    static __device__ __forceinline__ Unit load(const uint8_t *row, uint32_t unit) {
        const uint8_t *const block = row + (size_t)(unit / 32) * SIZE;  // a multiple of 16
        const uint32_t group = unit % 32 / 4, within = unit % 4 * 8;
        Unit u;
        u.head = *reinterpret_cast<const uint4 *>(block);
        u.fifths = FIFTH ? *reinterpret_cast<const uint2 *>(block + 16 + within) : make_uint2(0, 0);
        u.q = *reinterpret_cast<const uint2 *>(block + SIZE - 128 + group / 2 * 32 + within);
        u.group = group;
        return u;
    }

    static __device__ __forceinline__ void values(const Unit &u, float (&w)[8]) {
        uint2 q = nibbles(u.q, u.group % 2);
        if (FIFTH) q = both(q, single_bits(u.fifths, u.group, 4));
        numbers(q, 0.0f, w);
    }

    // Groups 0 to 3 have the lower 6 bits of a byte; the bits above those belong to groups 4 to 7, with 4 bits more.
    static __device__ __forceinline__ float scale(const Unit &u) {
        const uint32_t shift = u.group % 4 * 8, low = u.head.y >> shift, high = u.head.w >> shift;
        return half_bits(u.head.x) * (u.group < 4 ? low & 63u : (high & 15u) | (low >> 6 & 3u) << 4);
    }

    static __device__ __forceinline__ float least(const Unit &u) {
        const uint32_t shift = u.group % 4 * 8, low = u.head.z >> shift, high = u.head.w >> shift;
        return half_bits(u.head.x >> 16) * (u.group < 4 ? low & 63u : (high >> 4 & 15u) | (low >> 6 & 3u) << 4);
    }
};

typedef Q4K_Q5K<false> Q4K;
typedef Q4K_Q5K<true> Q5K;

// 128 bytes of 4 bits, 64 of 2 bits, 16 scales, and the number that those are multiplied by. Of each half of the block,
// four groups of 32: the low halves of 64 bytes, then the high ones; the 2 bits of all four are in the same 32 bytes.
struct Q6K {
    static constexpr int V = 8;
    static constexpr bool SCALED = true, LEAST = false;
    struct Unit {
        uint2 low, high;
        uint32_t group;
        int32_t scale;
        uint32_t all;
    };

    static __device__ __forceinline__ size_t bytes(uint32_t n) { return (size_t)n / 256 * 210; }

    static __device__ __forceinline__ Unit load(const uint8_t *row, uint32_t unit) {
        const uint8_t *const block = row + (size_t)(unit / 32) * 210;
        const uint32_t half = unit % 32 / 16, group = unit % 16 / 4, within = unit % 4 * 8;
        Unit u;
        u.low = eight_bytes(block + half * 64 + group % 2 * 32 + within);
        u.high = eight_bytes(block + 128 + half * 32 + within);
        u.group = group;
        u.scale = (int8_t)block[192 + half * 8 + group * 2 + within / 16];
        u.all = two_bytes(block + 208);
        return u;
    }

    static __device__ __forceinline__ void values(const Unit &u, float (&w)[8]) {
        uint2 high = pairs_of_bits(u.high, u.group * 2);
        high.x <<= 4, high.y <<= 4;
        numbers(both(nibbles(u.low, u.group >= 2), high), 32.0f, w);
    }

    static __device__ __forceinline__ float scale(const Unit &u) { return half_bits(u.all) * u.scale; }
    static __device__ __forceinline__ float least(const Unit &) { return 0.0f; }
};

// 16 scales and smallest values of 4 bits, 64 bytes of 2 bits, and the numbers that both are multiplied by. Of each
// half of the block, four groups of 32 in the same 32 bytes, each with two scales.
struct Q2K {
    static constexpr int V = 8;
    static constexpr bool SCALED = true, LEAST = true;
    struct Unit {
        uint2 q;
        uint32_t shift, scales, all;
    };

    static __device__ __forceinline__ size_t bytes(uint32_t n) { return (size_t)n / 256 * 84; }

    static __device__ __forceinline__ Unit load(const uint8_t *row, uint32_t unit) {
        const uint8_t *const block = row + (size_t)(unit / 32) * 84;
        const uint32_t half = unit % 32 / 16, group = unit % 16 / 4, within = unit % 4 * 8;
        return {eight_bytes(block + 16 + half * 32 + within), group * 2,
                block[half * 8 + group * 2 + within / 16], four_bytes(block + 80)};
    }

    static __device__ __forceinline__ void values(const Unit &u, float (&w)[8]) {
        numbers(pairs_of_bits(u.q, u.shift), 0.0f, w);
    }

    static __device__ __forceinline__ float scale(const Unit &u) { return half_bits(u.all) * (u.scales & 15u); }
    static __device__ __forceinline__ float least(const Unit &u) { return half_bits(u.all >> 16) * (u.scales >> 4); }
};

// A third bit of each element in 32 bytes, the others as in Q2K, 16 scales of 6 bits in 12 bytes, and the number that
// those are multiplied by.
struct Q3K {
    static constexpr int V = 8;
    static constexpr bool SCALED = true, LEAST = false;
    struct Unit {
        uint2 low, third;
        uint32_t place;  // which of the 8 groups
        uint32_t low_scale, high_scale, all;
    };

    static __device__ __forceinline__ size_t bytes(uint32_t n) { return (size_t)n / 256 * 110; }

    static __device__ __forceinline__ Unit load(const uint8_t *row, uint32_t unit) {
        const uint8_t *const block = row + (size_t)(unit / 32) * 110;
        const uint32_t place = unit % 32 / 4, within = unit % 4 * 8, scale = place * 2 + within / 16;
        Unit u;
        u.third = eight_bytes(block + within);
        u.low = eight_bytes(block + 32 + place / 4 * 32 + within);
        u.place = place;
        u.low_scale = block[96 + scale % 8] >> (scale < 8 ? 0 : 4) & 15u;
        u.high_scale = block[104 + scale % 4] >> scale / 4 * 2 & 3u;
        u.all = two_bytes(block + 108);
        return u;
    }

    static __device__ __forceinline__ void values(const Unit &u, float (&w)[8]) {
        numbers(both(pairs_of_bits(u.low, u.place % 4 * 2), single_bits(u.third, u.place, 2)), 4.0f, w);
    }

    static __device__ __forceinline__ float scale(const Unit &u) {
        return half_bits(u.all) * ((int32_t)(u.low_scale | u.high_scale << 4) - 32);
    }
    static __device__ __forceinline__ float least(const Unit &) { return 0.0f; }
};
