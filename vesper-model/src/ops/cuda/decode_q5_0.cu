// Matrices in blocks of q5_0.

#include "decode.cuh"
#include "decode_blocks.cuh"

FORMAT(Q5_0, q5_0)
