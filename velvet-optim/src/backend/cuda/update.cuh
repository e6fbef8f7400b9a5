// One element's update under each rule, as src/rule/*.rs has it, and how new values are rounded.
#pragma once

#include "common.cuh"

// p, g and the state arrays a and b of one element.
template <uint32_t RULE>
__device__ __forceinline__ void update_element(const Coefficients &c, float &p, float g, float &a, float &b) {
    g = g * c.clip;
    if constexpr (RULE == ADAMW) {
        a = a + (g - a) * c.first_weight;
        b = b * c.past + g * c.fresh * g;
        const float denominator = sqrtf(b) * c.correction + c.eps;
        const float n = (c.options & NESTEROV) ? a * c.of_m + g * c.of_g : a;
        float u = n / denominator;
        if (c.options & (CAUTIOUS | CAUTIOUS_DECAY)) {
            const float aligned = (c.options & CAUTIOUS) ? c.scale : 1.0f;
            const float misaligned = (c.options & CAUTIOUS) ? 0.0f : 1.0f;
            const float other_keep = (c.options & CAUTIOUS_DECAY) ? 1.0f : c.keep;
            u = u * (n * g > 0.0f ? aligned : misaligned);
            p = p * (p * u > 0.0f ? c.keep : other_keep) - u * c.step_size;
        } else {
            p = p * c.keep - u * c.step_size;
        }
    } else {
        const float other_keep = (c.options & CAUTIOUS_DECAY) ? 1.0f : c.keep;
        float u;
        if constexpr (RULE == SGD) {
            a = a * c.past + g;
            u = a * c.of_m + g * c.of_g;
        } else {
            const float mixed = a * c.of_m + g * c.of_g;
            u = mixed > 0.0f ? 1.0f : mixed < 0.0f ? -1.0f : mixed;
        }
        p = p * (p * u > 0.0f ? c.keep : other_keep) - u * c.step_size;
        if constexpr (RULE == LION) a = a * c.past + g * c.fresh;
    }
}

// Whether the update of an element under AdamW, whose first moment is m before it, will have the sign of its gradient.
__device__ __forceinline__ bool has_sign_of_gradient(const Coefficients &c, float g, float m) {
    // Without Nesterov n is m itself, but the count is made with the weights 1 and 0, as on the CPU.
    const float of_m = (c.options & NESTEROV) ? c.of_m : 1.0f, of_g = (c.options & NESTEROV) ? c.of_g : 0.0f;
    g = g * c.clip;
    const float n = (m + (g - m) * c.first_weight) * of_m + g * of_g;
    return n * g > 0.0f;
}

// The random number of element i: see src/rounding.rs.
__device__ __forceinline__ uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

__device__ __forceinline__ uint32_t random_number(uint32_t key, uint64_t i) {
    const uint32_t k = mix(key ^ static_cast<uint32_t>(i >> 32));
    return mix(mix(static_cast<uint32_t>(i) + k) ^ key);
}

template <typename P> __device__ __forceinline__ P round_stochastically(float x, uint32_t random);

template <> __device__ __forceinline__ float round_stochastically<float>(float x, uint32_t) { return x; }

template <> __device__ __forceinline__ bf16 round_stochastically<bf16>(float x, uint32_t random) {
    const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
    const uint32_t sum = bits + (random >> 16);
    // A carry into the exponent of infinity is taken back.
    const uint32_t rounded = (sum & 0x7fffffffu) >= 0x7f800000u ? (bits & 0x80000000u) | 0x7f7f0000u : sum;
    const uint32_t special = magnitude > 0x7f800000u ? bits | 0x00400000u : bits;
    return __ushort_as_bfloat16(static_cast<uint16_t>((magnitude < 0x7f800000u ? rounded : special) >> 16));
}

template <> __device__ __forceinline__ f16 round_stochastically<f16>(float x, uint32_t random) {
    const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
    const uint32_t exponent = max(magnitude >> 23, 113u);
    const float y = __uint_as_float(magnitude) * __uint_as_float((264u - min(exponent, 254u)) << 23);
    const float nearest = (y + 8388608.0f) - 8388608.0f;
    const float floor = nearest > y ? nearest - 1.0f : nearest;
    const float part = static_cast<float>(static_cast<int>(random >> 8)) * (1.0f / 16777216.0f);
    const float q = part < y - floor ? floor + 1.0f : floor;
    const uint32_t low = __float_as_uint(q + 8388608.0f) & 0xfffu;
    const uint32_t rounded = min(((exponent - 113u) << 10) + low, 0x7bffu);
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u | ((bits >> 13) & 0x3ffu) : 0x7c00u;
    return __ushort_as_half(static_cast<uint16_t>((magnitude < 0x7f800000u ? rounded : special) | sign));
}

// The stored form of the new value of element i.
template <typename P> __device__ __forceinline__ P stored(const Coefficients &c, float x, uint64_t i) {
    if (c.options & STOCHASTIC) return round_stochastically<P>(x, random_number(c.key, i));
    return from_float<P>(x);
}

// The weight of an element that did not move is one of those that an update is measured against.
__device__ __forceinline__ void measure_weight(double (&sums)[3], float weight) {
    sums[1] += static_cast<double>(weight) * static_cast<double>(weight);
}

// What an update did to one element: sums of change^2, weight^2 and g * change.
__device__ __forceinline__ void measure(double (&sums)[3], float before, float after, float g) {
    const double moved = static_cast<double>(before) - static_cast<double>(after);
    sums[0] += moved * moved;
    measure_weight(sums, before);
    sums[2] += static_cast<double>(g) * moved;
}
