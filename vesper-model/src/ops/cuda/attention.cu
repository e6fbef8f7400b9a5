// Causal attention over a packed projection (batch, t, (query + 2 kv) dim), rows [q heads | k heads | v heads].

#include "attention_forward.cuh"

// out: (batch, t, query dim); lse: (batch, query, t), the base-2 logarithm of the sum of exponentials of a row.
template <typename T, int D, int MT, int BN>
__device__ __forceinline__ void packed(const T *qkv, T *out, float *lse, AttentionParams p) {
    const Place at = place_of(blockIdx.x, p.query);
    T *const to = out + at.batch * p.t * p.query * p.dim + at.head * p.dim;
    float *const logs = lse + ((size_t)at.batch * p.query + at.head) * p.t;
    forward<T, D, MT, 4, BN>(packed_head(qkv, at, p), to, (size_t)p.query * p.dim, logs, p.dim, p.scale);
}

// The tiles are those of `KERNELS` in attention.rs, shared memory in bytes: 2 D (BM + 4 BN).
#define KERNELS(T, D, MT, BN)                                                                                          \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
        attention_forward_##T##_##D(const T *qkv, T *out, float *lse, AttentionParams p) {                             \
        packed<T, D, MT, BN>(qkv, out, lse, p);                                                                    \
    }

KERNELS(bf16, 64, 2, 64)
KERNELS(bf16, 128, 2, 64)
KERNELS(f16, 64, 2, 64)
KERNELS(f16, 128, 2, 64)
