// Attention without tensor cores: tiles, and the forward pass, for the packed projection and for a cache.
//
// Tiles of 32 queries x 32 keys, 256 threads: thread (x, y) of 16 x 16 has the queries 2y, 2y+1 and the keys x, x+16
// of the scores. Head sizes up to D (64 or 128), padded with zeros.
#pragma once

#include "attention.cuh"

constexpr int N = 32;
constexpr int THREADS = 256;

// N rows of D numbers, four more than that apart, so that neighbouring rows lie in other banks.
template <int D> struct Tile {
    float row[N][D + 4];
};

// N x N scores.
struct Scores {
    float row[N][N + 1];
};

template <typename T, int D>
__device__ void load_rows(Tile<D> &tile, const T *from, int row0, int t, size_t stride, int dim) {
    for (int i = threadIdx.x; i < N * D; i += THREADS) {
        const int row = i / D, column = i % D;
        const bool valid = row0 + row < t && column < dim;
        tile.row[row][column] = valid ? to_float(from[(size_t)(row0 + row) * stride + column]) : 0;
    }
}

// c[i][j] = row ra + i of a times row rb + 16 j of b
template <int D> __device__ void dots(float c[2][2], const Tile<D> &a, const Tile<D> &b, int ra, int rb) {
    c[0][0] = c[0][1] = c[1][0] = c[1][1] = 0;
#pragma unroll 4
    for (int k = 0; k < D; k += 4) {
        float4 x[2], y[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            x[i] = *reinterpret_cast<const float4 *>(&a.row[ra + i][k]);
            y[i] = *reinterpret_cast<const float4 *>(&b.row[rb + 16 * i][k]);
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                c[i][j] += x[i].x * y[j].x + x[i].y * y[j].y + x[i].z * y[j].z + x[i].w * y[j].w;
    }
}

// Two rows by D / 16 columns a thread: the columns 4 x + 64 n.
template <int D> struct Rows {
    float v[2][D / 64][4];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int n = 0; n < D / 64; n++) v[i][n][0] = v[i][n][1] = v[i][n][2] = v[i][n][3] = 0;
    }

    // Row i += weight[i] * row of the tile
    __device__ void add(const float weight[2], const Tile<D> &tile, int row, int x) {
#pragma unroll
        for (int n = 0; n < D / 64; n++) {
            const float4 y = *reinterpret_cast<const float4 *>(&tile.row[row][4 * x + 64 * n]);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                v[i][n][0] += weight[i] * y.x;
                v[i][n][1] += weight[i] * y.y;
                v[i][n][2] += weight[i] * y.z;
                v[i][n][3] += weight[i] * y.w;
            }
        }
    }

    template <typename T>
    __device__ void write(T *to, const float factor[2], int row0, int t, size_t stride, int dim, int x) {
        for (int i = 0; i < 2; i++)
            for (int n = 0; n < D / 64; n++)
                for (int c = 0; c < 4; c++) {
                    const int column = 4 * x + 64 * n + c;
                    if (row0 + i < t && column < dim)
                        to[(size_t)(row0 + i) * stride + column] = from_float<T>(v[i][n][c] * factor[i]);
                }
    }
};

// One query head of one sequence, as `forward` of attention_forward.cuh.
template <typename T, int D>
__device__ __forceinline__ void forward(const HeadRows<T> &in, T *to, size_t to_stride, float *lse, int dim,
                                        float factor_of_scores) {
    extern __shared__ float4 shared[];
    Tile<D> &sq = reinterpret_cast<Tile<D> *>(shared)[0], &sk = reinterpret_cast<Tile<D> *>(shared)[1];
    Tile<D> &sv = reinterpret_cast<Tile<D> *>(shared)[2];
    Scores &sp = *reinterpret_cast<Scores *>(&reinterpret_cast<Tile<D> *>(shared)[3]);
    const int t = in.t, first = in.first, keys = first + t, x = threadIdx.x % 16, y = threadIdx.x / 16;
    const int q0 = (gridDim.y - 1 - blockIdx.y) * N, last = first + min(q0 + N, t) - 1;
    const float scale = factor_of_scores * LOG2_E;
    load_rows<T, D>(sq, in.q, q0, t, in.q_stride, dim);
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    Rows<D> o;
    o.clear();
    for (int k0 = 0; k0 <= last; k0 += N) {
        __syncthreads();
        load_rows<T, D>(sk, in.k, k0, keys, in.stride, dim);
        load_rows<T, D>(sv, in.v, k0, keys, in.stride, dim);
        __syncthreads();
        float s[2][2];
        dots<D>(s, sq, sk, 2 * y, x);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = first + q0 + 2 * y + i;
            float high = top[i];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (k0 + x + 16 * j > row) s[i][j] = -INFINITY;
                high = fmaxf(high, s[i][j]);
            }
            for (int offset = 8; offset > 0; offset /= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, offset));
            const float factor = exp2f((top[i] - high) * scale);
            top[i] = high;
            sum[i] *= factor;
#pragma unroll
            for (int n = 0; n < D / 64; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) o.v[i][n][c] *= factor;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float weight = exp2f((s[i][j] - high) * scale);
                sum[i] += weight;
                sp.row[2 * y + i][x + 16 * j] = weight;
            }
        }
        __syncwarp();  // a row of scores is written and read by one half of a warp
        for (int k = 0; k < N; k++) {
            const float weight[2] = {sp.row[2 * y][k], sp.row[2 * y + 1][k]};
            o.add(weight, sv, k, x);
        }
    }
    float inverse[2];
    for (int i = 0; i < 2; i++) {
        float total = sum[i];
        for (int offset = 8; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
        inverse[i] = 1.0f / total;
        const int row = q0 + 2 * y + i;
        if (lse && x == 0 && row < t) lse[row] = top[i] * scale + log2f(total);
    }
    o.write(to, inverse, q0 + 2 * y, t, to_stride, dim, x);
}
