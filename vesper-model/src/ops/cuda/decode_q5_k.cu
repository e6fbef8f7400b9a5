// Matrices in blocks of q5_k.

#include "decode.cuh"
#include "decode_blocks_k.cuh"

FORMAT(Q5K, q5_k)
