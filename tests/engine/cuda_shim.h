// Enough of CUDA for g++ to compile npbn/engine/kernels.cu, and to run it on the CPU: to the
// letter, one thread after the other, and on the watch for what a GPU would silently get wrong.
//
// Every thread of a block is a fibre with a stack of its own, which runs until it comes to
// __syncthreads. Once all have come there, they go on, in another order. So what a thread reads
// before others have written it, for want of a barrier, is wrong here, too. Shared memory is full
// of NaN when a block begins, and what is behind it is out of bounds to AddressSanitizer. Blocks
// run in a shuffled order.
//
// What is not modelled: the GPU's weak ordering of memory, threads that really run at once, the
// rounding of its exp and log, -ftz.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(start, size) ((void)(start), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(start, size) ((void)(start), (void)(size))
#endif

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __syncthreads() shim::barrier(__LINE__)

using std::exp;
using std::log;
using std::max;
using std::min;
using std::nan;
using std::sqrt;

struct Dim3 {
    unsigned x, y, z;
};
static Dim3 threadIdx, blockIdx, gridDim;
alignas(32) double shared_memory[227 * 1024 / sizeof(double)];  // the most of a kernel on Hopper

// Which deliberate error the kernels have, where a test gave them some.
extern "C" {
int mutant_number = 0;
}

namespace shim {

constexpr unsigned THREADS_OF_A_BLOCK = 256;
constexpr size_t STACK = 128 * 1024;

// Where the CPU is. Going elsewhere by swapcontext costs a system call, so that happens only the
// first time, and where AddressSanitizer wants to hear of it.
struct Place {
    ucontext_t context;
    jmp_buf jump;
    bool begun;
};

static void go(Place& from, Place& to) {
#if defined(__SANITIZE_ADDRESS__)
    swapcontext(&from.context, &to.context);
#else
    if (_setjmp(from.jump) == 0) {
        if (to.begun) {
            _longjmp(to.jump, 1);
        }
        to.begun = true;
        setcontext(&to.context);
    }
#endif
}

struct Fibre {
    Place place;
    bool finished;
    int line;  // of the barrier where it waits
};

static std::vector<Fibre> fibres;
static std::vector<char> stacks;
static Place scheduler = {{}, {}, true};
static unsigned running;
static std::function<void()> body;
static int skipped_barrier;  // its line; that of none in production

void barrier(int line) {
    if (line != skipped_barrier) {
        fibres[running].line = line;
        go(fibres[running].place, scheduler);
    }
}

static void run_bodies() {
    for (;;) {
        body();
        fibres[running].finished = true;
        go(fibres[running].place, scheduler);
    }
}

static void make_fibres() {
    fibres.assign(THREADS_OF_A_BLOCK, {});
    stacks.resize(THREADS_OF_A_BLOCK * STACK);
    for (unsigned t = 0; t < THREADS_OF_A_BLOCK; ++t) {
        getcontext(&fibres[t].place.context);
        fibres[t].place.context.uc_stack.ss_sp = stacks.data() + t * STACK;
        fibres[t].place.context.uc_stack.ss_size = STACK;
        makecontext(&fibres[t].place.context, run_bodies, 0);
    }
}

// Whether all threads of the block came to its end, by the same barriers.
static bool run_block(std::mt19937& random) {
    for (Fibre& fibre : fibres) {
        fibre.finished = false;
    }
    std::vector<unsigned> order(THREADS_OF_A_BLOCK);
    std::iota(order.begin(), order.end(), 0);
    while (!fibres[0].finished) {
        std::shuffle(order.begin(), order.end(), random);
        for (const unsigned t : order) {
            running = t;
            threadIdx = {t, 0, 0};
            go(scheduler, fibres[t].place);
        }
        for (const Fibre& fibre : fibres) {
            if (fibre.finished != fibres[0].finished ||
                (!fibre.finished && fibre.line != fibres[0].line)) {
                return false;
            }
        }
    }
    return true;
}

// Kernels by name: a call with the addresses of the arguments, as cuLaunchKernel has it, and what
// they are, apart by spaces: f, d, i, b (byte), s (structure); * before one is a pointer to it.
struct Kernel {
    std::function<void(void**)> call;
    std::string signature;
};
static std::map<std::string, Kernel> kernels;

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

template <typename... A, size_t... I>
Kernel unpacking(void (*kernel)(A...), std::index_sequence<I...>) {
    return {[=](void** arguments) { kernel(*static_cast<A*>(arguments[I])...); },
            ((code<A>() + " ") + ...)};
}

struct Register {
    template <typename... A>
    Register(const char* name, void (*kernel)(A...)) {
        kernels[name] = unpacking(kernel, std::index_sequence_for<A...>());
    }
};

}  // namespace shim

extern "C" {

// A kernel's arguments; null if there is no such kernel.
const char* signature(const char* name) {
    const auto found = shim::kernels.find(name);
    return found == shim::kernels.end() ? nullptr : found->second.signature.c_str();
}

// Not NumPy's memory: AddressSanitizer knows where this begins and ends.
void* allocate(size_t bytes) { return std::malloc(bytes); }
void release(void* memory) { std::free(memory); }

// Only the first `used` bytes may be accessed from now on.
void limit(char* memory, size_t used, size_t bytes) {
    ASAN_UNPOISON_MEMORY_REGION(memory, used);
    ASAN_POISON_MEMORY_REGION(memory + used, bytes - used);
}

// 0 if all went well; 1 if the threads of a block did not come to the same barriers.
int launch(const char* name, const unsigned* grid, size_t shared, void** arguments, unsigned seed,
           int skipped_barrier) {
    const shim::Kernel& kernel = shim::kernels.at(name);
    shim::body = [&] { kernel.call(arguments); };
    shim::skipped_barrier = skipped_barrier;
    if (shim::fibres.empty()) {
        shim::make_fibres();
    }
    gridDim = {grid[0], grid[1], grid[2]};
    std::vector<unsigned> blocks(grid[0] * grid[1] * grid[2]);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::mt19937 random(seed);
    std::shuffle(blocks.begin(), blocks.end(), random);
    ASAN_POISON_MEMORY_REGION(shared_memory, sizeof shared_memory);
    ASAN_UNPOISON_MEMORY_REGION(shared_memory, shared);
    for (const unsigned b : blocks) {
        blockIdx = {b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]};
        std::memset(shared_memory, 0xff, shared);
        if (!shim::run_block(random)) {
            shim::fibres.clear();  // they are stuck in the middle
            return 1;
        }
    }
    return 0;
}
}
