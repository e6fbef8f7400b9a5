// What the kernels of a decoding step share: their sizes, how they follow each other, and sums over a thread block.
#pragma once

#include "common.cuh"

struct DecodeParams {
    uint32_t rows;  // sequences
    uint32_t d;     // of the residual stream
    uint32_t query, kv, dim;
    uint32_t ffn, vocab;
    uint32_t capacity;  // positions of a row in the cache
    uint32_t splits;    // thread blocks that share the positions of a head
    uint32_t blocks;    // of the head's kernel
    uint32_t kind;      // of the activation
    float a, b;         // its numbers: 1 / temperature and strength, or gamma
    float eps;          // of the norms
    uint32_t numbers;   // of the cache: 0 is f32, 1 bf16, 2 f16
};
static_assert(sizeof(DecodeParams) == 60, "the Rust side has the same layout");

// From compute capability 9.0 on the kernels of a step overlap: each lets the next one begin as soon as it runs itself,
// which asks for its weights and then waits until what it reads of the kernels before has been written. (Elsewhere the
// next kernel begins when this one has ended.)
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Asks for n bytes to come into the L2 cache, by a whole warp.
__device__ __forceinline__ void ask_for(const uint8_t *from, size_t n) {
#if __CUDA_ARCH__ >= 900
    for (size_t i = threadIdx.x % 32 * 128; i < n; i += 32 * 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
#endif
}

constexpr uint32_t WARPS = 8;      // of a thread block of a product
constexpr uint32_t POSITIONS = 128;  // threads of the attention, and positions that it takes at once
constexpr uint32_t QUERIES = 4;    // query heads that it takes at once

// The sum over the thread block, in every thread.
__device__ __forceinline__ float block_sum(float x, float *scratch) {
    x = warp_sum(x);
    __syncthreads();  // whoever still reads what was there
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (uint32_t i = 0; i < blockDim.x / 32; i++) sum += scratch[i];
    return sum;
}

// The same of B numbers at once; scratch: B times the warps.
template <int B> __device__ __forceinline__ void block_sums(float (&x)[B], float *scratch) {
    const uint32_t warps = blockDim.x / 32;
#pragma unroll
    for (int b = 0; b < B; b++) x[b] = warp_sum(x[b]);
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int b = 0; b < B; b++) scratch[b * warps + threadIdx.x / 32] = x[b];
    }
    __syncthreads();
#pragma unroll
    for (int b = 0; b < B; b++) {
        x[b] = 0.0f;
        for (uint32_t i = 0; i < warps; i++) x[b] += scratch[b * warps + i];
    }
}

// The maximum, likewise.
__device__ __forceinline__ float block_max(float x, float *scratch) {
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float most = scratch[0];
    for (uint32_t i = 1; i < blockDim.x / 32; i++) most = fmaxf(most, scratch[i]);
    return most;
}
