// A residual sum and the norm after it: one warp a row. The sum is rounded to the type before it is normalised; what a
// lane wrote of it, the same lane reads again, from the cache.

#include "norms.cuh"

struct ResidualParams {
    uint64_t rows;
    uint32_t d;
    float eps;
};
static_assert(sizeof(ResidualParams) == 16, "the Rust side has the same layout");

// b: null for RMSNorm.
template <typename T, int V>
__device__ void residual(const T *x, const T *other, const T *w, const T *b, T *sum, T *y, ResidualParams p) {
    const int lane = threadIdx.x % 32;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= p.rows) return;
    x += row * p.d;
    other += row * p.d;
    sum += row * p.d;
    y += row * p.d;
    for (uint32_t i = lane * V; i < p.d; i += 32 * V) {
        const Vec<T, V> a = load<T, V>(x + i), c = load<T, V>(other + i);
        Vec<T, V> out;
#pragma unroll
        for (int k = 0; k < V; k++) out.v[k] = from_float<T>(to_float(a.v[k]) + to_float(c.v[k]));
        store<T, V>(sum + i, out);
    }
    if (b)
        layer_norm_row<T, V>(sum, w, b, y, p.d, p.eps, lane);
    else
        rms_norm_row<T, V>(sum, w, y, p.d, p.eps, lane);
}

#define ONE(T, NAME, V)                                                                                                \
    extern "C" __global__ void residual_norm_##T##_##NAME(const T *x, const T *other, const T *w, const T *b, T *sum,  \
                                                          T *y, ResidualParams p) {                                    \
        residual<T, V>(x, other, w, b, sum, y, p);                                                                     \
    }
#define ALL(T)                                                                                                         \
    ONE(T, wide, WIDE<T>)                                                                                              \
    ONE(T, single, 1)

ALL(f32)
ALL(bf16)
ALL(f16)
