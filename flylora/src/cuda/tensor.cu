// The products of skinny.cu in bf16 on tensor cores. x and y are bf16; M and h, which are f32, go in as sums of two
// numbers of bf16, so that they keep 16 bits, and all sums are in f32, in an order that does not depend on the run.
//
// The order of the terms of a sum, and of the columns of a result, is free: it is chosen such that every lane reads and
// writes 16 bytes that lie side by side, straight from and to the device's memory.

#include "mma.cuh"
#include "params.cuh"

constexpr int WARPS = 8;

// h[i][j] = scale sum over c of x[i][c] M[j][c], 0 where a mask says so. A warp takes 16 rows.
template <int R>
__device__ __forceinline__ void project(const bf16 *x, const float *m, const uint32_t *mask, float *h,
                                        const SkinnyParams &p) {
    // Columns of M that are in shared memory at a time; rows of it are shifted by half of all banks.
    constexpr int CHUNK = R <= 32 ? 256 : 128, STRIDE = CHUNK + 32, GROUPS = R <= 16 ? 4 : 2, STEP = 32 * GROUPS;
    __shared__ alignas(16) bf16 high[R][STRIDE], low[R][STRIDE];
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint64_t row0 = ((uint64_t)blockIdx.x * WARPS + threadIdx.x / 32) * 16;
    float sums[R / 8][4];
#pragma unroll
    for (int j = 0; j < R / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[j][i] = 0.0f;
    uint4 next[2 * GROUPS];
    auto fetch = [&](uint32_t c) {
        auto row = [&](int i) {
            const uint64_t row = row0 + g + 8 * (i % 2);
            return row < p.rows ? x + row * p.columns : nullptr;
        };
        read8(next, row, [&](int i) { return c + 32 * (i / 2) + 8 * t; }, p.columns, p.wide);
    };
    fetch(0);
    for (uint32_t c0 = 0; c0 < p.columns; c0 += CHUNK) {
        __syncthreads();
        constexpr int AT_ONCE = 8;  // numbers of M that a thread asks for before it uses one
#pragma unroll 1
        for (int first = threadIdx.x; first < R * CHUNK; first += AT_ONCE * WARPS * 32) {
            float values[AT_ONCE];
            // By ranks first where those lie side by side.
            auto place = [&](int i) {
                const int e = first + i * WARPS * 32;
                return p.stride_j == 1 ? make_int2(e % R, e / R) : make_int2(e / CHUNK, e % CHUNK);
            };
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int2 at = place(i);
                const bool there = at.x < p.r && c0 + at.y < p.columns;
                values[i] = there ? m[at.x * p.stride_j + (c0 + at.y) * p.stride_c] : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int2 at = place(i);
                const bf16 rounded = __float2bfloat16_rn(values[i]);
                high[at.x][at.y] = rounded;
                low[at.x][at.y] = __float2bfloat16_rn(values[i] - __bfloat162float(rounded));
            }
        }
        __syncthreads();
#pragma unroll
        for (int s = 0; s < CHUNK / STEP; s++) {
            if (c0 + s * STEP >= p.columns) break;
            uint4 now[GROUPS][2];
#pragma unroll
            for (int q = 0; q < GROUPS; q++)
#pragma unroll
                for (int half = 0; half < 2; half++) now[q][half] = next[2 * q + half];
            if (c0 + (s + 1) * STEP < p.columns) fetch(c0 + (s + 1) * STEP);
#pragma unroll
            for (int q = 0; q < GROUPS; q++) {
                const uint32_t *up = words(now[q][0]), *down = words(now[q][1]);
#pragma unroll
                for (int j = 0; j < R / 8; j++) {
                    const int c = s * STEP + 32 * q + 8 * t;
                    const uint4 fh = *reinterpret_cast<const uint4 *>(&high[8 * j + g][c]);
                    const uint4 fl = *reinterpret_cast<const uint4 *>(&low[8 * j + g][c]);
#pragma unroll
                    for (int k = 0; k < 4; k += 2) {
                        const uint32_t a[4] = {up[k], down[k], up[k + 1], down[k + 1]};
                        multiply_add(sums[j], a, words(fh)[k], words(fh)[k + 1]);
                        multiply_add(sums[j], a, words(fl)[k], words(fl)[k + 1]);
                    }
                }
            }
        }
    }
    put_projected<R>(h, sums, mask, row0, lane, p);
}

// Two neighbouring ranks of a row of h, 0 past the last row or rank.
__device__ __forceinline__ float2 pair(const float *h, uint64_t row, uint32_t j, uint64_t end, uint32_t r) {
    if (row >= end || j >= r) return {0.0f, 0.0f};
    const float *from = h + row * r + j;
    if (r % 2 == 0) return *reinterpret_cast<const float2 *>(from);
    return {from[0], j + 1 < r ? from[1] : 0.0f};
}

// y[i][c] = ratio[c] (base[i][c] + scale sum over j of h[i][j] M[j][c]), without a ratio where there is none. A warp takes 32 columns of a band of rows.
template <int R>
__device__ __forceinline__ void expand(const float *h, const float *m, const float *ratio, bf16 *y,
                                       const SkinnyParams &p) {
    constexpr int K = (R + 15) / 16, AHEAD = R <= 16 ? 2 : 1, ROWS = 16 * AHEAD;
    const bf16 *base = p.adds ? y : nullptr;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t c0 = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * 32, c = c0 + 8 * t;
    if (c0 >= p.columns) return;
    // Column g of product n is column 8 (g / 2) + 2 n + g % 2 of the 32, so that a lane's results lie side by side.
    Split factor[K][4][2];
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t column = c0 + 8 * (g / 2) + 2 * n + g % 2, j = 16 * k + 8 * half + 2 * t;
                auto at = [&](uint32_t j) {
                    const bool there = j < p.r && column < p.columns;
                    return there ? m[j * p.stride_j + column * p.stride_c] * p.scale : 0.0f;
                };
                factor[k][n][half] = split(at(j), at(j + 1));
            }
    float times[8];
#pragma unroll
    for (int v = 0; v < 8; v++) times[v] = ratio && c + v < p.columns ? ratio[c + v] : 1.0f;
    const uint64_t start = (uint64_t)blockIdx.y * p.band, end = min(start + p.band, p.rows);
    uint4 next[2 * AHEAD];
    float2 ranks[AHEAD][K][4];
    auto fetch = [&](uint64_t row0) {
        auto at = [&](int i) { return row0 + 8 * i + g; };
        auto row = [&](int i) { return base && at(i) < end ? base + at(i) * p.columns : nullptr; };
        read8(next, row, [&](int) { return c; }, p.columns, p.wide);
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int k = 0; k < K; k++) {
                    ranks[i][k][half] = pair(h, at(2 * i + half), 16 * k + 2 * t, end, p.r);
                    ranks[i][k][2 + half] = pair(h, at(2 * i + half), 16 * k + 8 + 2 * t, end, p.r);
                }
    };
    fetch(start);
    for (uint64_t row0 = start; row0 < end; row0 += ROWS) {
        float sums[AHEAD][4][4];
        uint32_t ah[AHEAD][K][4], al[AHEAD][K][4];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const bf16 *from = reinterpret_cast<const bf16 *>(&next[2 * i + half]);
#pragma unroll
                for (int v = 0; v < 8; v++) sums[i][v / 2][2 * half + v % 2] = to_float(from[v]);
            }
#pragma unroll
            for (int k = 0; k < K; k++)
#pragma unroll
                for (int part = 0; part < 4; part++) {
                    const Split s = split(ranks[i][k][part].x, ranks[i][k][part].y);
                    ah[i][k][part] = s.high;
                    al[i][k][part] = s.low;
                }
        }
        if (row0 + ROWS < end) fetch(row0 + ROWS);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
#pragma unroll
            for (int k = 0; k < K; k++)
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    const Split *f = factor[k][n];
                    multiply_add(sums[i][n], ah[i][k], f[0].high, f[1].high);
                    multiply_add(sums[i][n], al[i][k], f[0].high, f[1].high);
                    multiply_add(sums[i][n], ah[i][k], f[0].low, f[1].low);
                }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint64_t row = row0 + 16 * i + 8 * half + g;
                Vec<bf16, 8> to;
#pragma unroll
                for (int v = 0; v < 8; v++) to.v[v] = from_float<bf16>(sums[i][v / 2][2 * half + v % 2] * times[v]);
                if (row < end) write<bf16, 8>(y + row * p.columns, c, p.columns, p.wide, to);
            }
        }
    }
}

#define KERNELS(R)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                               \
        project_bf16_##R(const bf16 *x, const float *m, const uint32_t *mask, float *h, SkinnyParams p) {                   \
        project<R>(x, m, mask, h, p);                                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, R <= 16 ? 2 : 1)                                                 \
        expand_bf16_##R(const float *h, const float *m, const float *ratio, bf16 *y, SkinnyParams p) {                      \
        expand<R>(h, m, ratio, y, p);                                                                                  \
    }

KERNELS(8)
KERNELS(16)
KERNELS(32)
KERNELS(64)
