// Conversions and vectors. All arithmetic is in float, whatever the storage type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
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

// V elements from column c of a row that is n long: at once where the rows are laid out for that, 0 past the end.
template <typename T, int V>
__device__ __forceinline__ Vec<T, V> read(const T *row, uint32_t c, uint32_t n, bool wide) {
    if (wide && c + V <= n) return *reinterpret_cast<const Vec<T, V> *>(row + c);
    Vec<T, V> x;
#pragma unroll
    for (int v = 0; v < V; v++) x.v[v] = c + v < n ? row[c + v] : from_float<T>(0.0f);
    return x;
}

template <typename T, int V>
__device__ __forceinline__ void write(T *row, uint32_t c, uint32_t n, bool wide, const Vec<T, V> &x) {
    if (wide && c + V <= n) {
        *reinterpret_cast<Vec<T, V> *>(row + c) = x;
        return;
    }
#pragma unroll
    for (int v = 0; v < V; v++)
        if (c + v < n) row[c + v] = x.v[v];
}

// A number of 32 bits, above 0, that orders as the floats do; NaN comes last.
__device__ __forceinline__ uint32_t key(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
