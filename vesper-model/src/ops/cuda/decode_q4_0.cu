// Matrices in blocks of q4_0.

#include "decode.cuh"
#include "decode_blocks.cuh"

FORMAT(Q4_0, q4_0)
