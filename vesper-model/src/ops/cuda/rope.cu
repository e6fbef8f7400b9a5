// Rotates the query and key heads of a packed projection, forwards (sign 1) or back (sign -1).
//
//     [a | b] -> [a cos - b sin | b cos + a sin]
//
// One block a row. Where the result is not the input itself, the value heads are copied. `in` is null in place.

#include "common.cuh"

struct RopeParams {
    uint32_t t;
    uint32_t rotated, heads;  // heads to rotate, and all heads
    uint32_t dim;             // of a head
    float sign;
};
static_assert(sizeof(RopeParams) == 20, "the Rust side has the same layout");

// cos, sin: (positions, dim / 2)
template <typename T, int V>
__device__ void rotate(const T *in, T *out, const float *cos, const float *sin, RopeParams p) {
    const uint32_t half = p.dim / 2, vectors = half / V, width = p.heads * p.dim;
    const size_t row = blockIdx.x;
    const size_t angles = (row % p.t) * half;
    const bool in_place = !in;
    out += row * width;
    in = in_place ? out : in + row * width;
    for (uint32_t i = threadIdx.x; i < p.heads * vectors; i += blockDim.x) {
        const uint32_t head = i / vectors, column = (i - head * vectors) * V;
        if (head >= p.rotated && in_place) return;
        const uint32_t at = head * p.dim + column;
        Vec<T, V> a = load<T, V>(in + at), b = load<T, V>(in + at + half);
        if (head < p.rotated) {
#pragma unroll
            for (int k = 0; k < V; k++) {
                const float c = cos[angles + column + k], s = sin[angles + column + k] * p.sign;
                const float x = to_float(a.v[k]), y = to_float(b.v[k]);
                a.v[k] = from_float<T>(x * c - y * s);
                b.v[k] = from_float<T>(y * c + x * s);
            }
        }
        store<T, V>(out + at, a);
        store<T, V>(out + at + half, b);
    }
}

#define KERNELS(T)                                                                                                     \
    extern "C" __global__ void rope_##T##_wide(const T *in, T *out, const float *cos, const float *sin,                \
                                               RopeParams p) {                                                         \
        rotate<T, WIDE<T>>(in, out, cos, sin, p);                                                                      \
    }                                                                                                                  \
    extern "C" __global__ void rope_##T##_single(const T *in, T *out, const float *cos, const float *sin,              \
                                                 RopeParams p) {                                                       \
        rotate<T, 1>(in, out, cos, sin, p);                                                                            \
    }

KERNELS(f32)
KERNELS(bf16)
KERNELS(f16)
