// The products of skinny.cu in bf16 on tensor cores. x and y are bf16; M and h, which are f32, go in as sums of two
// numbers of bf16, so that they keep 16 bits, and all sums are in f32, in an order that does not depend on the run.
//
// The order of the terms of a sum, and of the columns of a result, is free: it is chosen such that every lane reads and
// writes 16 bytes that lie side by side, straight from and to the device's memory.

#include "mma.cuh"
#include "params.cuh"

constexpr int WARPS = 8;

// The two words of b for the first or second half of 8 neighbouring columns.
__device__ __forceinline__ const uint32_t *words(const uint4 &v) { return reinterpret_cast<const uint32_t *>(&v); }

// 8 numbers from column c of a row that is n long.
__device__ __forceinline__ uint4 read8(const bf16 *row, uint32_t c, uint32_t n, bool wide) {
    const Vec<bf16, 8> v = read<bf16, 8>(row, c, n, wide);
    return *reinterpret_cast<const uint4 *>(&v);
}

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
    uint4 next[GROUPS][2];
    auto fetch = [&](uint32_t c) {
#pragma unroll
        for (int q = 0; q < GROUPS; q++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint64_t row = row0 + g + 8 * half;
                next[q][half] = row < p.rows ? read8(x + row * p.columns, c + 32 * q + 8 * t, p.columns, p.wide)
                                             : make_uint4(0, 0, 0, 0);
            }
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
                for (int half = 0; half < 2; half++) now[q][half] = next[q][half];
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

// Two neighbouring ranks of a row of h, 0 past the last row or rank.
__device__ __forceinline__ float2 pair(const float *h, uint64_t row, uint32_t j, uint64_t end, uint32_t r) {
    if (row >= end || j >= r) return {0.0f, 0.0f};
    const float *from = h + row * r + j;
    if (r % 2 == 0) return *reinterpret_cast<const float2 *>(from);
    return {from[0], j + 1 < r ? from[1] : 0.0f};
}

// y[i][c] = ratio[c] (base[i][c] + scale sum over j of h[i][j] M[j][c]), without a ratio where there is none. A warp takes 32 columns of a band of rows.
template <int R>
__device__ __forceinline__ void expand(const bf16 *base, const float *h, const float *m, const float *ratio,
                                       bf16 *y, const SkinnyParams &p) {
    constexpr int K = (R + 15) / 16, AHEAD = R <= 16 ? 2 : 1, ROWS = 16 * AHEAD;
    if (p.adds) base = y;
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
    uint4 next[AHEAD][2];
    float2 ranks[AHEAD][K][4];
    auto fetch = [&](uint64_t row0) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint64_t row = row0 + 16 * i + 8 * half + g;
                next[i][half] = base && row < end ? read8(base + row * p.columns, c, p.columns, p.wide)
                                                  : make_uint4(0, 0, 0, 0);
#pragma unroll
                for (int k = 0; k < K; k++) {
                    ranks[i][k][half] = pair(h, row, 16 * k + 2 * t, end, p.r);
                    ranks[i][k][2 + half] = pair(h, row, 16 * k + 8 + 2 * t, end, p.r);
                }
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
                const bf16 *from = reinterpret_cast<const bf16 *>(&next[i][half]);
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

// partial[part][j][c] = sum over the rows i of a band of h[i][j] x[i][c]. A warp takes 64 columns.
template <int R>
__device__ __forceinline__ void outer(const bf16 *x, const float *h, float *partial, const SkinnyParams &p) {
    constexpr int K = (R + 15) / 16;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t c0 = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * 64, c = c0 + 8 * g;
    if (c0 >= p.columns) return;
    const uint64_t start = (uint64_t)blockIdx.y * p.band, end = min(start + p.band, p.rows);
    float sums[K][8][4];
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[k][n][i] = 0.0f;
    // Of 16 rows a lane reads 4t to 4t + 3: terms 2t, 2t + 1, 2t + 8 and 2t + 9 of the product.
    uint4 next[4];
    float ranks[K][4][2];  // h, for the rows of x that were read
    auto fetch = [&](uint64_t row0) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint64_t row = row0 + 4 * t + i;
            next[i] = row < end ? read8(x + row * p.columns, c, p.columns, p.wide) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int k = 0; k < K; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const uint64_t row = row0 + 4 * t + i;
                    const uint32_t j = 16 * k + 8 * half + g;
                    ranks[k][i][half] = row < end && j < p.r ? h[row * p.r + j] : 0.0f;
                }
    };
    fetch(start);
    for (uint64_t row0 = start; row0 < end; row0 += 16) {
        uint4 now[4];
        uint32_t ah[K][4], al[K][4];
#pragma unroll
        for (int i = 0; i < 4; i++) now[i] = next[i];
#pragma unroll
        for (int k = 0; k < K; k++)
#pragma unroll
            for (int part = 0; part < 4; part++) {
                const int i = part / 2 * 2, half = part % 2;
                const Split s = split(ranks[k][i][half], ranks[k][i + 1][half]);
                ah[k][part] = s.high;
                al[k][part] = s.low;
            }
        if (row0 + 16 < end) fetch(row0 + 16);
#pragma unroll
        for (int k = 0; k < K; k++) {
            // Column g of product n is column 8 g + n of the 64.
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const int halves = n % 2 ? 0x7632 : 0x5410;
                const uint32_t b0 = __byte_perm(words(now[0])[n / 2], words(now[1])[n / 2], halves);
                const uint32_t b1 = __byte_perm(words(now[2])[n / 2], words(now[3])[n / 2], halves);
                multiply_add(sums[k][n], ah[k], b0, b1);
                multiply_add(sums[k][n], al[k], b0, b1);
            }
        }
    }
    // A lane has columns 16 t + n and 16 t + 8 + n of ranks g and g + 8.
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t j = 16 * k + g + 8 * (i / 2), column = c0 + 16 * t + 8 * (i % 2);
            if (j >= p.r) continue;
            float *to = partial + ((uint64_t)blockIdx.y * p.r + j) * p.columns;
#pragma unroll
            for (int n = 0; n < 8; n++)
                if (column + n < p.columns) to[column + n] = sums[k][n][i];
        }
}

// Both products with dy, which is read once: g[i][j] = sum over c of dy[i][c] M[j][c], which is `project`, and the partial
// sums of `outer` with h. A warp takes 64 columns, a block all of them and a band of rows.
template <int R>
__device__ __forceinline__ void back(const bf16 *dy, const float *m, const float *h, float *whole, float *partial,
                                     const SkinnyParams &p) {
    constexpr int MOST_WARPS = 12, C = 2;
    __shared__ float shares[2][MOST_WARPS][16 * R];
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t c0 = warp * 32 * C;
    // Of each 32 columns a lane has 8 t to 8 t + 7: of M for rank g of eight, of dy for rows g and g + 8.
    Split factor[C][R / 8][4];
    float sums[C][4][4];
#pragma unroll
    for (int q = 0; q < C; q++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sums[q][n][i] = 0.0f;
#pragma unroll
            for (int k = 0; k < R / 8; k++) {
                const uint32_t j = 8 * k + g, c = c0 + 32 * q + 8 * t + 2 * n;
                auto at = [&](uint32_t c) {
                    return j < p.r && c < p.columns ? m[j * p.stride_j + c * p.stride_c] : 0.0f;
                };
                factor[q][k][n] = split(at(c), at(c + 1));
            }
        }
    const uint64_t start = (uint64_t)blockIdx.x * p.band, end = min(start + p.band, p.rows);
    uint4 next[C][2];
    float ranks[4][2];  // h for ranks g and g + 8 of rows 2t, 2t+1 and those + 8
    auto fetch = [&](uint64_t row0) {
#pragma unroll
        for (int part = 0; part < 4; part++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint64_t row = row0 + 8 * (part / 2) + 2 * t + i;
                const uint32_t j = g + 8 * (part % 2);
                ranks[part][i] = row < end && j < p.r ? h[row * p.r + j] : 0.0f;
            }
#pragma unroll
        for (int q = 0; q < C; q++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint64_t row = row0 + g + 8 * half;
                next[q][half] = row < end ? read8(dy + row * p.columns, c0 + 32 * q + 8 * t, p.columns, p.wide)
                                          : make_uint4(0, 0, 0, 0);
            }
    };
    fetch(start);
    int stage = 0;
    for (uint64_t row0 = start; row0 < end; row0 += 16, stage ^= 1) {
        uint4 now[C][2];
#pragma unroll
        for (int q = 0; q < C; q++)
#pragma unroll
            for (int half = 0; half < 2; half++) now[q][half] = next[q][half];
        uint32_t ah[4], al[4];
#pragma unroll
        for (int part = 0; part < 4; part++) {
            const Split s = split(ranks[part][0], ranks[part][1]);
            ah[part] = s.high;
            al[part] = s.low;
        }
        if (row0 + 16 < end) fetch(row0 + 16);
        float share[R / 8][4];
#pragma unroll
        for (int k = 0; k < R / 8; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) share[k][i] = 0.0f;
#pragma unroll
        for (int q = 0; q < C; q++) {
            const uint32_t *up = words(now[q][0]), *down = words(now[q][1]);
#pragma unroll
            for (int k = 0; k < R / 8; k++)
#pragma unroll
                for (int n = 0; n < 4; n += 2) {
                    const uint32_t a[4] = {up[n], down[n], up[n + 1], down[n + 1]};
                    multiply_add(share[k], a, factor[q][k][n].high, factor[q][k][n + 1].high);
                    multiply_add(share[k], a, factor[q][k][n].low, factor[q][k][n + 1].low);
                }
            // Turned, a word has rows 2t, 2t+1 of column 8 (g / 2) + 2 n + g % 2.
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const uint32_t b0 = transpose(up[n]), b1 = transpose(down[n]);
                multiply_add(sums[q][n], ah, b0, b1);
                multiply_add(sums[q][n], al, b0, b1);
            }
        }
#pragma unroll
        for (int k = 0; k < R / 8; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                shares[stage][warp][(g + 8 * (i / 2)) * R + 8 * k + 2 * t + i % 2] = share[k][i];
        __syncthreads();
        for (int e = threadIdx.x; e < 16 * R; e += blockDim.x) {
            float sum = 0.0f;
            for (int w = 0; w < warps; w++) sum += shares[stage][w][e];
            const uint64_t row = row0 + e / R;
            const uint32_t j = e % R;
            if (row < end && j < p.r) whole[row * p.r + j] = sum * p.scale;
        }
    }
    // A lane has the columns of 2t and 2t+1 in the place of g, which are neighbours.
#pragma unroll
    for (int q = 0; q < C; q++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t j = g + 8 * (i / 2), c = c0 + 32 * q + 8 * t + 2 * n + i % 2;
                if (j < p.r && c < p.columns) partial[((uint64_t)blockIdx.x * p.r + j) * p.columns + c] = sums[q][n][i];
            }
}

#define BACK(R)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                               \
        back_##R(const bf16 *dy, const float *m, const float *h, float *whole, float *partial, SkinnyParams p) {       \
        back<R>(dy, m, h, whole, partial, p);                                                                          \
    }

BACK(8)
BACK(16)

#define KERNELS(R)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                               \
        project_##R(const bf16 *x, const float *m, const uint32_t *mask, float *h, SkinnyParams p) {                   \
        project<R>(x, m, mask, h, p);                                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, R <= 16 ? 2 : 1)                                                 \
        expand_##R(const bf16 *base, const float *h, const float *m, const float *ratio, bf16 *y, SkinnyParams p) {    \
        expand<R>(base, h, m, ratio, y, p);                                                                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, R <= 16 ? 2 : 1)                                                 \
        outer_##R(const bf16 *x, const float *h, float *partial, SkinnyParams p) {                                     \
        outer<R>(x, h, partial, p);                                                                                    \
    }

KERNELS(8)
KERNELS(16)
KERNELS(32)
KERNELS(64)
