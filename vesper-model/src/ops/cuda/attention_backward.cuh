// What the gradients of attention share on all tensor cores.
#pragma once

#include "attention.cuh"

// Turns the gradient of 16 rotated rows, from position `row0` on, into that of the rows before the rotation. The two
// halves of a pair of columns are in the same lane. cos, sin: (positions, D / 2).
template <int D>
__device__ __forceinline__ void rotate_back(float c[D / 8][4], const float *cos, const float *sin, int row0, int t) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = row0 + lane / 4 + 8 * h;
        if (row >= t) continue;
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            const size_t at = (size_t)row * (D / 2) + 8 * n + lane % 4 * 2;
            const float2 cs = *reinterpret_cast<const float2 *>(cos + at);
            const float2 sn = *reinterpret_cast<const float2 *>(sin + at);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                float &a = c[n][2 * h + k], &b = c[n + D / 16][2 * h + k];
                const float co = k ? cs.y : cs.x, si = k ? sn.y : sn.x, x = a;
                a = x * co + b * si;
                b = b * co - x * si;
            }
        }
    }
}
