// Both gradients of a low-rank change in one pass over x (rows, in) and dy (rows, out), all f32:
//
//     h = x A^T, g = dy B              for four rows at a time, which are in shared memory
//     dA += g^T x, dB += dy^T h        in registers, over all rows of a block; then as partial sums, for `reduce`
//
// so that x and dy are read once. A thread has eight columns of x or of dy: it copies their values into shared memory for
// itself alone, adds up its share of h or g, and, when all shares are there, its columns of dA or dB. A block has eight
// ranks; further ones are further blocks. The order of every sum is fixed.

#include "mma.cuh"
#include "params.cuh"

constexpr int RANKS = 8, ROWS = 4, MOST_WARPS = 12;

// Memory: the eight ranks of A and B, (8, width); two tiles of x and dy side by side, (4, width); width is 8 columns for
// each thread.
extern "C" __global__ void __launch_bounds__(32 * MOST_WARPS, 1)
    sweep(const float *x, const float *dy, const float *a, const float *b, float *partial_a, float *partial_b,
          SweepParams p) {
    extern __shared__ float4 memory[];
    __shared__ float shares[2][MOST_WARPS][ROWS * RANKS];
    __shared__ alignas(16) float whole[MOST_WARPS][ROWS * RANKS];
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool of_dy = threadIdx.x >= p.threads;
    const uint32_t side = of_dy ? blockDim.x - p.threads : p.threads, own = threadIdx.x - (of_dy ? p.threads : 0);
    const uint32_t n = of_dy ? p.out : p.in, width = 2 * blockDim.x;  // in vectors of four
    const float *from = of_dy ? dy : x;
    const uint32_t rank0 = blockIdx.y * RANKS;
    float4 *factor = memory, *tiles = memory + RANKS * width;
    // Of a row: where the two vectors of this thread are in memory, and their columns in x or dy.
    uint32_t at[2], column[2];
#pragma unroll
    for (int v = 0; v < 2; v++) {
        at[v] = (of_dy ? 2 * p.threads : 0) + own + v * side;
        column[v] = 4 * (own + v * side);
    }
    // Every thread reads the places that it writes, and no others.
#pragma unroll
    for (int v = 0; v < 2; v++)
        for (int j = 0; j < RANKS; j++) {
            float values[4];
#pragma unroll
            for (int q = 0; q < 4; q++) {
                const uint32_t c = column[v] + q, rank = rank0 + j;
                const bool there = c < n && rank < p.r;
                values[q] = !there ? 0.0f : of_dy ? b[(uint64_t)c * p.r + rank] : a[(uint64_t)rank * p.in + c];
            }
            factor[j * width + at[v]] = make_float4(values[0], values[1], values[2], values[3]);
        }
    const uint64_t start = blockIdx.x * p.band, end = min(start + p.band, p.rows);
    auto fetch = [&](uint64_t row0, int stage) {
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int v = 0; v < 2; v++) {
                const bool there = row0 + i < end && column[v] < n;
                copy_async(&tiles[(stage * ROWS + i) * width + at[v]],
                           there ? from + (row0 + i) * n + column[v] : from, there);
            }
        copy_commit();
    };
    float sums[RANKS][2][4];
#pragma unroll
    for (int j = 0; j < RANKS; j++)
#pragma unroll
        for (int v = 0; v < 2; v++)
#pragma unroll
            for (int q = 0; q < 4; q++) sums[j][v][q] = 0.0f;
    fetch(start, 0);
    int stage = 0;
    for (uint64_t row0 = start; row0 < end; row0 += ROWS, stage ^= 1) {
        fetch(row0 + ROWS, stage ^ 1);
        copy_wait<1>();
        float4 here[ROWS][2];
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int v = 0; v < 2; v++) here[i][v] = tiles[(stage * ROWS + i) * width + at[v]];
        float share[ROWS * RANKS];
#pragma unroll
        for (int j = 0; j < RANKS; j++) {
            const float4 f = factor[j * width + at[0]], e = factor[j * width + at[1]];
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const float4 u = here[i][0], w = here[i][1];
                float s = u.x * f.x;
                s = fmaf(u.y, f.y, s);
                s = fmaf(u.z, f.z, s);
                s = fmaf(u.w, f.w, s);
                s = fmaf(w.x, e.x, s);
                s = fmaf(w.y, e.y, s);
                s = fmaf(w.z, e.z, s);
                share[i * RANKS + j] = fmaf(w.w, e.w, s);
            }
        }
        fold<ROWS * RANKS / 2, 16>(share, lane);
        shares[stage][warp][lane] = share[0];
        __syncthreads();
        // The columns of x need g, those of dy need h: every warp adds up what it needs.
        const int first = of_dy ? 0 : p.threads / 32, last = of_dy ? p.threads / 32 : warps;
        float sum = 0.0f;
        for (int w = first; w < last; w++) sum += shares[stage][w][lane];
        whole[warp][lane] = sum;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int j0 = 0; j0 < RANKS; j0 += 4) {
                const float4 four = *reinterpret_cast<const float4 *>(&whole[warp][i * RANKS + j0]);
                const float low[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (int j = 0; j < 4; j++)
#pragma unroll
                    for (int v = 0; v < 2; v++) {
                        float *s = sums[j0 + j][v];
                        s[0] = fmaf(low[j], here[i][v].x, s[0]);
                        s[1] = fmaf(low[j], here[i][v].y, s[1]);
                        s[2] = fmaf(low[j], here[i][v].z, s[2]);
                        s[3] = fmaf(low[j], here[i][v].w, s[3]);
                    }
            }
        __syncwarp();
    }
    copy_wait<0>();
    // (parts, r, columns)
    float *partial = of_dy ? partial_b : partial_a;
#pragma unroll
    for (int j = 0; j < RANKS; j++)
        if (rank0 + j < p.r) {
            float4 *to = reinterpret_cast<float4 *>(partial + ((uint64_t)blockIdx.x * p.r + rank0 + j) * n);
#pragma unroll
            for (int v = 0; v < 2; v++) {
                const float *s = sums[j][v];
                if (column[v] < n) to[column[v] / 4] = make_float4(s[0], s[1], s[2], s[3]);
            }
        }
}
