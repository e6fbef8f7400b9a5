// Matrices in blocks of q5_1.

#include "decode.cuh"
#include "decode_blocks.cuh"

FORMAT(Q5_1, q5_1)
