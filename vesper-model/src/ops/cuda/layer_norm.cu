// LayerNorm: one warp a row.
//
//     n = (x - mean(x)) r     r = 1 / sqrt(mean((x - mean(x))^2) + eps)     y = n w + b
//     g = w dy     dx = r (g - mean(g) - n mean(g n))     dw = sum over rows of n dy     db = sum over rows of dy
//
// The gradients of w and b are summed by each warp over its rows, then over the warps and blocks in order: no atomics, so
// the same bits each time.

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

// With J > 0 a lane keeps its shares of the sums for w and b in registers; else they are added up in global memory, each
// element by one lane alone.
// partial: (2, parts, d), the sums for w and then those for b, or null where neither needs a gradient; a part is a block
// with J > 0, else a warp.
template <typename T, int V, int J>
__device__ void backward(const T *x, const T *w, const T *dy, T *dx, float *partial, NormParams p) {
    const int lane = threadIdx.x % 32;
    const size_t warps = (size_t)gridDim.x * (blockDim.x / 32);
    const size_t warp = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if constexpr (J > 0) {
        using R = Row<T, V, J>;
        float sw[J][V], sb[J][V];
#pragma unroll
        for (int j = 0; j < J; j++)
#pragma unroll
            for (int k = 0; k < V; k++) sw[j][k] = sb[j][k] = 0;
        const float each = 1.0f / p.d;
        // Where there are registers for more, w stays in them, and the distances to the mean until they are used again.
        constexpr bool KEEPS = J * V <= 32;
        R weight;
        if (KEEPS) weight.read(w, p.d, lane);
        for (size_t row = warp; row < p.rows; row += warps) {
            R a, c;
            a.read(x + row * p.d, p.d, lane);
            c.read(dy + row * p.d, p.d, lane);
            const Statistics s = a.mean(p.d, lane);
            float kept[KEEPS ? J : 1][V], squares = 0, g = 0, gc = 0;
            R::each(p.d, lane, [&](int j, uint32_t i) {
                if (!KEEPS) weight.v[j] = load<T, V>(w + i);
#pragma unroll
                for (int k = 0; k < V; k++) {
                    const float centred = s.centred(to_float(a.v[j].v[k]));
                    const float dyv = to_float(c.v[j].v[k]), gv = to_float(weight.v[j].v[k]) * dyv;
                    if (KEEPS) kept[KEEPS ? j : 0][k] = centred;
                    squares += centred * centred;
                    g += gv;
                    gc += gv * centred;
                    sb[j][k] += dyv;
                }
            });
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) {
                squares += __shfl_xor_sync(0xffffffffu, squares, offset);
                g += __shfl_xor_sync(0xffffffffu, g, offset);
                gc += __shfl_xor_sync(0xffffffffu, gc, offset);
            }
            const float r = rsqrtf(squares * each + p.eps);  // by one division for all rows
            g *= r * each;
            gc *= r * each * r * r;
            R::each(p.d, lane, [&](int j, uint32_t i) {
                if (!KEEPS) weight.v[j] = load<T, V>(w + i);
                Vec<T, V> out;
#pragma unroll
                for (int k = 0; k < V; k++) {
                    const float centred = KEEPS ? kept[KEEPS ? j : 0][k] : s.centred(to_float(a.v[j].v[k]));
                    const float dyv = to_float(c.v[j].v[k]), gv = to_float(weight.v[j].v[k]) * dyv;
                    out.v[k] = from_float<T>(gv * r - g - centred * gc);
                    sw[j][k] += centred * r * dyv;
                }
                store<T, V>(dx + row * p.d + i, out);
            });
        }
        if (partial) {
            write_sums(sw, partial + (size_t)blockIdx.x * p.d, p.d);
            write_sums(sb, partial + ((size_t)gridDim.x + blockIdx.x) * p.d, p.d);
        }
    } else {
        float *const dw = partial ? partial + warp * p.d : nullptr;
        float *const db = partial ? partial + (warps + warp) * p.d : nullptr;
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
    extern "C" __global__ void __launch_bounds__(128, BLOCKS<V, J>) layer_norm_backward_##T##_##NAME(                                \
        const T *x, const T *w, const T *dy, T *dx, float *partial, NormParams p) {                                    \
        backward<T, V, J>(x, w, dy, dx, partial, p);                                                                   \
    }

EACH(ONE, f32)
EACH(ONE, bf16)
EACH(ONE, f16)
