// What the kernels share: the structs that cross from Rust (see layout.rs), the element types, sums and tables.
//
// All of it is compiled with -fmad=false: every operation is rounded once, as on the CPU, whose bits the updates in f32
// have to give. Sums run in f64 in a fixed order; there are no atomics.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;
typedef __half f16;
typedef float f32;

// Threads of a block of most kernels.
constexpr int THREADS = 256;
// Elements of a block: as many for every element type, so that a parameter has one numbering of its chunks. Few, so that
// the last blocks of a launch do not run alone for long: 16384 took 3 % more time on an H200.
constexpr int CHUNK = 4096;
// Tensors of a launch: what fits into the 4 KiB of parameters that every CUDA version takes.
constexpr int TENSORS = 136;
// Parameters whose presence a launch takes as bits.
constexpr int BITS = 16384;

// The tensors of a launch, by value. Block b works on the entry i with first[i] <= b < first[i + 1].
struct Table {
    uint64_t p[TENSORS];
    uint64_t g[TENSORS];
    // The number of the parameter among all.
    uint32_t tensor[TENSORS];
    // Where its matrix begins in the workspace of an orthogonalisation, in units of 64 elements.
    uint32_t at[TENSORS];
    uint32_t first[TENSORS + 1];
    uint32_t count;
};
static_assert(sizeof(Table) == 3816, "as in layout.rs");

// Which parameters have a gradient in this step.
struct Present {
    uint32_t bits[BITS / 32];
};
static_assert(sizeof(Present) == 2048, "as in layout.rs");

// What does not change from step to step about a parameter.
struct Param {
    // f32 arrays, or codes of 8 bits and the f32 scales of their blocks; 0 where there is none.
    uint64_t state[2];
    uint64_t scales[2];
    uint64_t master;
    // What is known of each row: a byte where rows without a gradient are left out, a Row under orthogonalisation.
    uint64_t rows;
    uint64_t elements;
    // Elements of a row.
    uint32_t row;
    // The number of its first chunk among the chunks of all parameters.
    uint32_t chunk;
    uint32_t rule;
    uint32_t options;
    double lr_scale;
    double decay;
    // Settings of the rule: see coefficients in control.cu.
    double a, b, c, d;
};
static_assert(sizeof(Param) == 120, "as in layout.rs");

enum Rule : uint32_t { ADAMW = 0, SGD = 1, LION = 2, ORTHOGONAL = 3 };

enum Option : uint32_t { NESTEROV = 1, CAUTIOUS = 2, CAUTIOUS_DECAY = 4, ROW_MOMENT = 8, STOCHASTIC = 16 };

// What an update needs of one step, computed in f64 and rounded as the CPU rounds it.
struct Coefficients {
    float clip, keep, step_size, first_weight;
    float past, fresh, correction, eps;
    float of_m, of_g;
    // What the elements of a cautious update, or of an orthogonalised matrix, are scaled by.
    float scale;
    uint32_t options;
    // Of the random numbers of stochastic rounding.
    uint32_t key;
    uint32_t pad[3];
};
static_assert(sizeof(Coefficients) == 64, "as in layout.rs");

// The optimizer's own state.
struct Control {
    double base_lr;
    // Of warm-up, momentum, brake, and the Polyak cap's loss and rate; NaN before the first.
    double averages[5];
    double grad_norm, clip_scale, lr, beta1, progress, update_ratio;
    uint64_t step, skipped, ignored;
    uint64_t has_norm, has_progress, has_ratio;
    // Whether this step updates anything.
    uint64_t apply;
    // The step that was left out because of NonFinite::Error and is not reported yet, or 0.
    uint64_t failed_step;
    double failed_norm;
};
static_assert(sizeof(Control) == 168, "as in layout.rs");

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

// N consecutive elements in registers, read and written in pieces of 16 bytes, or as one of 8.
template <typename T, int N> struct Run {
    static constexpr int BYTES = sizeof(T) * N;
    static constexpr int PIECES = BYTES / 16;
    static_assert(BYTES == 8 || BYTES % 16 == 0, "8 bytes or whole pieces of 16");
    alignas(BYTES == 8 ? 8 : 16) T v[N];

    __device__ __forceinline__ void load(const T *p) {
        if constexpr (BYTES == 8) {
            *reinterpret_cast<uint2 *>(v) = *reinterpret_cast<const uint2 *>(p);
        } else {
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                reinterpret_cast<uint4 *>(v)[i] = reinterpret_cast<const uint4 *>(p)[i];
            }
        }
    }

    __device__ __forceinline__ void store(T *p) const {
        if constexpr (BYTES == 8) {
            *reinterpret_cast<uint2 *>(p) = *reinterpret_cast<const uint2 *>(v);
        } else {
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                reinterpret_cast<uint4 *>(p)[i] = reinterpret_cast<const uint4 *>(v)[i];
            }
        }
    }
};

__device__ __forceinline__ bool is_aligned(const void *p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// The entry of a block.
__device__ __forceinline__ uint32_t entry_of(const Table &table, uint32_t block) {
    uint32_t low = 0, high = table.count;
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if (table.first[middle] <= block) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// The sum over a block, in thread 0; every thread of the block must call it.
template <int N> __device__ __forceinline__ void block_sum(double (&x)[N]) {
    __shared__ double sums[N][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        x[i] = warp_sum(x[i]);
        if (lane == 0) sums[i][warp] = x[i];
    }
    __syncthreads();
    if (warp == 0) {
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = warp_sum(lane < warps ? sums[i][lane] : 0.0);
    }
    __syncthreads(); // before the array is used again
}

__device__ __forceinline__ bool is_present(const Present &present, uint32_t i) {
    return present.bits[i / 32] >> (i % 32) & 1;
}

__device__ __forceinline__ uint32_t chunks_of(const Param &param) {
    return static_cast<uint32_t>((param.elements + CHUNK - 1) / CHUNK);
}
