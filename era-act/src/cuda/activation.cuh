// The activations and their slopes at one point, by the same stable forms as src/pointwise.
//
// In f32 everything is within a few units in the last place. For half types (FAST) the approximate exp2, log2 and
// reciprocal of the hardware are enough: their errors are far below a rounding of the result. Compiled without
// contraction: a fused multiply-add stands where it is written, so that strength 0 and gamma 0 give the bits of SiLU and
// GELU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;
typedef __half f16;
typedef float f32;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

// N elements that are read and written at once; pointers must be aligned to the whole vector.
template <typename T, int N> struct alignas(sizeof(T) * N) Vec {
    T v[N];
};

template <typename T, int N> __device__ __forceinline__ Vec<T, N> load(const T *p) {
    return *reinterpret_cast<const Vec<T, N> *>(p);
}

template <typename T, int N> __device__ __forceinline__ void store(T *p, const Vec<T, N> &x) {
    *reinterpret_cast<Vec<T, N> *>(p) = x;
}

// How many elements 16 bytes hold.
template <typename T> constexpr int WIDE = 16 / sizeof(T);

enum Kind { GATE_ENTROPY, GELU_SOFTPLUS, SILU, GELU_TANH, GELU, RELU, RELU_SQUARED };

// What every kernel gets; sizes first.
struct Params {
    uint64_t n;      // elements, or rows of the gated form
    uint32_t width;  // of gate and of up, in the gated form
    float a;         // GATE_ENTROPY: 1 / temperature; GELU_SOFTPLUS: gamma
    float a_low;     // GATE_ENTROPY: what rounding left of 1 / temperature
    float b;         // GATE_ENTROPY: strength
};
static_assert(sizeof(Params) == 24, "the Rust side has the same layout");

constexpr float LARGEST = 3.402823466e38f;
// From here on exp(-x) is 0; beyond it only the sign of a number counts where a factor is 0 or 1.
constexpr float CUTOFF = 104.0f;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// The smaller and the larger one; NaN stays NaN, which fminf and fmaxf drop.
__device__ __forceinline__ float at_most(float x, float bound) {
#if __CUDA_ARCH__ >= 800
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
    return y;
#else
    return x > bound ? bound : x;
#endif
}
__device__ __forceinline__ float at_least(float x, float bound) {
#if __CUDA_ARCH__ >= 800
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
    return y;
#else
    return x < bound ? bound : x;
#endif
}

__device__ __forceinline__ float hold(float x) { return at_least(at_most(x, CUTOFF), -CUTOFF); }

// x gate, with the limit 0 rather than NaN where x is minus infinity and the gate is 0
__device__ __forceinline__ float gated(float x, float gate) { return at_least(x, -LARGEST) * gate; }

__device__ __forceinline__ float approximate_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x for x from 1 to 1e4
template <bool FAST> __device__ __forceinline__ float reciprocal(float x) {
    const float y = approximate_reciprocal(x);
    return FAST ? y : __fmaf_rn(y, __fmaf_rn(-x, y, 1.0f), y);
}

// exp(-a) for a from 0 on
template <bool FAST> __device__ __forceinline__ float exp_neg(float a) {
    if (!FAST) return expf(-a);
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a * -LOG2_E));
    return y;
}

__device__ __forceinline__ float approximate_log(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y * LN_2;
}

// ln(1 + e) for e from 0 to 1. FAST it has a small absolute error.
template <bool FAST> __device__ __forceinline__ float ln_1p(float e) {
    if (FAST) return approximate_log(1.0f + e);
    const float s = e * reciprocal<false>(2.0f + e), w = s * s;
    float p = 0.2322433f;
    p = __fmaf_rn(p, w, 0.21706576f);
    p = __fmaf_rn(p, w, 0.28592357f);
    p = __fmaf_rn(p, w, 0.39999706f);
    p = __fmaf_rn(p, w, 0.6666667f);
    // e - s (e - w p): the rounding of s counts against the small second term alone
    return __fmaf_rn(-s, __fmaf_rn(-w, p, e), e);
}

// The same with a small relative error; FAST by a polynomial (8e-6), since the logarithm takes as long as eight of its steps.
template <bool FAST> __device__ __forceinline__ float ln_1p_relative(float e) {
    if (!FAST) return ln_1p<false>(e);
    float p = -0.02386916509f;
    p = __fmaf_rn(p, e, 0.1012223459f);
    p = __fmaf_rn(p, e, -0.2100487756f);
    p = __fmaf_rn(p, e, 0.3252067288f);
    p = __fmaf_rn(p, e, -0.4993613754f);
    p = __fmaf_rn(p, e, 0.9999915988f);
    return p * e;
}

struct Sigmoid {
    float magnitude;  // min(|z|, CUTOFF)
    float exp;        // exp(-|z|)
    float tail;       // sigmoid(-|z|)
    float value;
    float slope;
};

template <bool FAST> __device__ __forceinline__ Sigmoid sigmoid(float z) {
    Sigmoid s;
    s.magnitude = at_most(fabsf(z), CUTOFF);
    s.exp = exp_neg<FAST>(FAST ? fabsf(z) : s.magnitude);
    const float head = reciprocal<FAST>(1.0f + s.exp);
    s.tail = s.exp * head;
    s.value = z < 0 ? s.tail : head;
    s.slope = s.tail * head;
    return s;
}

// 1 / (1 + 2^w) in few steps: where 2^w overflows, its reciprocal is 0.
__device__ __forceinline__ Sigmoid fast_sigmoid(float w) {
    Sigmoid s;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(s.exp) : "f"(w));
    s.value = approximate_reciprocal(1.0f + s.exp);
    s.slope = __fmaf_rn(-s.value, s.value, s.value);
    return s;
}

struct Point {
    float value, slope;
    float by_a, by_b;  // derivatives in the trained parameters: temperature and strength, or gamma
};

// With what the compiler finds unused left out.
template <Kind K, bool FAST> __device__ __forceinline__ Point at(float x, const Params &p) {
    Point y;
    y.by_a = y.by_b = 0.0f;
    if constexpr (K == GATE_ENTROPY) {
        const float finite = at_most(at_least(x, -LARGEST), LARGEST);
        const float z = FAST ? finite * p.a : __fmaf_rn(finite, p.a_low, finite * p.a);
        const Sigmoid s = sigmoid<FAST>(z);
        const float held = hold(z);
        const float entropy = __fmaf_rn(s.magnitude, s.tail, ln_1p<FAST>(s.exp));
        const float factor = __fmaf_rn(p.b, entropy, 1.0f);
        const float rest = __fmaf_rn(-p.b, held * s.value, factor);
        const float value = gated(x, s.value);
        y.value = value * factor;
        y.slope = __fmaf_rn(held * s.slope, rest, s.value * factor);
        y.by_a = -(held * (held * s.slope)) * rest;
        y.by_b = value * entropy;
    } else if constexpr (K == GELU_SOFTPLUS) {
        const Point g = at<GELU_TANH, FAST>(x, p);
        const Sigmoid s = sigmoid<FAST>(x);
        const float softplus = at_least(x, 0.0f) + ln_1p_relative<FAST>(s.exp);
        y.value = __fmaf_rn(p.a, softplus, g.value);
        y.slope = __fmaf_rn(p.a, s.value, g.slope);
        y.by_a = softplus;
    } else if constexpr (K == SILU) {
        const Sigmoid s = sigmoid<FAST>(x);
        y.value = gated(x, s.value);
        y.slope = s.value + hold(x) * s.slope;
    } else if constexpr (K == GELU_TANH) {
        constexpr float SCALE = 1.5957691216057307f, CUBIC = 0.044715f;  // SCALE = 2 sqrt(2 / pi)
        Sigmoid s;
        if constexpr (FAST)
            s = fast_sigmoid(x * __fmaf_rn(-SCALE * CUBIC * LOG2_E, x * x, -SCALE * LOG2_E));
        else
            s = sigmoid<false>(SCALE * x * __fmaf_rn(CUBIC, x * x, 1.0f));
        const float held = hold(x);
        const float du = SCALE * __fmaf_rn(3.0f * CUBIC, held * held, 1.0f);
        y.value = gated(x, s.value);
        y.slope = __fmaf_rn(held, s.slope * du, s.value);
    } else if constexpr (K == GELU) {
        float exp, tail;
        if constexpr (FAST) {
            // Phi(-|x|) = exp(-x^2 / 2) t R(t), t = 1 / (1 + .3 |x|): R is fitted to a relative error of 8e-6.
            const float size = at_most(fabsf(x), CUTOFF);
            asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(exp) : "f"(size * size * (-0.5f * LOG2_E)));
            const float t = approximate_reciprocal(__fmaf_rn(0.3f, size, 1.0f));
            float series = -0.07750699583f;
            series = __fmaf_rn(series, t, 0.2172683862f);
            series = __fmaf_rn(series, t, -0.0183551731f);
            series = __fmaf_rn(series, t, 0.1449548607f);
            series = __fmaf_rn(series, t, 0.1135504555f);
            series = __fmaf_rn(series, t, 0.1200922333f);
            tail = exp * t * series;
        } else {
            // Phi(-|x|) = exp(-z^2) series((z - 3.75) / (z + 3.75)) / (2 (1 + 2 z)), z = |x| / sqrt 2: the series of
            // src/real.rs in powers.
            const float z = at_most(fabsf(x), CUTOFF) * 0.7071067811865476f;
            exp = exp_neg<false>(at_most(z * z, CUTOFF));
            const float t = (z - 3.75f) * reciprocal<false>(z + 3.75f);
            float series = -0.0002241167467f;
            series = __fmaf_rn(series, t, 0.000396307613f);
            series = __fmaf_rn(series, t, 0.001675912218f);
            series = __fmaf_rn(series, t, -0.00984449486f);
            series = __fmaf_rn(series, t, 0.02840925236f);
            series = __fmaf_rn(series, t, -0.05864685874f);
            series = __fmaf_rn(series, t, 0.09229076959f);
            series = __fmaf_rn(series, t, -0.1088142701f);
            series = __fmaf_rn(series, t, 0.08227841998f);
            series = __fmaf_rn(series, t, 0.003586270394f);
            series = __fmaf_rn(series, t, -0.1402406583f);
            series = __fmaf_rn(series, t, 1.237512619f);
            tail = 0.5f * exp * series * reciprocal<false>(__fmaf_rn(2.0f, z, 1.0f));
        }
        const float phi = x < 0 ? tail : 1.0f - tail;
        y.value = gated(x, phi);
        y.slope = __fmaf_rn(hold(x) * exp, 0.3989422804014327f, phi);
    } else if constexpr (K == RELU) {
        y.value = at_least(x, 0.0f);
        y.slope = x <= 0 ? 0.0f : 1.0f;
    } else {
        const float positive = at_least(x, 0.0f);
        y.value = positive * positive;
        y.slope = 2.0f * positive;
    }
    return y;
}

// Whether to use the fast functions for a storage type.
template <typename T> constexpr bool IS_HALF = sizeof(T) == 2;
