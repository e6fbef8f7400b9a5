// The forward pass of attention on tensor cores, for the packed projection and for a cache.
//
// Blocked as in FlashAttention-2 (Dao, arXiv 2307.08691): scores live in registers only, a tile at a time, and the
// softmax is rescaled as its maximum moves. Products are of 16-bit operands on tensor cores, accumulated in f32.
#pragma once

#include "attention.cuh"

// One query head of one sequence: `to` has rows of `to_stride`; `lse`, where there is one, gets the base-2 logarithm of
// the sum of exponentials of each row. Warps own MT * 16 rows of queries each; block y: a tile of queries.
template <typename T, int D, int MT, int WARPS, int BN>
__device__ __forceinline__ void forward(const HeadRows<T> &in, T *to, size_t to_stride, float *lse, int dim,
                                        float factor_of_scores) {
    constexpr int BM = 16 * MT * WARPS, THREADS = 32 * WARPS;
    extern __shared__ uint4 shared[];
    T *const sq = reinterpret_cast<T *>(shared), *const sk = sq + BM * D, *const sv = sk + 2 * BN * D;
    const int t = in.t, first = in.first, keys = first + t;
    const T *const k = in.k, *const v = in.v;
    // The last rows see the most keys: they start first.
    const int q0 = (gridDim.y - 1 - blockIdx.y) * BM;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    const int mine = warp * 16 * MT;  // my first row in the tile
    const int blocks = (first + min(q0 + BM, t) + BN - 1) / BN;

    load_tile<T, D, BM, THREADS>(sq, in.q, q0, t, in.q_stride, dim);
    load_tile<T, D, BN, THREADS>(sk, k, 0, keys, in.stride, dim);
    load_tile<T, D, BN, THREADS>(sv, v, 0, keys, in.stride, dim);
    copy_commit();

    // Queries stay in registers where there are enough of them.
    constexpr bool KEPT = MT * D <= 128;
    uint32_t qa[MT][KEPT ? D / 16 : 1][4];
    float o[MT][D / 8][4], top[MT][2], sum[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < D / 8; n++) o[m][n][0] = o[m][n][1] = o[m][n][2] = o[m][n][3] = 0;
        top[m][0] = top[m][1] = -INFINITY;
        sum[m][0] = sum[m][1] = 0;
    }
    const float scale = factor_of_scores * LOG2_E;

    for (int j = 0; j < blocks; j++) {
        if (j + 1 < blocks) {
            const int next = (j + 1) & 1;
            load_tile<T, D, BN, THREADS>(sk + next * BN * D, k, (j + 1) * BN, keys, in.stride, dim);
            load_tile<T, D, BN, THREADS>(sv + next * BN * D, v, (j + 1) * BN, keys, in.stride, dim);
            copy_commit();
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        __syncthreads();
        if (KEPT && j == 0) {
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int kk = 0; kk < D / 16; kk++) load_a<T, D>(qa[m][kk], sq, mine + 16 * m, kk);
        }
        const T *const kt = sk + (j & 1) * BN * D, *const vt = sv + (j & 1) * BN * D;
        const int k0 = j * BN;
        if (k0 <= first + q0 + mine + 16 * MT - 1) {  // my last row sees the first key of the tile
            float s[MT][BN / 8][4];
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int n = 0; n < BN / 8; n++) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++) {
                if (!KEPT) {
#pragma unroll
                    for (int m = 0; m < MT; m++) load_a<T, D>(qa[m][0], sq, mine + 16 * m, kk);
                }
#pragma unroll
                for (int n = 0; n < BN / 16; n++) {
                    uint32_t b[4];
                    load_bt<T, D>(b, kt, n, kk);
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        multiply_add<T>(s[m][2 * n], qa[m][KEPT ? kk : 0], b);
                        multiply_add<T>(s[m][2 * n + 1], qa[m][KEPT ? kk : 0], b + 2);
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const int row = first + q0 + mine + 16 * m + g;  // and row + 8: their positions
                if (k0 + BN - 1 > first + q0 + mine + 16 * m) {
#pragma unroll
                    for (int n = 0; n < BN / 8; n++)
#pragma unroll
                        for (int c = 0; c < 4; c++)
                            if (k0 + 8 * n + 2 * t4 + (c & 1) > row + (c / 2) * 8) s[m][n][c] = -INFINITY;
                }
#pragma unroll
                for (int h = 0; h < 2; h++) {  // the rows g and g + 8
                    float high = top[m][h];
#pragma unroll
                    for (int n = 0; n < BN / 8; n++) high = fmaxf(high, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
                    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
                    // Every row sees key 0, so that `high` is finite from the first tile on.
                    const float factor = power_of_two((top[m][h] - high) * scale);
                    top[m][h] = high;
                    sum[m][h] *= factor;
#pragma unroll
                    for (int n = 0; n < D / 8; n++) {
                        o[m][n][2 * h] *= factor;
                        o[m][n][2 * h + 1] *= factor;
                    }
#pragma unroll
                    for (int n = 0; n < BN / 8; n++)
#pragma unroll
                        for (int c = 2 * h; c < 2 * h + 2; c++) {
                            s[m][n][c] = power_of_two(s[m][n][c] * scale - high * scale);
                            sum[m][h] += s[m][n][c];
                        }
                }
            }
#pragma unroll
            for (int kk = 0; kk < BN / 16; kk++) {
                uint32_t a[MT][4];
#pragma unroll
                for (int m = 0; m < MT; m++) as_a<T>(a[m], s[m][2 * kk], s[m][2 * kk + 1]);
#pragma unroll
                for (int n = 0; n < D / 16; n++) {
                    uint32_t b[4];
                    load_b<T, D>(b, vt, kk, n);
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        multiply_add<T>(o[m][2 * n], a[m], b);
                        multiply_add<T>(o[m][2 * n + 1], a[m], b + 2);
                    }
                }
            }
        }
        __syncthreads();  // the tile is free for the next copies
    }

#pragma unroll
    for (int m = 0; m < MT; m++) {
        const int row0 = q0 + mine + 16 * m;
        float inverse[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float total = sum[m][h];
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            inverse[h] = 1.0f / total;
            const int row = row0 + g + 8 * h;
            if (lse && t4 == 0 && row < t) lse[row] = top[m][h] * scale + log2f(total);
        }
        put_rows<T, D>(sq, mine + 16 * m, o[m], inverse[0], inverse[1]);
        store_rows<T, D>(to, sq, mine + 16 * m, row0, t, to_stride, dim);
    }
}
