// Products of f32 on tensor cores, of compute capability 8.0 and later. Below that nothing here is called.
//
// A tensor core takes 11 bits of each factor ("tf32"). A number of 24 bits is the sum of two such, and of a product of two
// of those sums all parts are computed that f32 could tell from none. Sums of more than a few products are made outside
// of the tensor cores, which do not round to nearest.
#pragma once

#include "mma.cuh"

// c += a b, a (16 x 8) and b (8 x 8) in tf32. For lane 4 g + t: a[0] row g, column t; a[1] row g + 8; a[2], a[3] the same at
// column t + 4; b0 row t, column g; b1 row t + 4; c as for bf16.
__device__ __forceinline__ void multiply_add_tf32(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
#ifdef AMPERE
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// What of a number tf32 holds, rounded, and what that leaves, of which the tensor core takes the upper bits too.
__device__ __forceinline__ void halves(float x, uint32_t &high, uint32_t &low) {
    high = (__float_as_uint(x) + 0x1000) & 0xffffe000u;
    low = __float_as_uint(x - __uint_as_float(high));
}
