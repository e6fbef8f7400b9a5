// Matrices of f16, read 16 bytes at a time or, where that is not possible, one by one.

#include "decode.cuh"

typedef Plain<f16, WIDE<f16>> wide;
typedef Plain<f16, 1> single;
FORMAT(wide, f16_wide)
FORMAT(single, f16_single)
PRODUCTS(wide, f16_wide, 8)
PRODUCTS(single, f16_single, 8)
