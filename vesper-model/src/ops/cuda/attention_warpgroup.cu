// Causal attention over a packed projection by products of warpgroups; see attention.cu.

#include "attention_warpgroup.cuh"

// heads: query heads of all sequences.
#define KERNEL(T, D)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(384, 1) attention_warpgroup_forward_##T##_##D(                        \
        const __grid_constant__ TensorMap qkv, T *out, float *lse, AttentionParams p, uint32_t heads) {                \
        const Sources from = {&qkv, &qkv, (int)p.query, (int)(p.query + p.kv), 0, 0, 0};                               \
        forward<T, D, 2, 128>(from, out, lse, p, heads);                                                               \
    }

KERNEL(bf16, 64)
KERNEL(bf16, 128)
KERNEL(f16, 64)
KERNEL(f16, 128)
