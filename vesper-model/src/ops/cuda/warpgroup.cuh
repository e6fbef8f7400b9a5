// Warpgroup-level building blocks for compute capability 9.0: tensor-core products of four warps at once (`wgmma`),
// whose operands are panels in shared memory, or registers on the left.
//
// A panel holds rows of 64 16-bit numbers, 128 bytes, whose 16-byte pieces are permuted by the row (`place<64>`),
// which is what the products call a swizzle of 128 bytes. Tiles of more columns are panels one after the other.
// Panels begin at multiples of 1024 bytes.
//
// A result of 64 x N lies in the warps as the 16 x 8 results of mma.cuh do: warp w has the rows 16 w .., and c[n] is
// the block of the columns 8 n ... So two neighbouring blocks make one left operand in registers here, too.
#pragma once

#include "attention.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WARPGROUPS 1
#endif

// Where a 16-byte piece of a row lies in a tile of ROWS rows.
template <int ROWS> __device__ __forceinline__ int in_panels(int row, int piece) {
    return piece / 8 * ROWS * 64 + place<64>(row, piece % 8);
}

// As `put_rows` and `store_rows`, of a tile of ROWS rows in panels.
template <typename T, int D, int ROWS>
__device__ __forceinline__ void put_panels(T *tile, int row0, const float (&c)[D / 8][4], float low, float high) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        *reinterpret_cast<uint32_t *>(tile + in_panels<ROWS>(row0 + g, n) + 2 * t) =
            pack<T>(c[n][0] * low, c[n][1] * low);
        *reinterpret_cast<uint32_t *>(tile + in_panels<ROWS>(row0 + g + 8, n) + 2 * t) =
            pack<T>(c[n][2] * high, c[n][3] * high);
    }
}

template <typename T, int D, int ROWS>
__device__ __forceinline__ void store_panels(T *to, const T *tile, int row0, int first, int t, size_t stride, int dim) {
    constexpr int PIECES = D / 8;
    __syncwarp();
#pragma unroll
    for (int i = threadIdx.x % 32; i < 16 * PIECES; i += 32) {
        const int row = i / PIECES, piece = i % PIECES;
        if (first + row < t && piece * 8 < dim)
            *reinterpret_cast<uint4 *>(to + (size_t)(first + row) * stride + piece * 8) =
                *reinterpret_cast<const uint4 *>(tile + in_panels<ROWS>(row0 + row, piece));
    }
}

// What a product has to know of an operand in shared memory: where it begins, and how far it is to the next panel, in
// bytes (used where the panel's columns are the columns of the result).
__device__ __forceinline__ uint64_t describe(const void *panel, uint32_t next) {
    return (uint64_t)((shared_address(panel) & 0x3ffff) >> 4) | (uint64_t)(next >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 |  // from eight rows to the next eight
           (uint64_t)1 << 62;             // the swizzle
}

// An operand whose rows are rows of the left side, or columns of the right side: columns 16 k .. of the tile from its
// row `row` on.
template <typename T, int ROWS> __device__ __forceinline__ uint64_t along(const T *tile, int row, int k) {
    return describe(tile + k / 4 * ROWS * 64 + row * 64 + k % 4 * 16, 16);
}

// An operand on the right side that is the tile itself: its rows 16 k .., all of its columns.
template <typename T, int ROWS> __device__ __forceinline__ uint64_t across(const T *tile, int k) {
    return describe(tile + k * 16 * 64, ROWS * 128);
}

// Before the first product after registers or shared memory have been written.
__device__ __forceinline__ void products_fence() {
#ifdef WARPGROUPS
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Ends a group of products.
__device__ __forceinline__ void products_commit() {
#ifdef WARPGROUPS
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most N groups of products are under way.
template <int N> __device__ __forceinline__ void products_wait() {
#ifdef WARPGROUPS
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}

// What this thread wrote into shared memory is seen by products after the next barrier.
__device__ __forceinline__ void shared_fence() {
#ifdef WARPGROUPS
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

template <int N> __device__ __forceinline__ void clear(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
}

// Registers that a product wrote or read are not touched before this point.
template <int N> __device__ __forceinline__ void settle(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+f"(c[n][i])::"memory");
}

template <int N> __device__ __forceinline__ void settle(uint32_t (&a)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+r"(a[n][i])::"memory");
}

#define BLOCK(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define BLOCKS_8 BLOCK(0), BLOCK(1), BLOCK(2), BLOCK(3), BLOCK(4), BLOCK(5), BLOCK(6), BLOCK(7)
#define BLOCKS_16                                                                                                      \
    BLOCKS_8, BLOCK(8), BLOCK(9), BLOCK(10), BLOCK(11), BLOCK(12), BLOCK(13), BLOCK(14), BLOCK(15)
#define REGISTERS_8                                                                                                    \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_16                                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                 \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// PRODUCTS(type, its name, columns, blocks, and the places of the operands behind the registers of the result):
//   multiply<RIGHT>(c, a, b, add)   c = a b, or c += a b where `add`
// for a 64 x 16 on the left, in registers or as `along` describes it, and 16 x 8 BLOCKS on the right: with RIGHT = 0 as
// `along` describes it, with RIGHT = 1 as `across` does.
#ifdef WARPGROUPS
#define PRODUCTS(T, TYPE, N, BLOCKS, P0, P1, P2, P3, P4, P5, P6)                                                       \
    template <int RIGHT>                                                                                               \
    __device__ __forceinline__ void multiply(float (&c)[BLOCKS][4], uint64_t a, uint64_t b, int add, T) {              \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N               \
                     "k16.f32." TYPE "." TYPE " {" REGISTERS_##BLOCKS "}, " P0 ", " P1 ", p, 1, 1, 0, " P3 ";\n}"      \
                     : BLOCKS_##BLOCKS                                                                                 \
                     : "l"(a), "l"(b), "r"(add), "n"(RIGHT));                                                          \
    }                                                                                                                  \
    template <int RIGHT>                                                                                               \
    __device__ __forceinline__ void multiply(float (&c)[BLOCKS][4], const uint32_t (&a)[4], uint64_t b, int add, T) {  \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N               \
                     "k16.f32." TYPE "." TYPE " {" REGISTERS_##BLOCKS "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4       \
                     ", p, 1, 1, " P6 ";\n}"                                                                           \
                     : BLOCKS_##BLOCKS                                                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(RIGHT));                      \
    }
#else
#define PRODUCTS(T, TYPE, N, BLOCKS, P0, P1, P2, P3, P4, P5, P6)                                                       \
    template <int RIGHT>                                                                                               \
    __device__ __forceinline__ void multiply(float (&)[BLOCKS][4], uint64_t, uint64_t, int, T) {}                      \
    template <int RIGHT>                                                                                               \
    __device__ __forceinline__ void multiply(float (&)[BLOCKS][4], const uint32_t (&)[4], uint64_t, int, T) {}
#endif

PRODUCTS(bf16, "bf16", 64, 8, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
PRODUCTS(f16, "f16", 64, 8, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
PRODUCTS(bf16, "bf16", 128, 16, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
PRODUCTS(f16, "f16", 128, 16, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
