// Dropout by Philox 4x32-10: element i has word i % 4 of block i / 4, as on the CPU. One thread 16 bytes, one block of
// words or two.
//
//     y[i] = x[i] scale where word > last, 0 elsewhere
//
// The generator takes about as long as the memory does, so what is the same for all elements comes from the host: the key
// of each round. x is read once and y is larger than the caches where it matters: both pass them by.

#include "common.cuh"

struct Key {
    uint32_t a, b;
};

struct DropoutParams {
    uint64_t n;
    uint64_t offset;
    Key keys[10];
    uint32_t last;  // the last word that is dropped
    float scale;
};
static_assert(sizeof(DropoutParams) == 104, "the Rust side has the same layout");

__device__ __forceinline__ uint4 philox(uint64_t block, const DropoutParams &p) {
    uint4 c = {(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)p.offset, (uint32_t)(p.offset >> 32)};
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * c.x, b = (uint64_t)0xCD9E8D57u * c.z;
        c.x = (uint32_t)(b >> 32) ^ c.y ^ p.keys[round].a;
        c.y = (uint32_t)b;
        c.z = (uint32_t)(a >> 32) ^ c.w ^ p.keys[round].b;
        c.w = (uint32_t)a;
    }
    return c;
}

template <typename T> __device__ void dropout(const T *x, T *y, const DropoutParams &p) {
    constexpr int V = WIDE<T>;
    union Wide {
        uint4 bits;
        T v[V];
        __device__ Wide() {}
    };
    const uint64_t step = (uint64_t)gridDim.x * blockDim.x * V;
    for (uint64_t i = ((uint64_t)blockIdx.x * blockDim.x + threadIdx.x) * V; i < p.n; i += step) {
        const bool whole = i + V <= p.n;
        Wide a;
        if (whole) a.bits = __ldcs(reinterpret_cast<const uint4 *>(x + i));
        uint32_t word[V];
#pragma unroll
        for (int k = 0; k < V; k += 4) {
            const uint4 words = philox((i + k) / 4, p);
            word[k] = words.x, word[k + 1] = words.y, word[k + 2] = words.z, word[k + 3] = words.w;
        }
        auto kept = [&](T value, int k) { return word[k] > p.last ? to_float(value) * p.scale : 0.0f; };
        if (whole) {
#pragma unroll
            for (int k = 0; k < V; k += 2) put(&a.v[k], kept(a.v[k], k), kept(a.v[k + 1], k + 1));
            __stcs(reinterpret_cast<uint4 *>(y + i), a.bits);
        } else {
#pragma unroll
            for (int k = 0; k < V; k++)
                if (i + k < p.n) y[i + k] = from_float<T>(kept(x[i + k], k));
        }
    }
}

#define KERNEL(T)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        dropout_##T(const T *x, T *y, const __grid_constant__ DropoutParams p) {                                       \
        dropout<T>(x, y, p);                                                                                           \
    }

KERNEL(f32)
KERNEL(bf16)
KERNEL(f16)
