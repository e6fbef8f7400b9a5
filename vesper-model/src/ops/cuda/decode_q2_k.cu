// Matrices in blocks of q2_k.

#include "decode.cuh"
#include "decode_blocks_k.cuh"

FORMAT(Q2K, q2_k)
