// Matrices in blocks of q3_k.

#include "decode.cuh"
#include "decode_blocks_k.cuh"

FORMAT(Q3K, q3_k)
