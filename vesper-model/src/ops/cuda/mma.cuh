// Warp-level building blocks for compute capability 8.0 and later: tensor-core products, their operands from shared
// memory, and asynchronous copies into it.
//
// Operands of a 16 x 8 x 16 product, for lane = 4 g + t:
//   a (16 x 16): a[0] rows g, columns 2t, 2t+1; a[1] rows g+8; a[2], a[3] the same at columns + 8
//   b (16 x 8):  b[0] rows 2t, 2t+1 of column g; b[1] rows + 8
//   c (16 x 8):  c[0], c[1] row g, columns 2t, 2t+1; c[2], c[3] row g+8
// So two neighbouring results c make one operand a, without any exchange between lanes.
#pragma once

#include "common.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define TENSOR_CORES 1
#endif

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t r[4], const void *row) {
#ifdef TENSOR_CORES
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
#endif
}

__device__ __forceinline__ void load_transposed(uint32_t r[4], const void *row) {
#ifdef TENSOR_CORES
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
#endif
}

// c += a b
template <typename T>
__device__ __forceinline__ void multiply_add(float c[4], const uint32_t a[4], const uint32_t b[2]);

template <>
__device__ __forceinline__ void multiply_add<bf16>(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#ifdef TENSOR_CORES
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

template <>
__device__ __forceinline__ void multiply_add<f16>(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#ifdef TENSOR_CORES
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Starts to copy 16 bytes into shared memory, zeros where not `valid`.
__device__ __forceinline__ void copy_async(void *to, const void *from, bool valid) {
#ifdef TENSOR_CORES
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void copy_commit() {
#ifdef TENSOR_CORES
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N groups of copies are under way.
template <int N> __device__ __forceinline__ void copy_wait() {
#ifdef TENSOR_CORES
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// 2^x; 0 at minus infinity
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers in one register, the first in the low half.
template <typename T> __device__ __forceinline__ uint32_t pack(float low, float high);

template <> __device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
    __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&x);
}

template <> __device__ __forceinline__ uint32_t pack<f16>(float low, float high) {
    __half2 x = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&x);
}
