// Attention of new tokens over a cache in which their keys and values are already, on tensor cores.

#include "attention_forward.cuh"

// q, out: (t, query dim). The tiles are those of `KERNELS` in attention.rs.
#define KERNELS(T, D, MT, BN)                                                                                          \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
        attention_cached_##T##_##D(const T *q, const T *cache, T *out, CachedParams p) {                               \
        const AttentionParams &a = p.attention;                                                                        \
        forward<T, D, MT, 4, BN>(cached_head(q, cache, blockIdx.x, p), out + blockIdx.x * a.dim,                       \
                                 (size_t)a.query * a.dim, nullptr, a.dim, a.scale);                                    \
    }

KERNELS(bf16, 64, 2, 64)
KERNELS(bf16, 128, 2, 64)
KERNELS(f16, 64, 2, 64)
KERNELS(f16, 128, 2, 64)
