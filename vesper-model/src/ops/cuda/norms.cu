// What RMSNorm and LayerNorm share: the sums of their parameters' gradients over the warps.

#include "common.cuh"

// out[c] = sum over n of partial[n][c], in a fixed order. One block of (32, 32) threads for 32 columns.
template <typename T> __device__ void reduce(const float *partial, T *out, uint32_t n, uint32_t d) {
    __shared__ float sums[32][33];
    const uint32_t c = blockIdx.x * 32 + threadIdx.x;
    float sum = 0;
    if (c < d)
        for (uint32_t i = threadIdx.y; i < n; i += 32) sum += partial[(size_t)i * d + c];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < d) {
        float total = 0;
        for (int i = 0; i < 32; i++) total += sums[i][threadIdx.x];
        out[c] = from_float<T>(total);
    }
}

#define ONE(T)                                                                                                         \
    extern "C" __global__ void norms_reduce_##T(const float *partial, T *out, uint32_t n, uint32_t d) {                \
        reduce<T>(partial, out, n, d);                                                                                 \
    }

ONE(f32)
ONE(bf16)
ONE(f16)
