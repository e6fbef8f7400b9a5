// Puts the keys and values of new tokens into a cache, and their queries beside each other, both rotated:
//
//     [a | b] -> [a cos - b sin | b cos + a sin]
//
// One block a token of the packed projection (t, (query + 2 kv) dim).

#include "attention.cuh"

// q: (t, query dim); cache: (2, rows, kv, capacity, dim); cos, sin: (positions, dim / 2)
template <typename T, int V>
__device__ void keep(const T *qkv, const float *cos, const float *sin, T *q, T *cache, CachedParams p) {
    const AttentionParams &a = p.attention;
    const uint32_t half = a.dim / 2, vectors = half / V, heads = a.query + 2 * a.kv;
    const size_t token = blockIdx.x, position = p.first + token;
    for (uint32_t i = threadIdx.x; i < heads * vectors; i += blockDim.x) {
        const uint32_t head = i / vectors, column = (i - head * vectors) * V;
        const T *const from = qkv + (token * heads + head) * a.dim + column;
        Vec<T, V> low = load<T, V>(from), high = load<T, V>(from + half);
        if (head < a.query + a.kv) {
#pragma unroll
            for (int k = 0; k < V; k++) {
                const float c = cos[position * half + column + k], s = sin[position * half + column + k];
                const float x = to_float(low.v[k]), y = to_float(high.v[k]);
                low.v[k] = from_float<T>(x * c - y * s);
                high.v[k] = from_float<T>(y * c + x * s);
            }
        }
        T *to;
        if (head < a.query) {
            to = q + (token * a.query + head) * a.dim + column;
        } else {
            const uint32_t own = head - a.query, values = own / a.kv;
            to = cache + cached_at(p, values, own - values * a.kv) + position * a.dim + column;
        }
        store<T, V>(to, low);
        store<T, V>(to + half, high);
    }
}

#define KERNELS(T)                                                                                                     \
    extern "C" __global__ void cache_##T##_wide(const T *qkv, const float *cos, const float *sin, T *q, T *cache,      \
                                                CachedParams p) {                                                      \
        keep<T, WIDE<T>>(qkv, cos, sin, q, cache, p);                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void cache_##T##_single(const T *qkv, const float *cos, const float *sin, T *q, T *cache,    \
                                                  CachedParams p) {                                                    \
        keep<T, 1>(qkv, cos, sin, q, cache, p);                                                                        \
    }

KERNELS(f32)
KERNELS(bf16)
KERNELS(f16)
