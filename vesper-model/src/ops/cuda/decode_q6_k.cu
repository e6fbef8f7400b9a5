// Matrices in blocks of q6_k.

#include "decode.cuh"
#include "decode_blocks_k.cuh"

FORMAT(Q6K, q6_k)
