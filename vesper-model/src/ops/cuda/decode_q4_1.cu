// Matrices in blocks of q4_1.

#include "decode.cuh"
#include "decode_blocks.cuh"

FORMAT(Q4_1, q4_1)
