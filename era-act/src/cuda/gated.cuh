// f(gate) up over rows [gate | up], and its gradient, rows [dy up f'(gate) | dy f(gate)]: the bodies of the kernels.
//
// The threads of a block stand in rows as wide as the columns allow, over as many rows as are left.
#pragma once

#include "elementwise.cuh"

template <Kind K, typename T, int V> __device__ __forceinline__ void gated_forward(const T *packed, T *y, Params p) {
    const uint32_t column = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (column >= p.width) return;
    const uint64_t step = (uint64_t)gridDim.y * blockDim.y;
    for (uint64_t row = (uint64_t)blockIdx.y * blockDim.y + threadIdx.y; row < p.n; row += step) {
        const T *gate = packed + row * 2 * p.width + column;
        const Vec<T, V> g = load<T, V>(gate), u = load<T, V>(gate + p.width);
        Vec<T, V> out;
#pragma unroll
        for (int k = 0; k < V; k++)
            out.v[k] = from_float<T>(at<K, IS_HALF<T>>(to_float(g.v[k]), p).value * to_float(u.v[k]));
        store<T, V>(y + row * p.width + column, out);
    }
}

// inner: f(gate) up once more, for the gradient of a matrix that follows; or null.
template <Kind K, typename T, int V, bool LEARNED>
__device__ __forceinline__ void gated_backward(const T *packed, const T *dy, T *dpacked, T *inner, Sums &sums,
                                               const Params &p) {
    const uint32_t column = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (column >= p.width) return;
    const uint64_t step = (uint64_t)gridDim.y * blockDim.y;
    for (uint64_t row = (uint64_t)blockIdx.y * blockDim.y + threadIdx.y; row < p.n; row += step) {
        const T *gate = packed + row * 2 * p.width + column;
        const Vec<T, V> g = load<T, V>(gate), u = load<T, V>(gate + p.width);
        const Vec<T, V> d = load<T, V>(dy + row * p.width + column);
        Vec<T, V> dgate, dup, value;
        float a = 0, b = 0;
#pragma unroll
        for (int k = 0; k < V; k++) {
            const Point f = at<K, IS_HALF<T>>(to_float(g.v[k]), p);
            const float up = to_float(u.v[k]), dv = to_float(d.v[k]);
            dgate.v[k] = from_float<T>(dv * up * f.slope);
            dup.v[k] = from_float<T>(dv * f.value);
            value.v[k] = from_float<T>(f.value * up);
            if (LEARNED) {
                a = __fmaf_rn(dv * up, f.by_a, a);
                b = __fmaf_rn(dv * up, f.by_b, b);
            }
        }
        T *to = dpacked + row * 2 * p.width + column;
        store<T, V>(to, dgate);
        store<T, V>(to + p.width, dup);
        if (inner) store<T, V>(inner + row * p.width + column, value);
        if (LEARNED) {
            sums.a += a;
            sums.b += b;
        }
    }
}
