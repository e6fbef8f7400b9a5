// Matrices in blocks of q4_k.

#include "decode.cuh"
#include "decode_blocks_k.cuh"

FORMAT(Q4K, q4_k)
