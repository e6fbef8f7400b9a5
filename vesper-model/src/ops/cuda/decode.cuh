// One token of each of a few rows through a decoder, over a cache: a kernel for each part of a block, so that a graph
// of them can be replayed for every token. What changes from token to token (positions, tokens) is in device memory.
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
// Products are as fast as the weights come from memory: a warp takes whole rows of them, a unit a lane at a time,
// several such loads before the first is used; the vectors lie in shared memory in f32. With B = 4, or 8 of plain
// numbers, the weights are read once for so many rows. All sums are in f32 and in an order that depends on the sizes
// alone; nothing is added atomically.
//
// Each matrix may be stored in a format of its own, see decode_rows.cuh; norms are in f32. The kernels of a format are
// in the file of its name, those that know of no matrix in decode_attention.cu and decode_next.cu.
#pragma once

#include "decode_attention.cuh"
#include "decode_block.cuh"
#include "decode_tokens.cuh"

#define PRODUCTS(F, NAME, B)                                                                                           \
    extern "C" __global__ void decode_qkv_##NAME##_##B(                                                                \
        const float *h, const float *norm, const uint8_t *weight, uint32_t from, uint32_t pairs, const float *cos,     \
        const float *sin, const uint32_t *position, float *q, void *cache, DecodeParams p) {                           \
        qkv<F, B>(h, norm, weight, from, pairs, cos, sin, position, q, cache, p);                                      \
    }                                                                                                                  \
    extern "C" __global__ void decode_output_##NAME##_##B(const float *part, const float2 *share,                      \
                                                          const uint8_t *weight, float *h, DecodeParams p) {           \
        output<F, B>(part, share, weight, h, p);                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void decode_gate_up_##NAME##_##B(const float *h, const float *norm, const uint8_t *weight,   \
                                                           float *inner, DecodeParams p) {                             \
        gate_up<F, B>(h, norm, weight, inner, p);                                                                      \
    }                                                                                                                  \
    extern "C" __global__ void decode_down_##NAME##_##B(const float *inner, const uint8_t *weight, float *h,           \
                                                        DecodeParams p) {                                              \
        down<F, B>(inner, weight, h, p);                                                                               \
    }                                                                                                                  \
    extern "C" __global__ void decode_head_##NAME##_##B(const float *h, const float *norm, const uint8_t *weight,      \
                                                        float *logits, float *hidden, Best *best, DecodeParams p) {    \
        head<F, B>(h, norm, weight, logits, hidden, best, p);                                                          \
    }

#define FORMAT(F, NAME)                                                                                                \
    extern "C" __global__ void decode_embed_##NAME(const uint8_t *table, const uint32_t *token, float *h,              \
                                                   DecodeParams p) {                                                   \
        embed<F>(table, token, h, p);                                                                                  \
    }                                                                                                                  \
    PRODUCTS(F, NAME, 1)                                                                                               \
    PRODUCTS(F, NAME, 4)
