// The attention of a decoding step over caches of each type.

#include "decode_attention.cuh"

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
