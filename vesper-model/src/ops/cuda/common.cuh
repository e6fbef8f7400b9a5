// Conversions and vectors shared by the kernels. All arithmetic is in float, whatever the storage type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <float.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;
typedef __half f16;
typedef float f32;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

// N elements that are read and written at once; pointers must be aligned to the whole vector.
template <typename T, int N> struct alignas(sizeof(T) * N) Vec {
    T v[N];
};

template <typename T, int N> __device__ __forceinline__ Vec<T, N> load(const T *p) {
    return *reinterpret_cast<const Vec<T, N> *>(p);
}

template <typename T, int N> __device__ __forceinline__ void store(T *p, const Vec<T, N> &x) {
    *reinterpret_cast<Vec<T, N> *>(p) = x;
}

// How many elements 16 bytes hold.
template <typename T> constexpr int WIDE = 16 / sizeof(T);

// Past the caches: for what is larger than they are.
template <typename T, int N> __device__ __forceinline__ void store_once(T *p, const Vec<T, N> &x) {
    if constexpr (sizeof(T) * N == 16) {
        union Wide {
            uint4 bits;
            Vec<T, N> v;
            __device__ Wide() {}
        } wide;
        wide.v = x;
        __stcs(reinterpret_cast<uint4 *>(p), wide.bits);
    } else {
        store<T, N>(p, x);
    }
}

// Rounds two numbers at once, for which there is an instruction.
__device__ __forceinline__ void put(float *to, float a, float b) { to[0] = a, to[1] = b; }
__device__ __forceinline__ void put(bf16 *to, float a, float b) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    to[0] = both.x, to[1] = both.y;
}
__device__ __forceinline__ void put(f16 *to, float a, float b) {
    const __half2 both = __floats2half2_rn(a, b);
    to[0] = both.x, to[1] = both.y;
}

// The sum over the 32 lanes, in every lane and in the same order in each.
__device__ __forceinline__ float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
