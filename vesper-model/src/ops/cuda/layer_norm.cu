// LayerNorm: one warp a row.
//
//     n = (x - mean(x)) r     r = 1 / sqrt(mean((x - mean(x))^2) + eps)     y = n w + b
//     g = w dy     dx = r (g - mean(g) - n mean(g n))     dw = sum over rows of n dy     db = sum over rows of dy
//
// The gradients of w and b are summed by each warp over its rows, then over the warps in order: no atomics, so the same
// bits each time.

#include "norms.cuh"

template <typename T, int V, int J>
__device__ void forward(const T *x, const T *w, const T *b, T *y, NormParams p) {
    const int lane = threadIdx.x % 32;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= p.rows) return;
    Row<T, V, J> a;
    if constexpr (J > 0)
        a.read(x + row * p.d, p.d, lane);
    else
        a.x = x + row * p.d;
    a.layer_norm(w, b, y + row * p.d, p.d, p.eps, lane);
}

// partial: (2, warps, d), the sums for w and then those for b, or null where neither needs a gradient. With J > 0 a lane
// keeps its shares of them in registers; else they are added up in global memory, each element by one lane alone.
template <typename T, int V, int J>
__device__ void backward(const T *x, const T *w, const T *dy, T *dx, float *partial, NormParams p) {
    const int lane = threadIdx.x % 32;
    const size_t warps = (size_t)gridDim.x * (blockDim.x / 32);
    const size_t warp = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    float *const dw = partial ? partial + warp * p.d : nullptr;
    float *const db = partial ? partial + (warps + warp) * p.d : nullptr;
    if constexpr (J > 0) {
        using R = Row<T, V, J>;
        float sw[J][V], sb[J][V];
#pragma unroll
        for (int j = 0; j < J; j++)
#pragma unroll
            for (int k = 0; k < V; k++) sw[j][k] = sb[j][k] = 0;
        // The next row is under way while this one is worked on, where there are registers for both.
        constexpr bool AHEAD = J * V <= 24;
        R a, c;
        const auto fetch = [&](size_t row) {
            if (row >= p.rows) return;
            a.read(x + row * p.d, p.d, lane);
            c.read(dy + row * p.d, p.d, lane);
        };
        if (AHEAD) fetch(warp);
        for (size_t row = warp; row < p.rows; row += warps) {
            if (!AHEAD) fetch(row);
            const R now = a, dnow = c;
            if (AHEAD) fetch(row + warps);
            const Statistics s = now.statistics(p.d, p.eps, lane);
            float g = 0, gn = 0;
            R::each(p.d, lane, [&](int j, uint32_t i) {
                const Vec<T, V> weight = load<T, V>(w + i);
#pragma unroll
                for (int k = 0; k < V; k++) {
                    const float gv = to_float(weight.v[k]) * to_float(dnow.v[j].v[k]);
                    g += gv;
                    gn += gv * s.centred(to_float(now.v[j].v[k]));
                }
            });
            g = warp_sum(g) / p.d;
            gn = warp_sum(gn) * s.r / p.d;
            R::each(p.d, lane, [&](int j, uint32_t i) {
                const Vec<T, V> weight = load<T, V>(w + i);
                Vec<T, V> out;
#pragma unroll
                for (int k = 0; k < V; k++) {
                    const float n = s.centred(to_float(now.v[j].v[k])) * s.r, dyv = to_float(dnow.v[j].v[k]);
                    out.v[k] = from_float<T>(s.r * (to_float(weight.v[k]) * dyv - g - n * gn));
                    sw[j][k] += n * dyv;
                    sb[j][k] += dyv;
                }
                store<T, V>(dx + row * p.d + i, out);
            });
        }
        if (partial)
            R::each(p.d, lane, [&](int j, uint32_t i) {
#pragma unroll
                for (int k = 0; k < V; k++) {
                    dw[i + k] = sw[j][k];
                    db[i + k] = sb[j][k];
                }
            });
    } else {
        if (partial)
            for (uint32_t i = lane * V; i < p.d; i += 32 * V)
#pragma unroll
                for (int k = 0; k < V; k++) dw[i + k] = db[i + k] = 0;
        for (size_t row = warp; row < p.rows; row += warps) {
            const T *const xr = x + row * p.d, *const dyr = dy + row * p.d;
            const Statistics s = Row<T, V, 0>{xr}.statistics(p.d, p.eps, lane);
            float g = 0, gn = 0;
            for (uint32_t i = lane * V; i < p.d; i += 32 * V) {
                const Vec<T, V> a = load<T, V>(xr + i), b = load<T, V>(w + i), c = load<T, V>(dyr + i);
#pragma unroll
                for (int k = 0; k < V; k++) {
                    const float gv = to_float(b.v[k]) * to_float(c.v[k]);
                    g += gv;
                    gn += gv * s.centred(to_float(a.v[k]));
                }
            }
            g = warp_sum(g) / p.d;
            gn = warp_sum(gn) * s.r / p.d;
            for (uint32_t i = lane * V; i < p.d; i += 32 * V) {
                const Vec<T, V> a = load<T, V>(xr + i), b = load<T, V>(w + i), c = load<T, V>(dyr + i);
                Vec<T, V> out;
#pragma unroll
                for (int k = 0; k < V; k++) {
                    const float n = s.centred(to_float(a.v[k])) * s.r, dyv = to_float(c.v[k]);
                    out.v[k] = from_float<T>(s.r * (to_float(b.v[k]) * dyv - g - n * gn));
                    if (partial) {
                        dw[i + k] += n * dyv; // the same lane alone, in each row
                        db[i + k] += dyv;
                    }
                }
                store<T, V>(dx + row * p.d + i, out);
            }
        }
    }
}

#define ONE(T, NAME, V, J)                                                                                             \
    extern "C" __global__ void __launch_bounds__(128) layer_norm_forward_##T##_##NAME(                                 \
        const T *x, const T *w, const T *b, T *y, NormParams p) {                                                      \
        forward<T, V, J>(x, w, b, y, p);                                                                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) layer_norm_backward_##T##_##NAME(                                \
        const T *x, const T *w, const T *dy, T *dx, float *partial, NormParams p) {                                    \
        backward<T, V, J>(x, w, dy, dx, partial, p);                                                                   \
    }

EACH(ONE, f32)
EACH(ONE, bf16)
EACH(ONE, f16)
