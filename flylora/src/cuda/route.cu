// FlyLoRA's routing: which k of the r values of a row it makes use of. The others become 0.
//
// A warp takes 32 rows at a time, each lane one of them, by way of shared memory: it takes the highest score that it has
// not taken, k times.

#include "common.cuh"

struct RouteParams {
    uint64_t rows;
    uint32_t r, k;
    uint32_t magnitude;  // whether scores are |h| + balance, or h + balance
    uint32_t unused;
};
static_assert(sizeof(RouteParams) == 24, "the Rust side has the same layout");

constexpr int WARPS = 2;

// WORDS: of 32 ranks each. mask: (rows, words), a bit for each rank of a row that is made use of; counts: (r), of the rows.
template <int WORDS>
__device__ __forceinline__ void route(float *h, const float *balance, uint32_t *mask, uint32_t *counts,
                                      const RouteParams &p) {
    constexpr int R = 32 * WORDS;
    __shared__ float tiles[WARPS][32][R + 1];
    __shared__ uint32_t used[R];
    for (int j = threadIdx.x; j < R; j += blockDim.x) used[j] = 0;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    float(*tile)[R + 1] = tiles[threadIdx.x / 32];
    const uint64_t row0 = ((uint64_t)blockIdx.x * WARPS + threadIdx.x / 32) * 32;
    const int rows = (int)min((uint64_t)32, p.rows - min(row0, p.rows));
    float added[WORDS];
#pragma unroll
    for (int w = 0; w < WORDS; w++) added[w] = w * 32 + lane < p.r ? balance[w * 32 + lane] : 0.0f;
#pragma unroll 8
    for (int i = 0; i < 32; i++)
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
            const uint32_t j = w * 32 + lane;
            const float value = i < rows && j < p.r ? h[(row0 + i) * p.r + j] : 0.0f;
            tile[i][j] = (p.magnitude ? fabsf(value) : value) + added[w];
        }
    __syncwarp();
    uint32_t score[R];
#pragma unroll
    for (int j = 0; j < R; j++) score[j] = j < p.r ? key(tile[lane][j]) : 0;
    uint32_t chosen[WORDS] = {};
    for (uint32_t i = 0; i < p.k; i++) {
        // Of equal scores the first.
        uint32_t best = 0, at = 0;
#pragma unroll
        for (int j = 0; j < R; j++)
            if (score[j] > best && !(chosen[j / 32] >> (j % 32) & 1)) best = score[j], at = j;
#pragma unroll
        for (int w = 0; w < WORDS; w++)
            if (at / 32 == w) chosen[w] |= 1u << (at % 32);
    }
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
        if (lane >= rows) chosen[w] = 0;
        const uint32_t j = w * 32 + lane;
        if (lane < rows && w * 32 < p.r) mask[(row0 + lane) * ((p.r + 31) / 32) + w] = chosen[w];
        uint32_t count = 0;
#pragma unroll 8
        for (int i = 0; i < 32; i++) {
            const bool here = __shfl_sync(0xffffffffu, chosen[w], i) >> lane & 1;
            count += here;
            if (i < rows && j < p.r && !here) h[(row0 + i) * p.r + j] = 0.0f;
        }
        atomicAdd(&used[j], count);
    }
    __syncthreads();
    // Whole numbers: the same sum in any order.
    for (int j = threadIdx.x; j < p.r; j += blockDim.x) atomicAdd(&counts[j], used[j]);
}

#define KERNEL(WORDS)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                           \
        route_##WORDS(float *h, const float *balance, uint32_t *mask, uint32_t *counts, RouteParams p) {               \
        route<WORDS>(h, balance, mask, counts, p);                                                                     \
    }

KERNEL(1)
KERNEL(2)
