// Weights in another precision: each element is read and written once.
//
//     out = in, rounded to nearest where T has fewer bits

#include "common.cuh"

// Both pointers are aligned to 16 bytes. A thread reads 16 bytes at a time, several times before it writes.
template <typename T> __device__ void cast(const float *in, T *out, uint64_t n) {
    constexpr int V = WIDE<float>, UNROLL = 4;
    const uint64_t vectors = n / V, block = (uint64_t)blockDim.x * UNROLL;
    const uint64_t thread = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (uint64_t start = blockIdx.x * block; start < vectors; start += gridDim.x * block) {
        Vec<float, V> a[UNROLL];
#pragma unroll
        for (int j = 0; j < UNROLL; j++) {
            const uint64_t i = start + j * blockDim.x + threadIdx.x;
            if (i < vectors) a[j] = load<float, V>(in + i * V);
        }
#pragma unroll
        for (int j = 0; j < UNROLL; j++) {
            const uint64_t i = start + j * blockDim.x + threadIdx.x;
            if (i >= vectors) break;
            Vec<T, V> b;
#pragma unroll
            for (int k = 0; k < V; k++) b.v[k] = from_float<T>(a[j].v[k]);
            store<T, V>(out + i * V, b);
        }
    }
    if (thread < n % V) out[vectors * V + thread] = from_float<T>(in[vectors * V + thread]);
}

extern "C" __global__ void cast_bf16(const float *in, bf16 *out, uint64_t n) { cast(in, out, n); }
extern "C" __global__ void cast_f16(const float *in, f16 *out, uint64_t n) { cast(in, out, n); }
