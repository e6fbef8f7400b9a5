// One token of each of a few rows through a decoder, over a cache: a kernel for each part of a block, so that a graph of
// them can be replayed for every token. What changes from token to token (positions, tokens) is in device memory.
//
//     embed                       h = E[token]
//     qkv          of each block  q, cache = rope(W rms_norm(h))
//     attention                   a part of the cache's positions a thread block
//     output                      h += W attention, of the parts together
//     gate_up                     inner = act(G rms_norm(h)) * U rms_norm(h)
//     down                        h += W inner
//     head                        logits = E rms_norm(h), and each thread block's largest
//     next                        the largest of all becomes the row's token, its position goes on
//
// Products are as fast as the weights come from memory: a warp takes whole rows of them, 16 bytes a lane at a time, several
// such loads before the first is used; the vectors lie in shared memory in f32. With B = 4 or 8 the weights are read once
// for so many rows. All sums are in f32 and in an order that depends on the sizes alone; nothing is added atomically.
#pragma once

#include "decode_attention.cuh"
#include "decode_block.cuh"
#include "decode_tokens.cuh"

#define PRODUCTS(T, NAME, V, B)                                                                                        \
    extern "C" __global__ void decode_qkv_##T##_##NAME##_##B(                                                          \
        const float *h, const T *norm, const T *weight, const float *cos, const float *sin, const uint32_t *position,  \
        float *q, T *cache, DecodeParams p) {                                                                          \
        qkv<T, V, B>(h, norm, weight, cos, sin, position, q, cache, p);                                                \
    }                                                                                                                  \
    extern "C" __global__ void decode_output_##T##_##NAME##_##B(const float *part, const float2 *share,                \
                                                                const T *weight, float *h, DecodeParams p) {           \
        output<T, V, B>(part, share, weight, h, p);                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void decode_gate_up_##T##_##NAME##_##B(const float *h, const T *norm, const T *weight,       \
                                                                 float *inner, DecodeParams p) {                       \
        gate_up<T, V, B>(h, norm, weight, inner, p);                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void decode_down_##T##_##NAME##_##B(const float *inner, const T *weight, float *h,           \
                                                              DecodeParams p) {                                        \
        down<T, V, B>(inner, weight, h, p);                                                                            \
    }                                                                                                                  \
    extern "C" __global__ void decode_head_##T##_##NAME##_##B(const float *h, const T *norm, const T *weight,          \
                                                              float *logits, float *hidden, Best *best,                \
                                                              DecodeParams p) {                                        \
        head<T, V, B>(h, norm, weight, logits, hidden, best, p);                                                       \
    }

#define KERNELS(T, NAME, V)                                                                                            \
    PRODUCTS(T, NAME, V, 1)                                                                                            \
    PRODUCTS(T, NAME, V, 4)                                                                                            \
    PRODUCTS(T, NAME, V, 8)                                                                                            \
    extern "C" __global__ void decode_attention_##T##_##NAME(const float *q, const T *cache, const uint32_t *position, \
                                                             float *part, float2 *share, DecodeParams p) {             \
        attention<T, V>(q, cache, position, part, share, p);                                                           \
    }

#define TYPE(T)                                                                                                        \
    extern "C" __global__ void decode_embed_##T(const T *table, const uint32_t *token, float *h, DecodeParams p) {     \
        embed<T>(table, token, h, p);                                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void decode_next_##T(const Best *best, const uint32_t *active, uint32_t *token,              \
                                               uint32_t *position, uint32_t *log, DecodeParams p) {                    \
        next(best, active, token, position, log, p);                                                                   \
    }                                                                                                                  \
    KERNELS(T, wide, WIDE<T>)                                                                                          \
    KERNELS(T, single, 1)
