// The update of parameters whose state is in blocks of 8 bits: state is read, updated and made into codes again in one pass,
// and is never in memory in any other form. Codes and scales are those of src/quantised.rs, bit for bit.
//
// The floor is memory: 16 bytes a parameter for AdamW in f32, 10 in bf16. A warp takes a block of 256 elements at a time, so
// that the block's largest element is found without waiting for other warps.
#include "update.cuh"

// Elements that share a scale.
constexpr int BLOCK = 256;
// Elements a thread has of a block.
constexpr int LANE = BLOCK / 32;
constexpr int BINADES = 32;

// What is known of signed or unsigned codes: see code_tables.
struct Codes {
    float values[256];
    float4 lines[BINADES];
};

struct Tables {
    Codes first; // signed
    Codes second;
};
static_assert(sizeof(Tables) == 2 * (256 + 4 * BINADES) * sizeof(float), "as code_tables writes it");

constexpr uint8_t ZERO = 128; // the code of 0 among signed ones; among others it is 0

__device__ __forceinline__ void copy(Tables &to, const Tables *from) {
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(Tables) / 16); i += THREADS) {
        reinterpret_cast<uint4 *>(&to)[i] = reinterpret_cast<const uint4 *>(from)[i];
    }
    __syncthreads();
}

__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xffffffffu, x);
#else
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
#endif
}

// The first `count` of a thread's elements, and `none` for the others.
template <typename T>
__device__ __forceinline__ void load(Run<T, LANE> &run, const T *p, int count, bool wide, T none) {
    if (wide && count == LANE) {
        run.load(p);
    } else {
#pragma unroll
        for (int k = 0; k < LANE; ++k) run.v[k] = k < count ? p[k] : none;
    }
}

template <typename T> __device__ __forceinline__ void store(const Run<T, LANE> &run, T *p, int count, bool wide) {
    if (wide && count == LANE) {
        run.store(p);
    } else {
#pragma unroll
        for (int k = 0; k < LANE; ++k) {
            if (k < count) p[k] = run.v[k];
        }
    }
}

__device__ __forceinline__ void dequantise(const Codes &codes, const Run<uint8_t, LANE> &run, float scale,
                                           float (&x)[LANE]) {
#pragma unroll
    for (int k = 0; k < LANE; ++k) x[k] = codes.values[run.v[k]] * scale;
}

// k(y), rounded; y is in [0, 1].
__device__ __forceinline__ uint32_t nearest(const Codes &codes, float y) {
    const float4 line = codes.lines[min(127 - static_cast<int>(__float_as_uint(y) >> 23), BINADES - 1)];
    const float k = fminf(line.x * y + line.y, line.z * y + line.w);
    return __float_as_uint(k + 8388608.0f) & 0xffu; // 2^23: rounds to nearest even
}

// The codes of a thread's elements of a block; every thread of the warp gets the scale.
template <bool SIGNED>
__device__ __forceinline__ float quantise(const Codes &codes, const float (&x)[LANE], Run<uint8_t, LANE> &run) {
    uint32_t largest = 0;
#pragma unroll
    for (int k = 0; k < LANE; ++k) largest = max(largest, __float_as_uint(x[k]) & 0x7fffffffu);
    largest = warp_max(largest);
    if (largest == 0 || largest >= 0x7f800000u) {
#pragma unroll
        for (int k = 0; k < LANE; ++k) run.v[k] = SIGNED ? ZERO : 0;
        return largest == 0 ? 0.0f : __uint_as_float(0x7fc00000u);
    }
    const float scale = __uint_as_float(largest);
    const auto code = [&](float x, float y) -> uint8_t {
        const uint32_t k = nearest(codes, y);
        if (SIGNED) return static_cast<uint8_t>(ZERO + (x < 0.0f ? -k : k));
        return static_cast<uint8_t>(max(k, static_cast<uint32_t>(x > 0.0f)));
    };
    const auto magnitude = [](float x) { return SIGNED ? fabsf(x) : fmaxf(x, 0.0f); };
    if (scale >= 0x1p-60f && scale <= 0x1p100f) {
        // x / scale by the reciprocal, corrected twice, which makes it the rounded quotient: the first correction leaves an
        // error of less than one unit in the last place, and the second rounds (Markstein, "Computation of elementary
        // functions on the IBM RISC System/6000 processor"). Remainders are exact but for quotients under 2^-30, whose code
        // is the least in any case.
        const float inverse = 1.0f / scale;
#pragma unroll
        for (int k = 0; k < LANE; ++k) {
            const float a = magnitude(x[k]);
            float y = a * inverse;
            y = fmaf(fmaf(-y, scale, a), inverse, y);
            y = fmaf(fmaf(-y, scale, a), inverse, y);
            run.v[k] = code(x[k], y);
        }
    } else {
#pragma unroll
        for (int k = 0; k < LANE; ++k) run.v[k] = code(x[k], magnitude(x[k]) / scale);
    }
    return scale;
}

// FULL has what most updates do without: master copies, stochastic rounding, and measuring.
template <uint32_t RULE, typename P, typename G, bool FULL>
__device__ __forceinline__ void update(const Table &table, const Control *control, const Param *params,
                                       const Coefficients *coefficients, const Tables *tables, double *partials,
                                       bool measures) {
    if (!control->apply) return;
    constexpr bool TWO = RULE == ADAMW;
    __shared__ Tables codes;
    copy(codes, tables);
    const uint32_t entry = entry_of(table, blockIdx.x);
    const uint32_t tensor = table.tensor[entry], block = blockIdx.x - table.first[entry];
    const Param &param = params[tensor];
    const Coefficients c = coefficients[tensor];
    const uint64_t start = static_cast<uint64_t>(block) * CHUNK;
    const int len = static_cast<int>(min(static_cast<uint64_t>(CHUNK), param.elements - start));
    P *p = reinterpret_cast<P *>(table.p[entry]) + start;
    const G *g = reinterpret_cast<const G *>(table.g[entry]) + start;
    uint8_t *a = reinterpret_cast<uint8_t *>(param.state[0]) + start;
    uint8_t *b = TWO ? reinterpret_cast<uint8_t *>(param.state[1]) + start : nullptr;
    float *a_scales = reinterpret_cast<float *>(param.scales[0]) + start / BLOCK;
    float *b_scales = TWO ? reinterpret_cast<float *>(param.scales[1]) + start / BLOCK : nullptr;
    float *master = FULL && param.master ? reinterpret_cast<float *>(param.master) + start : nullptr;
    double sums[3] = {0.0, 0.0, 0.0};

    const bool wide = is_aligned(p) && is_aligned(g) && is_aligned(a) && (!TWO || is_aligned(b)) &&
                      (!FULL || !master || is_aligned(master));
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int q = warp; q * BLOCK < len; q += THREADS / 32) {
        const int i = q * BLOCK + lane * LANE;
        const int count = min(max(len - i, 0), LANE);
        Run<P, LANE> pv;
        Run<G, LANE> gv;
        Run<float, LANE> mv;
        Run<uint8_t, LANE> ac, bc;
        float av[LANE], bv[LANE];
        load(gv, g + i, count, wide, from_float<G>(0.0f));
        load(ac, a + i, count, wide, ZERO);
        if constexpr (TWO) load(bc, b + i, count, wide, static_cast<uint8_t>(0));
        if (FULL && master) {
            load(mv, master + i, count, wide, 0.0f);
        } else {
            load(pv, p + i, count, wide, from_float<P>(0.0f));
        }
        dequantise(codes.first, ac, a_scales[q], av);
        if constexpr (TWO) dequantise(codes.second, bc, b_scales[q], bv);
#pragma unroll
        for (int k = 0; k < LANE; ++k) {
            float x = FULL && master ? mv.v[k] : to_float(pv.v[k]);
            const float before = x, gradient = to_float(gv.v[k]);
            float none = 0.0f;
            update_element<RULE>(c, x, gradient, av[k], TWO ? bv[k] : none);
            if (FULL && measures && k < count) measure(sums, before, x, gradient);
            if (FULL && master) mv.v[k] = x;
            pv.v[k] = FULL ? stored<P>(c, x, start + i + k) : from_float<P>(x);
        }
        store(pv, p + i, count, wide);
        if (FULL && master) store(mv, master + i, count, wide);
        const float a_scale = quantise<true>(codes.first, av, ac);
        store(ac, a + i, count, wide);
        if (lane == 0) a_scales[q] = a_scale;
        if constexpr (TWO) {
            const float b_scale = quantise<false>(codes.second, bv, bc);
            store(bc, b + i, count, wide);
            if (lane == 0) b_scales[q] = b_scale;
        }
    }
    if (FULL && measures) {
        block_sum(sums);
        if (threadIdx.x == 0) {
            double *out = partials + 3 * static_cast<size_t>(param.chunk + block);
            for (int n = 0; n < 3; ++n) out[n] = sums[n];
        }
    }
}

#define KERNEL(RULE, NAME, P, G, FULL)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        NAME(const __grid_constant__ Table table, const Control *control, const Param *params,                         \
             const Coefficients *coefficients, const Tables *tables, double *partials, uint32_t measures) {            \
        update<RULE, P, G, FULL>(table, control, params, coefficients, tables, partials, measures != 0);               \
    }

#define UPDATE(RULE, NAME, P, G)                                                                                       \
    KERNEL(RULE, NAME##_##P##_##G, P, G, false)                                                                        \
    KERNEL(RULE, NAME##_##P##_##G##_full, P, G, true)

#define UPDATES(RULE, NAME)                                                                                            \
    UPDATE(RULE, NAME, f32, f32)                                                                                       \
    UPDATE(RULE, NAME, bf16, bf16)                                                                                     \
    UPDATE(RULE, NAME, bf16, f32)                                                                                      \
    UPDATE(RULE, NAME, f16, f16)                                                                                       \
    UPDATE(RULE, NAME, f16, f32)

UPDATES(ADAMW, adamw8)
UPDATES(SGD, sgd8)
UPDATES(LION, lion8)

// How many elements of a chunk of an AdamW update will have the sign of their gradient: as aligned in elementwise.cu.
template <typename G>
__device__ __forceinline__ void aligned(const Table &table, const Control *control, const Param *params,
                                        const Coefficients *coefficients, const Tables *tables, double *partials) {
    if (!control->apply) return;
    __shared__ Tables codes;
    copy(codes, tables);
    const uint32_t entry = entry_of(table, blockIdx.x);
    const uint32_t tensor = table.tensor[entry], block = blockIdx.x - table.first[entry];
    const Param &param = params[tensor];
    const Coefficients c = coefficients[tensor];
    const uint64_t start = static_cast<uint64_t>(block) * CHUNK;
    const int len = static_cast<int>(min(static_cast<uint64_t>(CHUNK), param.elements - start));
    const G *g = reinterpret_cast<const G *>(table.g[entry]) + start;
    const uint8_t *m = reinterpret_cast<const uint8_t *>(param.state[0]) + start;
    const float *scales = reinterpret_cast<const float *>(param.scales[0]) + start / BLOCK;
    const bool wide = is_aligned(g) && is_aligned(m);
    int same = 0;
    for (int i = threadIdx.x * LANE; i < len; i += THREADS * LANE) {
        const int count = min(len - i, LANE);
        Run<G, LANE> gv;
        Run<uint8_t, LANE> mc;
        float mv[LANE];
        load(gv, g + i, count, wide, from_float<G>(0.0f));
        load(mc, m + i, count, wide, ZERO);
        dequantise(codes.first, mc, scales[i / BLOCK], mv);
#pragma unroll
        for (int k = 0; k < LANE; ++k) same += k < count && has_sign_of_gradient(c, to_float(gv.v[k]), mv[k]);
    }
    double sum[1] = {static_cast<double>(same)};
    block_sum(sum);
    if (threadIdx.x == 0) partials[param.chunk + block] = sum[0];
}

#define ALIGNED(G)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        aligned8_##G(const __grid_constant__ Table table, const Control *control, const Param *params,                 \
                     const Coefficients *coefficients, const Tables *tables, double *partials) {                       \
        aligned<G>(table, control, params, coefficients, tables, partials);                                            \
    }

ALIGNED(f32)
ALIGNED(bf16)
ALIGNED(f16)
