// Attention of new tokens over a cache in which their keys and values are already, without tensor cores.

#include "attention_plain.cuh"

// q, out: (t, query dim)
#define KERNELS(T, D)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        attention_plain_cached_##T##_##D(const T *q, const T *cache, T *out, CachedParams p) {                         \
        const AttentionParams &a = p.attention;                                                                        \
        forward<T, D>(cached_head(q, cache, blockIdx.x, p), out + blockIdx.x * a.dim, (size_t)a.query * a.dim,         \
                      nullptr, a.dim, a.scale);                                                                        \
    }

KERNELS(f32, 64)
KERNELS(f32, 128)
KERNELS(bf16, 64)
KERNELS(bf16, 128)
KERNELS(f16, 64)
KERNELS(f16, 128)
