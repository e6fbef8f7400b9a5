// Matrices in blocks of q8_0.

#include "decode.cuh"
#include "decode_blocks.cuh"

FORMAT(Q8_0, q8_0)
