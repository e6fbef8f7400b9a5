// An activation of every element, and its gradient: the bodies of the kernels.
#pragma once

#include "activation.cuh"

// Vectors of 16 bytes that a thread reads before it computes.
constexpr int UNROLL = 2;

template <Kind K, typename T> __device__ __forceinline__ void forward(const T *x, T *y, Params p) {
    constexpr int V = WIDE<T>;
    const uint64_t step = (uint64_t)blockDim.x * V;
    const uint64_t first = (blockIdx.x * (uint64_t)blockDim.x * UNROLL + threadIdx.x) * V;
    Vec<T, V> in[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
        if (first + u * step + V <= p.n) in[u] = load<T, V>(x + first + u * step);
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        const uint64_t i = first + u * step;
        if (i + V <= p.n) {
            Vec<T, V> out;
#pragma unroll
            for (int k = 0; k < V; k++) out.v[k] = from_float<T>(at<K, IS_HALF<T>>(to_float(in[u].v[k]), p).value);
            store<T, V>(y + i, out);
        } else {
            for (uint64_t j = i; j < p.n; j++) y[j] = from_float<T>(at<K, IS_HALF<T>>(to_float(x[j]), p).value);
        }
    }
}

// What the gradients of trained parameters add up to, in one thread.
struct Sums {
    double a, b;
};

template <Kind K, typename T, bool LEARNED>
__device__ __forceinline__ void backward_one(T x, T dy, T &dx, float &a, float &b, const Params &p) {
    const Point f = at<K, IS_HALF<T>>(to_float(x), p);
    const float d = to_float(dy);
    dx = from_float<T>(d * f.slope);
    if (LEARNED) {
        a = __fmaf_rn(d, f.by_a, a);
        b = __fmaf_rn(d, f.by_b, b);
    }
}

// `block` of `blocks` as if the grid were that long.
template <Kind K, typename T, bool LEARNED>
__device__ __forceinline__ void backward(const T *x, const T *dy, T *dx, Sums &sums, const Params &p, uint64_t block) {
    constexpr int V = WIDE<T>;
    const uint64_t step = (uint64_t)blockDim.x * V;
    const uint64_t first = (block * blockDim.x * UNROLL + threadIdx.x) * V;
    Vec<T, V> in[UNROLL], d[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        const uint64_t i = first + u * step;
        if (i + V <= p.n) {
            in[u] = load<T, V>(x + i);
            d[u] = load<T, V>(dy + i);
        }
    }
    float a = 0, b = 0;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        const uint64_t i = first + u * step;
        if (i + V <= p.n) {
            Vec<T, V> out;
#pragma unroll
            for (int k = 0; k < V; k++) backward_one<K, T, LEARNED>(in[u].v[k], d[u].v[k], out.v[k], a, b, p);
            store<T, V>(dx + i, out);
        } else {
            for (uint64_t j = i; j < p.n; j++) backward_one<K, T, LEARNED>(x[j], dy[j], dx[j], a, b, p);
        }
    }
    if (LEARNED) {
        sums.a += a;
        sums.b += b;
    }
}
