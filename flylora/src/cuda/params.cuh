// What the kernels for few ranks take, and what several of them do.
#pragma once

#include "common.cuh"

struct SkinnyParams {
    uint64_t rows;
    uint32_t columns;
    uint32_t r;
    uint64_t stride_j, stride_c;  // of M, or of dM
    float scale;
    uint32_t wide;   // whether rows can be read by vectors
    uint32_t parts;  // outer, reduce: bands of rows
    uint32_t band;   // expand, outer: rows of a band
    uint32_t adds;   // expand: whether base is y
    uint32_t unused;
};
static_assert(sizeof(SkinnyParams) == 56, "the Rust side has the same layout");

// 16 rows of h from the sums of a warp, as a tensor core leaves them: scaled, and 0 where a mask says so.
template <int R>
__device__ __forceinline__ void put_projected(float *h, const float (&sums)[R / 8][4], const uint32_t *mask, uint64_t row0,
                                              int lane, const SkinnyParams &p) {
    const int g = lane / 4, t = lane % 4;
    const uint32_t masks = (p.r + 31) / 32;
#pragma unroll
    for (int j = 0; j < R / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint64_t row = row0 + g + 8 * (i / 2);
            const uint32_t rank = 8 * j + 2 * t + i % 2;
            if (row < p.rows && rank < p.r) {
                const bool used = !mask || (mask[row * masks + rank / 32] >> (rank % 32) & 1);
                h[row * p.r + rank] = used ? sums[j][i] * p.scale : 0.0f;
            }
        }
}

// What a sweep over x and dy takes.
struct SweepParams {
    uint64_t rows;
    uint32_t in, out;
    uint32_t r;
    uint32_t threads;  // of a block that have columns of x, a multiple of 32; the others have columns of dy
    uint64_t band;     // rows of a block
};
static_assert(sizeof(SweepParams) == 32, "the Rust side has the same layout");

// Lanes exchange halves of the values that they hold, so that in the end each holds the sums over all lanes of 1 / 32 of
// the values: lane l from value l / 32 of them on.
template <int HALF, int OFFSET> __device__ __forceinline__ void fold(float *sums, int lane) {
    const bool upper = lane & OFFSET;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        const float given = upper ? sums[i] : sums[i + HALF], kept = upper ? sums[i + HALF] : sums[i];
        sums[i] = kept + __shfl_xor_sync(0xffffffffu, given, OFFSET);
    }
    if constexpr (OFFSET > 1) fold<HALF / 2, OFFSET / 2>(sums, lane);
}
