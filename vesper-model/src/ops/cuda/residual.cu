// A residual sum and the norm after it: one warp a row. The sum is rounded to the type before it is normalised.

#include "norms.cuh"

// b: null for RMSNorm.
template <typename T, int V, int J>
__device__ void residual(const T *x, const T *other, const T *w, const T *b, T *sum, T *y, NormParams p) {
    const int lane = threadIdx.x % 32;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= p.rows) return;
    x += row * p.d;
    other += row * p.d;
    sum += row * p.d;
    y += row * p.d;
    const auto add = [](const Vec<T, V> &a, const Vec<T, V> &c) {
        Vec<T, V> out;
#pragma unroll
        for (int k = 0; k < V; k++) out.v[k] = from_float<T>(to_float(a.v[k]) + to_float(c.v[k]));
        return out;
    };
    Row<T, V, J> s;
    if constexpr (J > 0) {
        Row<T, V, J> c;
        s.read(x, p.d, lane);
        c.read(other, p.d, lane);
#pragma unroll
        for (int j = 0; j < J; j++) s.v[j] = add(s.v[j], c.v[j]);
        s.write(sum, p.d, lane);
    } else {
        // What a lane wrote of the sum, the same lane reads again.
        for (uint32_t i = lane * V; i < p.d; i += 32 * V) store<T, V>(sum + i, add(load<T, V>(x + i), load<T, V>(other + i)));
        s.x = sum;
    }
    if (b)
        s.layer_norm(w, b, y, p.d, p.eps, lane);
    else
        s.rms_norm(w, y, p.d, p.eps, lane);
}

#define ONE(T, NAME, V, J)                                                                                             \
    extern "C" __global__ void __launch_bounds__(128) residual_norm_##T##_##NAME(                                      \
        const T *x, const T *other, const T *w, const T *b, T *sum, T *y, NormParams p) {                              \
        residual<T, V, J>(x, other, w, b, sum, y, p);                                                                  \
    }

EACH(ONE, f32)
EACH(ONE, bf16)
EACH(ONE, f16)
