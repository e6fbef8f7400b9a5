// Matrices of f32, read 16 bytes at a time or, where that is not possible, one by one.

#include "decode.cuh"

typedef Plain<f32, WIDE<f32>> wide;
typedef Plain<f32, 1> single;
FORMAT(wide, f32_wide)
FORMAT(single, f32_single)
PRODUCTS(wide, f32_wide, 8)
PRODUCTS(single, f32_single, 8)
