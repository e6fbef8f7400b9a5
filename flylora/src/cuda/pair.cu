// The gradients of both factors of a low-rank change in one pass over x (rows, in) and dy (rows, out), both bf16, with
// g = dy B and h = x A^T, both (rows, r) in f32:
//
//     dA[j][c] = scale sum over i of g[i][j] x[i][c]       dB[c][j] = scale sum over i of h[i][j] dy[i][c]
//
// as partial sums over parts of the rows, which `pair_reduce` adds up. It works on tensor cores: h and g go in as sums of two
// numbers of bf16, so that they keep 16 bits, and all sums are in f32, in an order that does not depend on the run.

#include "mma.cuh"

struct PairParams {
    uint64_t rows;
    uint64_t a_rank, a_column, b_rank, b_column;  // strides of dA and dB
    uint32_t in, out;
    uint32_t r;
    uint32_t parts;
    float scale;
    uint32_t unused;
};
static_assert(sizeof(PairParams) == 64, "the Rust side has the same layout");

// partial_a: (parts, r, in), partial_b: (parts, r, out). A warp takes 64 columns of x or of dy.
template <int R, int AHEAD, bool WIDE>
__device__ __forceinline__ void pair(const bf16 *x, const bf16 *dy, const float *h, const float *g_of_dy,
                                     float *partial_a, float *partial_b, const PairParams &p) {
    // Of eight ranks, rows 8 to 15 of a product are the low halves of rows 0 to 7.
    constexpr int K = (R + 15) / 16, HALVES = R == 8 ? 1 : 2;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, of_x = (p.in + 63) / 64;
    const bool is_dy = warp >= of_x;
    const bf16 *from = is_dy ? dy : x;
    const float *low = is_dy ? h : g_of_dy;
    const uint32_t n = is_dy ? p.out : p.in, c0 = 64 * (is_dy ? warp - of_x : warp), c = c0 + 8 * g;
    if (c0 >= n) return;
    // Every so many tiles of rows, from the last to the first: the last of dy were used last, and may be in the cache.
    constexpr int TILE = 16 * AHEAD;
    const int64_t stride = (int64_t)p.parts * TILE;
    const int64_t start = ((int64_t)((p.rows + TILE - 1) / TILE) - 1 - blockIdx.y) * TILE;
    float sums[K][8][4];
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int m = 0; m < 8; m++)
#pragma unroll
            for (int q = 0; q < 4; q++) sums[k][m][q] = 0.0f;
    // Of 16 rows a lane reads 4t to 4t + 3: terms 2t, 2t + 1, 2t + 8 and 2t + 9 of the product.
    uint4 next[AHEAD][4];
    float ranks[AHEAD][K][4][HALVES];  // for the rows that were read
    // A row before the first one is none, as one after the last.
    auto fetch = [&](int64_t row0, int a) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint64_t row = row0 + 4 * t + i;
            const bool there = row < p.rows && c < n;
            next[a][i] = make_uint4(0, 0, 0, 0);
            // A load without a branch, which would make it wait for the one before.
            if constexpr (WIDE) {
                if (there) next[a][i] = __ldcs(reinterpret_cast<const uint4 *>(from + row * n + c));
            } else if (there) {
                const Vec<bf16, 8> v = read<bf16, 8>(from + row * n, c, n, false);
                next[a][i] = *reinterpret_cast<const uint4 *>(&v);
            }
        }
#pragma unroll
        for (int k = 0; k < K; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int half = 0; half < HALVES; half++) {
                    const uint64_t row = row0 + 4 * t + i;
                    const uint32_t j = 16 * k + 8 * half + g;
                    ranks[a][k][i][half] = row < p.rows && j < p.r ? low[row * p.r + j] : 0.0f;
                }
    };
#pragma unroll
    for (int a = 0; a < AHEAD; a++) fetch(start + 16 * a, a);
    for (int64_t row0 = start; row0 >= 0; row0 -= stride) {
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            uint4 now[4];
            uint32_t high[K][4], rest[K][4];
#pragma unroll
            for (int i = 0; i < 4; i++) now[i] = next[a][i];
#pragma unroll
            for (int k = 0; k < K; k++)
#pragma unroll
                for (int q = 0; q < 4; q++) {
                    const int i = q / 2 * 2, half = q % 2 % HALVES;
                    const Split s = split(ranks[a][k][i][half], ranks[a][k][i + 1][half]);
                    high[k][q] = R == 8 && q % 2 ? s.low : s.high;
                    rest[k][q] = s.low;
                }
            fetch(row0 - stride + 16 * a, a);
            // Column g of product m is column 8 g + m of the 64.
#pragma unroll
            for (int m = 0; m < 8; m++) {
                const int halves = m % 2 ? 0x7632 : 0x5410;
                const uint32_t b0 = __byte_perm(words(now[0])[m / 2], words(now[1])[m / 2], halves);
                const uint32_t b1 = __byte_perm(words(now[2])[m / 2], words(now[3])[m / 2], halves);
#pragma unroll
                for (int k = 0; k < K; k++) {
                    multiply_add(sums[k][m], high[k], b0, b1);
                    if (R > 8) multiply_add(sums[k][m], rest[k], b0, b1);
                }
            }
        }
    }
    // A lane has columns 16 t + m and 16 t + 8 + m of ranks g and g + 8.
    float *partial = is_dy ? partial_b : partial_a;
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int q = 0; q < 2 * HALVES; q++) {
            const uint32_t j = 16 * k + g + 8 * (q / 2), column = c0 + 16 * t + 8 * (q % 2);
            if (j >= p.r) continue;
            float *to = partial + ((uint64_t)blockIdx.y * p.r + j) * n;
#pragma unroll
            for (int m = 0; m < 8; m += 4) {
                Vec<float, 4> four;
#pragma unroll
                for (int v = 0; v < 4; v++)
                    four.v[v] = R == 8 ? sums[k][m + v][q] + sums[k][m + v][q + 2] : sums[k][m + v][q];
                write<float, 4>(to, column + m, n, WIDE, four);
            }
        }
}

// Blocks of 32 values, of dA and then of dB, by 16 shares of the parts.
extern "C" __global__ void __launch_bounds__(512)
    pair_reduce(const float *partial_a, const float *partial_b, float *da, float *db, PairParams p) {
    __shared__ float shares[16][33];
    const uint64_t of_a = (uint64_t)p.r * p.in, of_b = (uint64_t)p.r * p.out;
    uint64_t e = (uint64_t)blockIdx.x * 32 + threadIdx.x;
    const bool is_a = e < of_a, there = e < of_a + of_b;
    if (!is_a) e -= of_a;
    const float *partial = is_a ? partial_a : partial_b;
    const uint64_t n = is_a ? of_a : of_b;
    float sum = 0.0f;
    if (there) {
#pragma unroll 8
        for (uint32_t part = threadIdx.y; part < p.parts; part += 16) sum += partial[part * n + e];
    }
    shares[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || !there) return;
    sum = 0.0f;
#pragma unroll
    for (int s = 0; s < 16; s++) sum += shares[s][threadIdx.x];
    const uint64_t columns = is_a ? p.in : p.out, j = e / columns, c = e % columns;
    (is_a ? da : db)[is_a ? j * p.a_rank + c * p.a_column : j * p.b_rank + c * p.b_column] = sum * p.scale;
}

#define PAIR(NAME, R, AHEAD, WIDE, BLOCKS)                                                                             \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS)                                                          \
        NAME##_##R(const bf16 *x, const bf16 *dy, const float *h, const float *g, float *partial_a, float *partial_b,  \
                   PairParams p) {                                                                                     \
        pair<R, AHEAD, WIDE>(x, dy, h, g, partial_a, partial_b, p);                                                    \
    }

// With registers for two blocks a multiprocessor, or for one. Narrow: where rows are no multiples of 8 numbers.
PAIR(pair, 8, 2, true, 2)
PAIR(pair, 16, 1, true, 2)
PAIR(pair, 32, 2, true, 1)
PAIR(pair, 64, 1, true, 1)
PAIR(pair_narrow, 8, 1, false, 2)
PAIR(pair_narrow, 16, 1, false, 2)
PAIR(pair_narrow, 32, 1, false, 1)
PAIR(pair_narrow, 64, 1, false, 1)
