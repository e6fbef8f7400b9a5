// The choice of the next token.

#include "decode_tokens.cuh"

extern "C" __global__ void decode_next(const Best *best, const uint32_t *active, uint32_t *token, uint32_t *position,
                                       uint32_t *log, DecodeParams p) {
    next(best, active, token, position, log, p);
}
