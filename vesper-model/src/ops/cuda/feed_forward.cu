// The gated activation, act(gate) * up, over rows [gate | up], and its gradient: rows [dy up act'(gate) | dy act(gate)].
//
// The activations are those of the crate era-act, by the same stable forms. In half types the fast versions of exp,
// log and the division are enough: their errors are far below a rounding of the result.

#include "common.cuh"

enum Kind : uint32_t {
    GATE_ENTROPY = 0,   // a = 1 / temperature, b = strength
    GELU_SOFTPLUS = 1,  // a = gamma
    SILU = 2,
    GELU_TANH = 3,
    GELU = 4,
    RELU = 5,
    RELU_SQUARED = 6,
};

struct GatedParams {
    uint64_t rows;
    uint32_t width;  // of gate, and of up
    uint32_t kind;
    float a, b;
};
static_assert(sizeof(GatedParams) == 24, "the Rust side has the same layout");

template <bool FAST> __device__ __forceinline__ float exponential(float x) { return FAST ? __expf(x) : expf(x); }
template <bool FAST> __device__ __forceinline__ float log_1p(float x) {
    return FAST ? __logf(1.0f + x) : log1pf(x);
}
template <bool FAST> __device__ __forceinline__ float inverse(float x) {
    return FAST ? __fdividef(1.0f, x) : 1.0f / x;
}

// From here on exp(-x) is 0; beyond it only the sign of a number counts where a factor is 0 or 1.
constexpr float CUTOFF = 104.0f;

__device__ __forceinline__ float hold(float x) {
    // fminf and fmaxf drop NaN, which has to stay
    return x != x ? x : fminf(fmaxf(x, -CUTOFF), CUTOFF);
}

// x gate, with the limit 0 rather than NaN where x is minus infinity and the gate is 0
__device__ __forceinline__ float gated(float x, float gate) { return (x < -3.402823466e38f ? -3.402823466e38f : x) * gate; }

struct Sigmoid {
    float magnitude;  // min(|z|, CUTOFF)
    float exp;        // exp(-|z|)
    float tail;       // sigmoid(-|z|)
    float value;
    float slope;
};

template <bool FAST> __device__ __forceinline__ Sigmoid sigmoid(float z) {
    Sigmoid s;
    s.magnitude = fabsf(hold(z));
    s.exp = exponential<FAST>(-s.magnitude);
    const float head = inverse<FAST>(1.0f + s.exp);
    s.tail = s.exp * head;
    s.value = z < 0 ? s.tail : head;
    s.slope = s.tail * head;
    return s;
}

struct ValueAndSlope {
    float value, slope;
};

template <bool FAST> __device__ __forceinline__ ValueAndSlope gelu_tanh(float x) {
    constexpr float SCALE = 1.5957691216057307f, CUBIC = 0.044715f;  // SCALE = 2 sqrt(2 / pi)
    const Sigmoid s = sigmoid<FAST>(SCALE * x * (1.0f + CUBIC * (x * x)));
    const float held = hold(x);
    const float du = SCALE * (1.0f + 3.0f * CUBIC * (held * held));
    return {gated(x, s.value), s.value + held * (s.slope * du)};
}

template <bool FAST> __device__ __forceinline__ ValueAndSlope activate(uint32_t kind, float a, float b, float x) {
    switch (kind) {
    case GATE_ENTROPY: {
        const float z = x * a;
        const Sigmoid s = sigmoid<FAST>(z);
        const float held = hold(z);
        const float entropy = log_1p<FAST>(s.exp) + s.magnitude * s.tail;
        const float factor = 1.0f + b * entropy;
        return {gated(x, s.value) * factor, s.value * factor + held * s.slope * (factor - b * (held * s.value))};
    }
    case GELU_SOFTPLUS: {
        const Sigmoid s = sigmoid<FAST>(x);
        const float softplus = (x < 0 ? 0.0f : x) + log_1p<FAST>(s.exp);
        const ValueAndSlope g = gelu_tanh<FAST>(x);
        return {g.value + a * softplus, g.slope + a * s.value};
    }
    case SILU: {
        const Sigmoid s = sigmoid<FAST>(x);
        return {gated(x, s.value), s.value + hold(x) * s.slope};
    }
    case GELU_TANH:
        return gelu_tanh<FAST>(x);
    case GELU: {
        const float phi = normcdff(x), held = hold(x);
        return {gated(x, phi), phi + held * exponential<FAST>(-0.5f * held * held) * 0.3989422804014327f};
    }
    case RELU:
        return {x < 0 ? 0.0f : x, x <= 0 ? 0.0f : 1.0f};
    default: {
        const float positive = x < 0 ? 0.0f : x;
        return {positive * positive, 2.0f * positive};
    }
    }
}

// Threads of a block go over columns, blocks of one column over rows.
template <typename T, int V> __device__ void forward(const T *packed, T *y, GatedParams p) {
    constexpr bool FAST = sizeof(T) == 2;
    const uint32_t column = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (column >= p.width) return;
    for (uint64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const T *gate = packed + row * 2 * p.width + column;
        const Vec<T, V> g = load<T, V>(gate), u = load<T, V>(gate + p.width);
        Vec<T, V> out;
#pragma unroll
        for (int k = 0; k < V; k++)
            out.v[k] = from_float<T>(activate<FAST>(p.kind, p.a, p.b, to_float(g.v[k])).value * to_float(u.v[k]));
        store<T, V>(y + row * p.width + column, out);
    }
}

// inner: act(gate) * up once more, for the gradient of the matrix that follows; or null.
template <typename T, int V>
__device__ void backward(const T *packed, const T *dy, T *dpacked, T *inner, GatedParams p) {
    constexpr bool FAST = sizeof(T) == 2;
    const uint32_t column = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (column >= p.width) return;
    for (uint64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const T *gate = packed + row * 2 * p.width + column;
        const Vec<T, V> g = load<T, V>(gate), u = load<T, V>(gate + p.width);
        const Vec<T, V> d = load<T, V>(dy + row * p.width + column);
        Vec<T, V> dgate, dup, value;
#pragma unroll
        for (int k = 0; k < V; k++) {
            const ValueAndSlope f = activate<FAST>(p.kind, p.a, p.b, to_float(g.v[k]));
            const float up = to_float(u.v[k]), dv = to_float(d.v[k]);
            dgate.v[k] = from_float<T>(dv * up * f.slope);
            dup.v[k] = from_float<T>(dv * f.value);
            value.v[k] = from_float<T>(f.value * up);
        }
        T *to = dpacked + row * 2 * p.width + column;
        store<T, V>(to, dgate);
        store<T, V>(to + p.width, dup);
        if (inner) store<T, V>(inner + row * p.width + column, value);
    }
}

#define KERNELS(T, NAME, V)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        gated_forward_##T##_##NAME(const T *packed, T *y, GatedParams p) {                                             \
        forward<T, V>(packed, y, p);                                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        gated_backward_##T##_##NAME(const T *packed, const T *dy, T *dpacked, T *inner, GatedParams p) {               \
        backward<T, V>(packed, dy, dpacked, inner, p);                                                                 \
    }

KERNELS(f32, wide, WIDE<f32>)
KERNELS(f32, single, 1)
KERNELS(bf16, wide, WIDE<bf16>)
KERNELS(bf16, single, 1)
KERNELS(f16, wide, WIDE<f16>)
KERNELS(f16, single, 1)
