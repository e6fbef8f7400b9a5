// How the rows of a matrix are stored: a format. Each has
//
//     V           how many elements follow each other in a unit, what a lane takes at once
//     Unit        what is loaded of them
//     bytes(n)    the length of a row of n elements
//     load        the unit of that number in a row
//     values      its elements, but for what of them is the same in all of the unit:
//     SCALED      whether there is that: element = scale(unit) * value - least(unit)
//     LEAST       whether least(unit) is not 0
//
// Plain numbers are here; blocks of small integers are in decode_blocks.cuh and decode_blocks_k.cuh.
#pragma once

#include "common.cuh"

template <typename T, int N> struct Plain {
    static constexpr int V = N;
    static constexpr bool SCALED = false, LEAST = false;
    typedef Vec<T, N> Unit;

    static __device__ __forceinline__ size_t bytes(uint32_t n) { return (size_t)n * sizeof(T); }

    static __device__ __forceinline__ Unit load(const uint8_t *row, uint32_t unit) {
        return ::load<T, N>(reinterpret_cast<const T *>(row) + (size_t)unit * N);
    }

    static __device__ __forceinline__ void values(const Unit &unit, float (&w)[N]) {
#pragma unroll
        for (int j = 0; j < N; j++) w[j] = to_float(unit.v[j]);
    }

    static __device__ __forceinline__ float scale(const Unit &) { return 1.0f; }
    static __device__ __forceinline__ float least(const Unit &) { return 0.0f; }
};
