// What `sweep.cu` does, on tensor cores: both gradients of a low-rank change in one pass over x (rows, in) and dy (rows,
// out), all f32,
//
//     h = x A^T, g = dy B              for eight rows at a time, which are in shared memory
//     dA += g^T x, dB += dy^T h        in registers, over all rows of a block; then as partial sums, for `reduce`
//
// See tf32.cuh for the products.
//
// A warp has 128 columns of x or of dy: it copies their values into shared memory for itself alone, adds up its share of h
// or g, and, when all shares are there, its columns of dA or dB. A block has R ranks; further ones are further blocks. The
// order of every sum is fixed.

#include "params.cuh"
#include "tf32.cuh"

constexpr int ROWS = 8, COLUMNS = 128, MOST_WARPS = 16;

// Memory: R ranks of A and B, (R, width); two tiles of x and dy side by side, (8, width). A row is 4 longer than it has
// columns, so that the parts of a row that are read at the same time are in different banks.
template <int R>
__device__ __forceinline__ void sweep(const float *x, const float *dy, const float *a, const float *b, float *partial_a,
                                      float *partial_b, const SweepParams &p) {
    // Of eight ranks, rows 8 to 15 of a product are the low halves of rows 0 to 7.
    constexpr int KEPT = R / 4, N = R * ROWS;
    extern __shared__ float4 memory[];
    __shared__ float shares[2][MOST_WARPS][N];
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int of_x = p.threads / 32;
    const bool of_dy = warp >= of_x;
    const uint32_t n = of_dy ? p.out : p.in, pitch = warps * COLUMNS + 4;
    const uint32_t own = (of_dy ? warp - of_x : warp) * COLUMNS, rank0 = blockIdx.y * R;
    const float *from = of_dy ? dy : x;
    float *factor = reinterpret_cast<float *>(memory) + warp * COLUMNS, *tiles = factor + R * pitch;
    for (int j = 0; j < R; j++) {
        float4 values;
        float *v = &values.x;
#pragma unroll
        for (int q = 0; q < 4; q++) {
            const uint32_t c = own + 4 * lane + q, rank = rank0 + j;
            const bool there = c < n && rank < p.r;
            v[q] = !there ? 0.0f : of_dy ? b[(uint64_t)c * p.r + rank] : a[(uint64_t)rank * p.in + c];
        }
        *reinterpret_cast<float4 *>(factor + j * pitch + 4 * lane) = values;
    }
    const uint64_t start = blockIdx.x * p.band, end = min(start + p.band, p.rows);
    auto fetch = [&](uint64_t row0, int stage) {
        const uint32_t c = own + 4 * lane;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const bool there = row0 + i < end && c < n;
            copy_async(tiles + (stage * ROWS + i) * pitch + 4 * lane, there ? from + (row0 + i) * n + c : from, there);
        }
        copy_commit();
    };
    float sums[COLUMNS / 8][KEPT];
#pragma unroll
    for (int m = 0; m < COLUMNS / 8; m++)
#pragma unroll
        for (int i = 0; i < KEPT; i++) sums[m][i] = 0.0f;
    fetch(start, 0);
    int stage = 0;
    for (uint64_t row0 = start; row0 < end; row0 += ROWS, stage ^= 1) {
        fetch(row0 + ROWS, stage ^ 1);
        copy_wait<1>();
        __syncwarp();
        const float *tile = tiles + stage * ROWS * pitch;
        // Ranks by rows of the tile. Of each 32 columns a lane has 8 t to 8 t + 7.
        float share[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int q = 0; q < COLUMNS / 32; q++) {
            float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int eight = 0; eight < 2; eight++) {
                const uint32_t at = 32 * q + 8 * t + 4 * eight;
                auto four = [&](const float *row) { return *reinterpret_cast<const float4 *>(row + at); };
                const float4 here = four(tile + g * pitch), first = four(factor + g * pitch);
                const float4 second = R == 8 ? first : four(factor + (g + 8) * pitch);
#pragma unroll
                for (int v = 0; v < 4; v += 2) {
                    uint32_t bh[2], bl[2], ah[4], al[4];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        halves((&here.x)[v + i], bh[i], bl[i]);
                        halves((&first.x)[v + i], ah[2 * i], al[2 * i]);
                        if (R == 8) ah[2 * i + 1] = al[2 * i];
                        else halves((&second.x)[v + i], ah[2 * i + 1], al[2 * i + 1]);
                    }
                    multiply_add_tf32(c, ah, bl[0], bl[1]);
                    if (R > 8) multiply_add_tf32(c, al, bh[0], bh[1]);
                    multiply_add_tf32(c, ah, bh[0], bh[1]);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) share[i] += c[i];
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float *to = shares[stage][warp] + (2 * t + i) * R + g;
            to[0] = R == 8 ? share[i] + share[i + 2] : share[i];
            if (R > 8) to[8] = share[i + 2];
        }
        __syncthreads();
        // The columns of x need g, those of dy need h: of both, ranks g and g + 8 of rows t and t + 4.
        float low[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int w = of_dy ? 0 : of_x; w < (of_dy ? of_x : warps); w++) {
            const float *of = shares[stage][w] + t * R + g;
            low[0] += of[0];
            low[2] += of[4 * R];
            if (R > 8) {
                low[1] += of[8];
                low[3] += of[4 * R + 8];
            }
        }
        uint32_t ah[4], al[4];
#pragma unroll
        for (int i = 0; i < 4; i += R == 8 ? 2 : 1) {
            halves(low[i], ah[i], al[i]);
            if (R == 8) ah[i + 1] = al[i];
        }
        // Of each 32 columns, column n of product v is column 4 (n / 2) + 16 (n % 2) + v.
#pragma unroll
        for (int q = 0; q < COLUMNS / 32; q++) {
            const uint32_t at = 32 * q + 4 * (g / 2) + 16 * (g % 2);
            const float4 up = *reinterpret_cast<const float4 *>(tile + t * pitch + at);
            const float4 down = *reinterpret_cast<const float4 *>(tile + (t + 4) * pitch + at);
#pragma unroll
            for (int v = 0; v < 4; v++) {
                uint32_t bh[2], bl[2];
                halves((&up.x)[v], bh[0], bl[0]);
                halves((&down.x)[v], bh[1], bl[1]);
                float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                multiply_add_tf32(c, ah, bl[0], bl[1]);
                if (R > 8) multiply_add_tf32(c, al, bh[0], bh[1]);
                multiply_add_tf32(c, ah, bh[0], bh[1]);
                float *s = sums[4 * q + v];
#pragma unroll
                for (int i = 0; i < KEPT; i++) s[i] += R == 8 ? c[i] + c[i + 2] : c[i];
            }
        }
        __syncwarp();
    }
    copy_wait<0>();
    // (parts, r, columns)
    float *partial = of_dy ? partial_b : partial_a;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const uint32_t rank = rank0 + g + 8 * (i / 2);
        if (rank >= p.r) continue;
        float *to = partial + ((uint64_t)blockIdx.x * p.r + rank) * n;
#pragma unroll
        for (int q = 0; q < COLUMNS / 32; q++) {
            const uint32_t c = own + 32 * q + 16 * (i % 2) + 4 * t;
            const float4 four = make_float4(sums[4 * q][i], sums[4 * q + 1][i], sums[4 * q + 2][i], sums[4 * q + 3][i]);
            if (c < n) *reinterpret_cast<float4 *>(to + c) = four;
        }
    }
}

#define SWEEP(R, WARPS)                                                                                                \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)                                                        \
        sweep_##R(const float *x, const float *dy, const float *a, const float *b, float *partial_a, float *partial_b, \
                  SweepParams p) {                                                                                     \
        sweep<R>(x, dy, a, b, partial_a, partial_b, p);                                                                \
    }

SWEEP(8, 16)
SWEEP(16, 12)
