// Matrices of bf16, read 16 bytes at a time or, where that is not possible, one by one.

#include "decode.cuh"

typedef Plain<bf16, WIDE<bf16>> wide;
typedef Plain<bf16, 1> single;
FORMAT(wide, bf16_wide)
FORMAT(single, bf16_single)
PRODUCTS(wide, bf16_wide, 8)
PRODUCTS(single, bf16_single, 8)
