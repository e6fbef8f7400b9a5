// Tensor-core products of bf16 with sums in f32, and asynchronous copies into shared memory, both of compute capability
// 8.0 and later. Below that copies are plain ones, and there are no such products: nothing here is called then.
//
// Operands of a 16 x 8 x 16 product, for lane = 4 g + t:
//   a (16 x 16): a[0] row g, columns 2t, 2t+1; a[1] row g+8; a[2], a[3] the same at columns + 8
//   b (16 x 8):  b[0] rows 2t, 2t+1 of column g; b[1] rows + 8
//   c (16 x 8):  c[0], c[1] row g, columns 2t, 2t+1; c[2], c[3] row g+8
#pragma once

#include "common.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define AMPERE 1
#endif

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// c += a b
__device__ __forceinline__ void multiply_add(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
#ifdef AMPERE
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// An 8 x 8 matrix of 16-bit numbers across a warp, of which lane 4 g + t has columns 2t, 2t+1 of row g, transposed.
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
    uint32_t y = 0;
#ifdef AMPERE
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
#endif
    return y;
}

// Starts to copy 16 bytes into shared memory, zeros where not `valid`; `from` is never read then.
__device__ __forceinline__ void copy_async(void *to, const void *from, bool valid) {
#ifdef AMPERE
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
#else
    *reinterpret_cast<uint4 *>(to) = valid ? *reinterpret_cast<const uint4 *>(from) : make_uint4(0, 0, 0, 0);
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void copy_commit() {
#ifdef AMPERE
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N groups of this thread's copies are under way.
template <int N> __device__ __forceinline__ void copy_wait() {
#ifdef AMPERE
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Two numbers in one register, the first in the low half.
__device__ __forceinline__ uint32_t pack(bf16 low, bf16 high) {
    __nv_bfloat162 x = __halves2bfloat162(low, high);
    return *reinterpret_cast<uint32_t *>(&x);
}

// Two numbers as sums of two of bf16, which keeps 16 bits of each: what is rounded, and what that leaves.
struct Split {
    uint32_t high, low;
};

__device__ __forceinline__ Split split(float first, float second) {
    const bf16 a = __float2bfloat16_rn(first), b = __float2bfloat16_rn(second);
    const float left_a = first - __bfloat162float(a), left_b = second - __bfloat162float(b);
    return {pack(a, b), pack(__float2bfloat16_rn(left_a), __float2bfloat16_rn(left_b))};
}

// The two words of b for the first or second half of 8 neighbouring columns.
__device__ __forceinline__ const uint32_t *words(const uint4 &v) { return reinterpret_cast<const uint32_t *>(&v); }

// N times 8 numbers, of which `at` gives the row, where there is one, and `column` the first column, of rows of n columns.
// What kind of loads stands before all of them: a branch at each would make it wait for the one before.
template <int N, typename Row, typename Column>
__device__ __forceinline__ void read8(uint4 (&to)[N], Row at, Column column, uint32_t n, bool wide) {
    const uint4 none = make_uint4(0, 0, 0, 0);
    if (wide) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const bf16 *row = at(i);
            const uint32_t c = column(i);
            to[i] = row && c < n ? *reinterpret_cast<const uint4 *>(row + c) : none;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const bf16 *row = at(i);
            to[i] = none;
            if (!row) continue;
            const Vec<bf16, 8> v = read<bf16, 8>(row, column(i), n, false);
            to[i] = *reinterpret_cast<const uint4 *>(&v);
        }
    }
}
