// Enough of CUDA C++ for g++ to compile kernels for the CPU: npbn's kernels.cu, and what CuPy
// generates.
//
// A thread of a kernel reads its position and the shared memory of its block from the variable
// `emulated::position` of this library. `threads.cpp` sets these and runs the threads one after the
// other. This file has no code for barriers and warps: it calls `threads.cpp`.
//
// Not modelled: the rounding of the GPU's exp, log, quotients and roots; a multiplication and an
// addition in one rounding; -ftz, which takes denormal numbers as 0; half precision.

#pragma once

#include <assert.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static  // one block of a library's kernels runs at a time
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
    unsigned x, y, z;
};
typedef dim3 uint3;

namespace emulated {

struct Position {
    dim3 thread, block, block_size, grid;
    void* shared;  // the dynamic shared memory of the block
};
static Position position;

// A kernel of this library, as the device sees it. `arguments` holds the addresses of the kernel's
// arguments, as in cuLaunchKernel.
struct Kernel {
    Position* position;
    void (*thread)(void** arguments);  // runs one thread of a block
    void (*block)(void** arguments);   // runs all threads; null if the kernel has barriers
    int parameters;
    const size_t* sizes;    // of each parameter, in bytes
    const char* signature;  // the type of each parameter: see `code`
};

}  // namespace emulated

// What `threads.cpp` does for kernels.
extern "C" {
void emulated_barrier(int line);
uint64_t emulated_shuffle(unsigned mask, uint64_t value, unsigned lane, int line);
}

#define threadIdx (emulated::position.thread)
#define blockIdx (emulated::position.block)
#define blockDim (emulated::position.block_size)
#define gridDim (emulated::position.grid)
#define __syncthreads() emulated_barrier(__LINE__)
#define __threadfence()
constexpr int warpSize = 32;

// Warp shuffles: each thread gets the value of another thread of its warp (CUDA C++ Programming
// Guide, "Warp Shuffle Functions"). A thread whose source is outside of the group of `width`
// threads gets its own value.
namespace emulated {

template <typename T, typename Source>
T shuffle(unsigned mask, T value, int width, int line, Source source) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    const unsigned lane =
        (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
    const int first = lane / width * width, from = source(int(lane));
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    const bool inside = first <= from && from < first + width;
    bits = emulated_shuffle(mask, bits, inside ? from : lane, line);
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace emulated

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
    return emulated::shuffle(mask, value, width, line,
                             [=](int lane) { return lane / width * width + source % width; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, int line = __builtin_LINE()) {
    return emulated::shuffle(mask, value, width, line, [=](int lane) { return lane - delta; });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32, int line = __builtin_LINE()) {
    return emulated::shuffle(mask, value, width, line, [=](int lane) { return lane + delta; });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
    return emulated::shuffle(mask, value, width, line, [=](int lane) { return lane ^ bits; });
}

inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
    __shfl_sync(mask, 0, 0, 32, line);
}

// Mathematics that CUDA has and the C library lacks.
template <typename A, typename B>
using Common =
    std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>>;
template <typename A, typename B>
Common<A, B> min(A a, B b) {
    const Common<A, B> x = a, y = b;
    if constexpr (std::is_floating_point_v<Common<A, B>>) {
        return std::fmin(x, y);  // of a number and a NaN, the number
    }
    return y < x ? y : x;
}
template <typename A, typename B>
Common<A, B> max(A a, B b) {
    const Common<A, B> x = a, y = b;
    if constexpr (std::is_floating_point_v<Common<A, B>>) {
        return std::fmax(x, y);
    }
    return x < y ? y : x;
}
using std::exp;
using std::log;
using std::nan;
using std::sqrt;
inline float rsqrt(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }

template <typename To, typename From>
To same_bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
inline int __float_as_int(float x) { return same_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline long long __double_as_longlong(double x) { return same_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return same_bits<double>(x); }
template <typename T>
T __ldg(const T* p) {
    return *p;
}

// Atomics: a thread stops only at barriers and shuffles, so a plain access is one.
#define ATOMIC(name, T, result) \
    inline T name(T* p, T v) {  \
        const T old = *p;       \
        *p = result;            \
        return old;             \
    }
#define ATOMICS(T)                          \
    ATOMIC(atomicAdd, T, old + v)           \
    ATOMIC(atomicExch, T, v)                \
    ATOMIC(atomicMax, T, old < v ? v : old) \
    ATOMIC(atomicMin, T, v < old ? v : old)
#define ATOMICS_OF_INTEGERS(T)                  \
    ATOMICS(T)                                  \
    ATOMIC(atomicSub, T, old - v)               \
    ATOMIC(atomicAnd, T, old& v)                \
    ATOMIC(atomicOr, T, old | v)                \
    inline T atomicCAS(T* p, T expected, T v) { \
        const T old = *p;                       \
        *p = old == expected ? v : old;         \
        return old;                             \
    }
ATOMICS_OF_INTEGERS(int)
ATOMICS_OF_INTEGERS(unsigned)
ATOMICS_OF_INTEGERS(unsigned long long)
inline float atomicAdd(float* p, float v) { return std::exchange(*p, *p + v); }
inline double atomicAdd(double* p, double v) { return std::exchange(*p, *p + v); }
#undef ATOMIC
#undef ATOMICS
#undef ATOMICS_OF_INTEGERS

namespace emulated {

// The code of a type: f float, d double, i int, b byte, s anything else; * before it: a pointer.
template <typename T>
std::string code() {
    if constexpr (std::is_pointer_v<T>) {
        return "*" + code<std::remove_const_t<std::remove_pointer_t<T>>>();
    }
    return std::is_same_v<T, float>           ? "f"
           : std::is_same_v<T, double>        ? "d"
           : std::is_same_v<T, int>           ? "i"
           : std::is_same_v<T, unsigned char> ? "b"
                                              : "s";
}

template <auto kernel>
struct Entry;
template <typename... P, void (*kernel)(P...)>
struct Entry<kernel> {
    template <size_t... I>
    static inline void call(void** arguments, std::index_sequence<I...>) {
        kernel(*static_cast<std::remove_reference_t<P>*>(arguments[I])...);
    }
    static void thread(void** arguments) { call(arguments, std::index_sequence_for<P...>()); }
    static void block(void** arguments) {
        for (threadIdx.z = 0; threadIdx.z < blockDim.z; ++threadIdx.z) {
            for (threadIdx.y = 0; threadIdx.y < blockDim.y; ++threadIdx.y) {
                for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) {
                    thread(arguments);
                }
            }
        }
    }
    static constexpr size_t sizes[] = {sizeof(P)..., 0};
    static const char* signature() {
        static const std::string text = ((code<P>() + " ") + ... + "");
        return text.c_str();
    }
};

}  // namespace emulated

// Makes a kernel known by the name emulated_NAME. `barriers` says whether it may have some.
#define EMULATED_KERNEL(name, barriers, ...)                                                      \
    extern "C" __attribute__((visibility("default"))) const emulated::Kernel* emulated_##name() { \
        using Entry = emulated::Entry<(__VA_ARGS__)>;                                             \
        static const emulated::Kernel kernel = {&emulated::position,                              \
                                                Entry::thread,                                    \
                                                (barriers) ? nullptr : Entry::block,              \
                                                int(sizeof(Entry::sizes) / sizeof(size_t)) - 1,   \
                                                Entry::sizes,                                     \
                                                Entry::signature()};                              \
        return &kernel;                                                                           \
    }
