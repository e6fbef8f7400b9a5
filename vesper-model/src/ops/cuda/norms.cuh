// One row of RMSNorm and of LayerNorm by one warp, for rows of any length.
#pragma once

#include "common.cuh"

struct Statistics {
    float mean, r;
};

// The mean of a row and 1 / sqrt(variance + eps), in every lane.
template <typename T, int V>
__device__ __forceinline__ Statistics statistics(const T *x, uint32_t d, float eps, int lane) {
    float sum = 0, squares = 0;
    for (uint32_t i = lane * V; i < d; i += 32 * V) {
        const Vec<T, V> a = load<T, V>(x + i);
#pragma unroll
        for (int k = 0; k < V; k++) sum += to_float(a.v[k]);
    }
    const float mean = warp_sum(sum) / d;
    for (uint32_t i = lane * V; i < d; i += 32 * V) {
        const Vec<T, V> a = load<T, V>(x + i);
#pragma unroll
        for (int k = 0; k < V; k++) {
            const float centred = to_float(a.v[k]) - mean;
            squares += centred * centred;
        }
    }
    return {mean, 1.0f / sqrtf(warp_sum(squares) / d + eps)};
}

template <typename T, int V>
__device__ __forceinline__ void layer_norm_row(const T *x, const T *w, const T *b, T *y, uint32_t d, float eps,
                                               int lane) {
    const Statistics s = statistics<T, V>(x, d, eps, lane);
    for (uint32_t i = lane * V; i < d; i += 32 * V) {
        const Vec<T, V> a = load<T, V>(x + i), c = load<T, V>(w + i), e = load<T, V>(b + i);
        Vec<T, V> out;
#pragma unroll
        for (int k = 0; k < V; k++)
            out.v[k] = from_float<T>((to_float(a.v[k]) - s.mean) * s.r * to_float(c.v[k]) + to_float(e.v[k]));
        store<T, V>(y + i, out);
    }
}

template <typename T, int V>
__device__ __forceinline__ void rms_norm_row(const T *x, const T *w, T *y, uint32_t d, float eps, int lane) {
    float squares = 0;
    for (uint32_t i = lane * V; i < d; i += 32 * V) {
        const Vec<T, V> a = load<T, V>(x + i);
#pragma unroll
        for (int k = 0; k < V; k++) squares += to_float(a.v[k]) * to_float(a.v[k]);
    }
    const float r = 1.0f / sqrtf(warp_sum(squares) / d + eps);
    for (uint32_t i = lane * V; i < d; i += 32 * V) {
        const Vec<T, V> a = load<T, V>(x + i), c = load<T, V>(w + i);
        Vec<T, V> out;
#pragma unroll
        for (int k = 0; k < V; k++) out.v[k] = from_float<T>(to_float(a.v[k]) * r * to_float(c.v[k]));
        store<T, V>(y + i, out);
    }
}
