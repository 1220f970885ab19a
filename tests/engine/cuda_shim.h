// Enough of CUDA for g++ to compile npbn/engine/kernels.cu, and to run it on the CPU: to the
// letter, one thread after the other, and on the watch for what a GPU would silently get wrong.
//
// Every thread of a block is a fibre with a stack of its own, which runs until it comes to
// __syncthreads. Once all have come there, they go on, in another order. So what a thread reads
// before others have written it, for want of a barrier, is wrong here, too. Shared memory is full
// of NaN when a block begins, and what is behind it is out of bounds to AddressSanitizer. Blocks
// run in a shuffled order.
//
// ThreadSanitizer takes every fibre for a thread, and learns of nothing that orders them but a
// block's barriers, and a launch's begin and end: two threads that access a number with none of
// them in between, one of them to change it, are a race, in whatever order they ran here. So that
// those of different blocks are different ones, each of SLOTS blocks has fibres, stacks and shared
// memory of its own; the next block in a slot comes after the one before.
//
// What is not modelled: the rounding of the GPU's exp, log, quotients and roots; multiplications
// and additions in one rounding; -ftz, which takes denormal numbers for 0.

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

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#else
static void* __tsan_get_current_fiber() { return nullptr; }
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
constexpr unsigned __tsan_switch_to_fiber_no_sync = 0;
#endif
#define UNWATCHED __attribute__((no_sanitize("thread")))

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
static double* shared_memory;  // of the block that runs; an array in the kernels' source

// Which deliberate error the kernels have, where a test gave them some.
extern "C" {
int mutant_number = 0;
}

namespace shim {

constexpr unsigned THREADS_OF_A_BLOCK = 256;
constexpr size_t STACK = 128 * 1024;
constexpr size_t MOST_SHARED = 227 * 1024;  // a kernel's, in bytes, on Hopper
#if defined(__SANITIZE_THREAD__)
constexpr unsigned SLOTS = 4;
#else
constexpr unsigned SLOTS = 1;
#endif

// Where the CPU is. Going elsewhere by swapcontext costs a system call, so that happens only the
// first time, and where a sanitizer wants to hear of it.
struct Place {
    ucontext_t context;
    jmp_buf jump;
    bool begun;
    void* thread;  // as ThreadSanitizer sees it
};

UNWATCHED static void go(Place& from, Place& to) {
    __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
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
    int line;    // of the barrier where it waits
    int passed;  // barriers
};

struct Slot {
    Fibre fibres[THREADS_OF_A_BLOCK];
    char* stacks;
    double* memory;
    unsigned blocks;  // so many have been there
    // What orders threads; two of each, as who is through one may be at the next already.
    char barriers[2], ends[2];
};

static Slot slots[SLOTS];
static Place scheduler = {{}, {}, true, nullptr};
static char begin, end;
static unsigned slot, running;
static std::function<void()> body;
static int skipped_barrier;  // its line; that of none in production

UNWATCHED void barrier(int line) {
    if (line != skipped_barrier) {
        Fibre& fibre = slots[slot].fibres[running];
        char* tag = &slots[slot].barriers[fibre.passed++ % 2];
        __tsan_release(tag);
        fibre.line = line;
        go(fibre.place, scheduler);
        __tsan_acquire(tag);
    }
}

UNWATCHED static void run_bodies() {
    for (;;) {
        __tsan_acquire(&begin);
        Slot& own = slots[slot];
        __tsan_acquire(&own.ends[(own.blocks - 1) % 2]);  // of the block that was here before
        body();
        __tsan_release(&own.ends[own.blocks % 2]);
        __tsan_release(&end);
        Fibre& fibre = slots[slot].fibres[running];
        fibre.finished = true;
        go(fibre.place, scheduler);
    }
}

static void make(Slot& made) {
    made.stacks = static_cast<char*>(std::malloc(THREADS_OF_A_BLOCK * STACK));
    made.memory = static_cast<double*>(std::aligned_alloc(32, MOST_SHARED));
    for (unsigned t = 0; t < THREADS_OF_A_BLOCK; ++t) {
        Place& place = made.fibres[t].place;
        place.thread = __tsan_create_fiber(0);
        getcontext(&place.context);
        place.context.uc_stack.ss_sp = made.stacks + t * STACK;
        place.context.uc_stack.ss_size = STACK;
        makecontext(&place.context, run_bodies, 0);
    }
}

static void give_up() {  // they are stuck in the middle
    for (Slot& stuck : slots) {
        std::free(stuck.stacks);
        std::free(stuck.memory);
        stuck = {};
    }
}

// Whether all threads of the block came to its end, by the same barriers.
UNWATCHED static bool run_block(unsigned number, size_t shared, std::mt19937& random) {
    blockIdx = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
    slot = number % SLOTS;
    slots[slot].blocks += 1;
    Fibre* fibres = slots[slot].fibres;
    shared_memory = slots[slot].memory;
    ASAN_POISON_MEMORY_REGION(shared_memory, MOST_SHARED);
    ASAN_UNPOISON_MEMORY_REGION(shared_memory, shared);
    volatile char* bytes = reinterpret_cast<char*>(shared_memory);  // no memset, which is watched
    for (size_t i = 0; i < shared; ++i) {
        bytes[i] = -1;
    }
    for (unsigned t = 0; t < THREADS_OF_A_BLOCK; ++t) {
        fibres[t].finished = false;
    }
    unsigned order[THREADS_OF_A_BLOCK];
    std::iota(order, order + THREADS_OF_A_BLOCK, 0);
    while (!fibres[0].finished) {
        std::shuffle(order, order + THREADS_OF_A_BLOCK, random);
        for (const unsigned t : order) {
            running = t;
            threadIdx = {t, 0, 0};
            go(scheduler, fibres[t].place);
        }
        for (unsigned t = 0; t < THREADS_OF_A_BLOCK; ++t) {
            const Fibre& fibre = fibres[t];
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
    shim::scheduler.thread = __tsan_get_current_fiber();
    for (shim::Slot& slot : shim::slots) {
        if (slot.stacks == nullptr) {
            shim::make(slot);
        }
    }
    gridDim = {grid[0], grid[1], grid[2]};
    std::vector<unsigned> blocks(grid[0] * grid[1] * grid[2]);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::mt19937 random(seed);
    std::shuffle(blocks.begin(), blocks.end(), random);
    __tsan_release(&shim::begin);
    for (const unsigned b : blocks) {
        if (!shim::run_block(b, shared, random)) {
            shim::give_up();
            return 1;
        }
    }
    __tsan_acquire(&shim::end);
    return 0;
}
}
