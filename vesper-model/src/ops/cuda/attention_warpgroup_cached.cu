// Attention of new tokens over a cache by products of warpgroups; see attention_cached.cu.

#include "attention_warpgroup.cuh"

// q, out: (t, query dim); cache: (2 rows, kv, positions so far, dim), keys first.
#define KERNEL(T, D)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(384, 1) attention_warpgroup_cached_##T##_##D(                         \
        const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap cache, T *out, CachedParams p) {        \
        const Sources from = {&q, &cache, 0, 0, (int)p.row, (int)(p.rows + p.row), (int)p.first};                      \
        forward<T, D, 2, 128>(from, out, (float *)nullptr, p.attention, p.attention.query);                            \
    }

KERNEL(bf16, 64)
KERNEL(bf16, 128)
KERNEL(f16, 64)
KERNEL(f16, 128)
