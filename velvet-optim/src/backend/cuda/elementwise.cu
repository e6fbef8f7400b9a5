// The update of all parameters of a rule whose elements do not depend on each other, and the passes before it.
//
// A launch works on up to TENSORS tensors in blocks of CHUNK elements, so that many small ones cost no more than one
// large one. The floor is memory: 28 bytes a parameter for AdamW in f32.
#include "update.cuh"

// Elements a thread takes at a time: 16 bytes of the narrowest array.
template <typename P, typename G> constexpr int WIDTH = 16 / (sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G));

// FULL has what most updates do without: master copies, stochastic rounding, rows left out, and measuring.
template <uint32_t RULE, typename P, typename G, bool FULL>
__device__ __forceinline__ void update(const Table &table, const Control *control, const Param *params,
                                       const Coefficients *coefficients, double *partials, bool measures) {
    if (!control->apply) return;
    constexpr int W = WIDTH<P, G>;
    constexpr bool TWO = RULE == ADAMW;
    const uint32_t entry = entry_of(table, blockIdx.x);
    const uint32_t tensor = table.tensor[entry], block = blockIdx.x - table.first[entry];
    const Param &param = params[tensor];
    const Coefficients c = coefficients[tensor];
    const uint64_t start = static_cast<uint64_t>(block) * CHUNK;
    const int len = static_cast<int>(min(static_cast<uint64_t>(CHUNK), param.elements - start));
    P *p = reinterpret_cast<P *>(table.p[entry]) + start;
    const G *g = reinterpret_cast<const G *>(table.g[entry]) + start;
    float *a = reinterpret_cast<float *>(param.state[0]) + start;
    float *b = TWO ? reinterpret_cast<float *>(param.state[1]) + start : nullptr;
    float *master = FULL && param.master ? reinterpret_cast<float *>(param.master) + start : nullptr;
    const uint8_t *rows = FULL ? reinterpret_cast<const uint8_t *>(param.rows) : nullptr;
    double sums[3] = {0.0, 0.0, 0.0};

    bool wide = is_aligned(p) && is_aligned(g) && is_aligned(a) && (!TWO || is_aligned(b));
    if (FULL) wide = wide && (!master || is_aligned(master)) && (!rows || param.row % W == 0);
    const int vectors = wide ? len / W : 0;
    for (int v = threadIdx.x; v < vectors; v += THREADS) {
        const int i = v * W;
        const bool moves = !FULL || !rows || rows[(start + i) / param.row];
        if (FULL && !moves && !measures) continue;
        Run<P, W> pv;
        Run<G, W> gv;
        Run<float, W> av, bv, mv;
        if (FULL && master) {
            mv.load(master + i);
        } else {
            pv.load(p + i);
        }
        if (FULL && !moves) {
#pragma unroll
            for (int k = 0; k < W; ++k) measure_weight(sums, master ? mv.v[k] : to_float(pv.v[k]));
            continue;
        }
        gv.load(g + i);
        av.load(a + i);
        if constexpr (TWO) bv.load(b + i);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            float x = FULL && master ? mv.v[k] : to_float(pv.v[k]);
            const float before = x, gradient = to_float(gv.v[k]);
            float none = 0.0f;
            update_element<RULE>(c, x, gradient, av.v[k], TWO ? bv.v[k] : none);
            if (FULL && measures) measure(sums, before, x, gradient);
            if (FULL && master) mv.v[k] = x;
            pv.v[k] = FULL ? stored<P>(c, x, start + i + k) : from_float<P>(x);
        }
        av.store(a + i);
        if constexpr (TWO) bv.store(b + i);
        if (FULL && master) mv.store(master + i);
        pv.store(p + i);
    }
    for (int i = vectors * W + threadIdx.x; i < len; i += THREADS) {
        const bool moves = !FULL || !rows || rows[(start + i) / param.row];
        if (FULL && !moves && !measures) continue;
        float x = FULL && master ? master[i] : to_float(p[i]);
        if (FULL && !moves) {
            measure_weight(sums, x);
            continue;
        }
        const float before = x, gradient = to_float(g[i]);
        float first = a[i], second = TWO ? b[i] : 0.0f;
        update_element<RULE>(c, x, gradient, first, second);
        a[i] = first;
        if constexpr (TWO) b[i] = second;
        if (FULL && measures) measure(sums, before, x, gradient);
        if (FULL && master) master[i] = x;
        p[i] = FULL ? stored<P>(c, x, start + i) : from_float<P>(x);
    }
    if (FULL && measures) {
        block_sum(sums);
        if (threadIdx.x == 0) {
            double *out = partials + 3 * static_cast<size_t>(param.chunk + block);
            for (int n = 0; n < 3; ++n) out[n] = sums[n];
        }
    }
}

#define UPDATE(RULE, NAME, P, G)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME##_##P##_##G(                                            \
        const __grid_constant__ Table table, const Control *control, const Param *params,                              \
        const Coefficients *coefficients) {                                                                            \
        update<RULE, P, G, false>(table, control, params, coefficients, nullptr, false);                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME##_##P##_##G##_full(                                     \
        const __grid_constant__ Table table, const Control *control, const Param *params,                              \
        const Coefficients *coefficients, double *partials, uint32_t measures) {                                       \
        update<RULE, P, G, true>(table, control, params, coefficients, partials, measures != 0);                       \
    }

#define UPDATES(RULE, NAME)                                                                                            \
    UPDATE(RULE, NAME, f32, f32)                                                                                       \
    UPDATE(RULE, NAME, bf16, bf16)                                                                                     \
    UPDATE(RULE, NAME, bf16, f32)                                                                                      \
    UPDATE(RULE, NAME, f16, f16)                                                                                       \
    UPDATE(RULE, NAME, f16, f32)

UPDATES(ADAMW, adamw)
UPDATES(SGD, sgd)
UPDATES(LION, lion)

// The sum of squares of a chunk, in f64: the largest f32 squared is no infinity there.
template <typename G>
__device__ __forceinline__ void squares(const Table &table, const Param *params, double *partials) {
    constexpr int W = 16 / sizeof(G), BATCH = 4;
    const uint32_t entry = entry_of(table, blockIdx.x);
    const uint32_t block = blockIdx.x - table.first[entry];
    const Param &param = params[table.tensor[entry]];
    const uint64_t start = static_cast<uint64_t>(block) * CHUNK;
    const int len = static_cast<int>(min(static_cast<uint64_t>(CHUNK), param.elements - start));
    const G *g = reinterpret_cast<const G *>(table.g[entry]) + start;
    double sum[1] = {0.0};
    const int vectors = is_aligned(g) ? len / W : 0;
    for (int v = threadIdx.x; v < vectors; v += THREADS * BATCH) {
        Run<G, W> run[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
            if (v + k * THREADS < vectors) run[k].load(g + (v + k * THREADS) * W);
        }
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
            if (v + k * THREADS < vectors) {
#pragma unroll
                for (int n = 0; n < W; ++n) {
                    const double x = to_float(run[k].v[n]);
                    sum[0] = fma(x, x, sum[0]); // x * x is exact
                }
            }
        }
    }
    for (int i = vectors * W + threadIdx.x; i < len; i += THREADS) {
        const double x = to_float(g[i]);
        sum[0] = fma(x, x, sum[0]);
    }
    block_sum(sum);
    if (threadIdx.x == 0) partials[param.chunk + block] = sum[0];
}

// How many elements of a chunk of an AdamW update will have the sign of their gradient.
template <typename G>
__device__ __forceinline__ void aligned(const Table &table, const Control *control, const Param *params,
                                        const Coefficients *coefficients, double *partials) {
    if (!control->apply) return;
    constexpr int W = 16 / sizeof(G);
    const uint32_t entry = entry_of(table, blockIdx.x);
    const uint32_t tensor = table.tensor[entry], block = blockIdx.x - table.first[entry];
    const Param &param = params[tensor];
    const Coefficients c = coefficients[tensor];
    const uint64_t start = static_cast<uint64_t>(block) * CHUNK;
    const int len = static_cast<int>(min(static_cast<uint64_t>(CHUNK), param.elements - start));
    const G *g = reinterpret_cast<const G *>(table.g[entry]) + start;
    const float *m = reinterpret_cast<const float *>(param.state[0]) + start;
    int count = 0;
    const auto look = [&](float g, float m) { count += has_sign_of_gradient(c, g, m); };
    const int vectors = is_aligned(g) && is_aligned(m) ? len / W : 0;
    for (int v = threadIdx.x; v < vectors; v += THREADS) {
        Run<G, W> gv;
        Run<float, W> mv;
        gv.load(g + v * W);
        mv.load(m + v * W);
#pragma unroll
        for (int k = 0; k < W; ++k) look(to_float(gv.v[k]), mv.v[k]);
    }
    for (int i = vectors * W + threadIdx.x; i < len; i += THREADS) look(to_float(g[i]), m[i]);
    double sum[1] = {static_cast<double>(count)};
    block_sum(sum);
    if (threadIdx.x == 0) partials[param.chunk + block] = sum[0];
}

// Whether each row has a gradient: a warp a row, 8 rows a block.
template <typename G> __device__ __forceinline__ void rows(const Table &table, const Param *params) {
    const uint32_t entry = entry_of(table, blockIdx.x);
    const Param &param = params[table.tensor[entry]];
    const uint64_t row = static_cast<uint64_t>(blockIdx.x - table.first[entry]) * (THREADS / 32) + threadIdx.x / 32;
    if (row * param.row >= param.elements) return;
    const G *g = reinterpret_cast<const G *>(table.g[entry]) + row * param.row;
    bool moves = false;
    for (uint32_t i = threadIdx.x % 32; i < param.row && !moves; i += 32) moves = to_float(g[i]) != 0.0f;
    const bool any = __any_sync(0xffffffffu, moves);
    if (threadIdx.x % 32 == 0) reinterpret_cast<uint8_t *>(param.rows)[row] = any;
}

#define PASSES(G)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        squares_##G(const __grid_constant__ Table table, const Param *params, double *partials) {                      \
        squares<G>(table, params, partials);                                                                           \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        aligned_##G(const __grid_constant__ Table table, const Control *control, const Param *params,                  \
                    const Coefficients *coefficients, double *partials) {                                              \
        aligned<G>(table, control, params, coefficients, partials);                                                    \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        rows_##G(const __grid_constant__ Table table, const Param *params) {                                           \
        rows<G>(table, params);                                                                                        \
    }

PASSES(f32)
PASSES(bf16)
PASSES(f16)
