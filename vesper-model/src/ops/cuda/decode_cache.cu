// What of a decoding step reads no matrix: the attention over the cache, and the choice of the next token.

#include "decode.cuh"

#define ATTENTION(T, NAME, V)                                                                                          \
    extern "C" __global__ void decode_attention_##T##_##NAME(const float *q, const T *cache, const uint32_t *position, \
                                                             float *part, float2 *share, DecodeParams p) {             \
        attention<T, V>(q, cache, position, part, share, p);                                                           \
    }

ATTENTION(f32, wide, WIDE<f32>)
ATTENTION(f32, single, 1)
ATTENTION(bf16, wide, WIDE<bf16>)
ATTENTION(bf16, single, 1)
ATTENTION(f16, wide, WIDE<f16>)
ATTENTION(f16, single, 1)

extern "C" __global__ void decode_next(const Best *best, const uint32_t *active, uint32_t *token, uint32_t *position,
                                       uint32_t *log, DecodeParams p) {
    next(best, active, token, position, log, p);
}
