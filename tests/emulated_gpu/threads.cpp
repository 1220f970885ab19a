// Runs a kernel's threads on the CPU, one after the other.
//
// Every thread of a block is a fibre with a stack of its own, which runs until it comes to a
// barrier (__syncthreads) or to a warp shuffle. When all threads of the block have come to the same
// barrier, they go on, in another order; likewise the threads of a warp at a shuffle. So if a
// barrier is missing, a thread reads numbers before others have written them, and results are wrong
// here, too. Shared memory is full of NaN when a block begins. A page that may not be accessed
// follows it. Blocks run in a shuffled order.
//
// ThreadSanitizer takes every fibre for a thread. Fibres are ordered only by a block's barriers,
// and by the begin and the end of a launch. So if two threads access a number with none of these in
// between, and one of them changes it, that is a race, in whatever order they ran here. For threads
// of different blocks to be different fibres, each of SLOTS blocks has fibres, stacks and shared
// memory of its own; a block runs after the block before it in its slot.

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

#include "shim.h"

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

namespace {

constexpr unsigned MOST_THREADS = 1024;  // of a block
constexpr size_t STACK = 128 * 1024;
constexpr size_t MOST_SHARED = 228 * 1024;  // bytes of a block; whole pages
constexpr size_t GUARD = 4096;              // the page behind it, which may not be accessed
#if defined(__SANITIZE_THREAD__)
constexpr unsigned SLOTS = 4;
#else
constexpr unsigned SLOTS = 1;
#endif

// Where the CPU is. A change by swapcontext costs a system call. So that is done only the first
// time, and where a sanitizer has to see it.
struct Place {
    ucontext_t context;
    jmp_buf jump;
    bool begun;
    void* thread;  // as ThreadSanitizer sees it
};

UNWATCHED void go(Place& from, Place& to) {
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

enum State { READY, AT_BARRIER, AT_SHUFFLE, FINISHED };

struct Fibre {
    Place place;
    State state;
    int line;                   // of the barrier or the shuffle where it waits
    unsigned passed;            // the number of barriers so far
    unsigned mask, lane;        // of the shuffle: who takes part, and whose value it wants
    uint64_t value, exchanged;  // of the shuffle: its own value, and the value it gets
};

struct Slot {
    Fibre fibres[MOST_THREADS];
    unsigned made;  // so many fibres have a stack
    char* stacks;
    char* memory;     // shared memory is at its end, before a page that may not be accessed
    unsigned blocks;  // the number of blocks that have been here
    // What orders threads. There are two of each, because a thread that is through one of them may
    // be at the next one already.
    char barriers[2], ends[2];
};

Slot slots[SLOTS];
Place scheduler = {{}, {}, true, nullptr};
char begin, end;
unsigned slot, running;
const emulated::Kernel* kernel;
void** arguments;
int skipped_barrier;  // its line; 0: none

UNWATCHED void run_bodies() {
    for (;;) {
        __tsan_acquire(&begin);
        Slot& own = slots[slot];
        __tsan_acquire(&own.ends[(own.blocks - 1) % 2]);  // of the block that was here before
        kernel->thread(arguments);
        __tsan_release(&own.ends[own.blocks % 2]);
        __tsan_release(&end);
        Fibre& fibre = slots[slot].fibres[running];
        fibre.state = FINISHED;
        go(fibre.place, scheduler);
    }
}

void make(Slot& into, unsigned threads) {
    if (into.stacks == nullptr) {
        into.stacks = static_cast<char*>(mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        into.memory = static_cast<char*>(mmap(nullptr, MOST_SHARED + GUARD, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        mprotect(into.memory + MOST_SHARED, GUARD, PROT_NONE);
    }
    for (; into.made < threads; ++into.made) {
        Place& place = into.fibres[into.made].place;
        place.thread = __tsan_create_fiber(0);
        getcontext(&place.context);
        place.context.uc_stack.ss_sp = into.stacks + into.made * STACK;
        place.context.uc_stack.ss_size = STACK;
        makecontext(&place.context, run_bodies, 0);
    }
}

void give_up() {  // threads are stuck in the middle of a kernel
    for (Slot& stuck : slots) {
        if (stuck.stacks != nullptr) {
            munmap(stuck.stacks, MOST_THREADS * STACK);
            munmap(stuck.memory, MOST_SHARED + GUARD);
        }
        stuck = {};
    }
}

// A generator of random numbers: xorshift (G. Marsaglia, "Xorshift RNGs", 2003).
struct Random {
    uint32_t state;
    uint32_t operator()() {
        state ^= state << 13;
        state ^= state >> 17;
        return state ^= state << 5;
    }
};

void shuffle(std::vector<unsigned>& order, unsigned count, Random& random) {
    order.resize(count);
    std::iota(order.begin(), order.end(), 0);
    for (unsigned i = count; i > 1; --i) {
        std::swap(order[i - 1], order[random() % i]);
    }
}

// If all threads of a warp that take part in a shuffle have come to it, gives them the values, and
// returns true.
UNWATCHED bool exchange(Fibre* lanes, unsigned count) {
    unsigned waiting = 0;
    for (unsigned i = 0; i < count; ++i) {
        waiting |= unsigned(lanes[i].state == AT_SHUFFLE) << i;
    }
    if (waiting == 0) {
        return false;
    }
    const Fibre& first = lanes[__builtin_ctz(waiting)];
    const unsigned present = count == 32 ? ~0u : (1u << count) - 1, taking = first.mask & present;
    if ((waiting & taking) != taking) {
        return false;
    }
    for (unsigned i = 0; i < count; ++i) {
        if ((taking >> i & 1) && (lanes[i].line != first.line || lanes[i].mask != first.mask ||
                                  !(taking >> lanes[i].lane & 1))) {
            return false;
        }
    }
    for (unsigned i = 0; i < count; ++i) {
        if (taking >> i & 1) {
            lanes[i].exchanged = lanes[lanes[i].lane].value;
            lanes[i].state = READY;
        }
    }
    return true;
}

// Sets every bit, which makes every number NaN.
UNWATCHED void fill(char* memory, size_t bytes) {
#if defined(__SANITIZE_THREAD__)
    for (size_t i = 0; i < bytes; ++i) {  // ThreadSanitizer would take memset for an access
        static_cast<volatile char*>(memory)[i] = ~0;
    }
#else
    memset(memory, ~0, bytes);
#endif
}

// Returns whether all threads of the block came to its end, by the same barriers.
UNWATCHED bool run_block(unsigned number, size_t shared, Random& random) {
    static std::vector<unsigned> warps, order;
    emulated::Position& position = *kernel->position;
    const dim3 grid = position.grid, size = position.block_size;
    const unsigned threads = size.x * size.y * size.z;
    position.block = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    slot = number % SLOTS;
    make(slots[slot], kernel->block == nullptr ? threads : 0);
    slots[slot].blocks += 1;
    char* memory = slots[slot].memory;
    position.shared = memory + MOST_SHARED - (shared + 31) / 32 * 32;
    ASAN_POISON_MEMORY_REGION(memory, MOST_SHARED);
    ASAN_UNPOISON_MEMORY_REGION(position.shared, shared);
    fill(static_cast<char*>(position.shared), shared);
    if (kernel->block != nullptr) {
        kernel->block(arguments);
        return true;
    }
    Fibre* fibres = slots[slot].fibres;
    for (unsigned t = 0; t < threads; ++t) {
        fibres[t].state = READY;
    }
    for (;;) {
        shuffle(warps, (threads + 31) / 32, random);
        for (const unsigned warp : warps) {
            Fibre* lanes = fibres + 32 * warp;
            const unsigned count = std::min(32u, threads - 32 * warp);
            do {
                shuffle(order, count, random);
                for (const unsigned lane : order) {
                    if (lanes[lane].state == READY) {
                        running = 32 * warp + lane;
                        position.thread = {running % size.x, running / size.x % size.y,
                                           running / size.x / size.y};
                        go(scheduler, lanes[lane].place);
                    }
                }
            } while (exchange(lanes, count));
        }
        for (unsigned t = 0; t < threads; ++t) {
            const Fibre& fibre = fibres[t];
            if (fibre.state == AT_SHUFFLE || fibre.state != fibres[0].state ||
                (fibre.state == AT_BARRIER && fibre.line != fibres[0].line)) {
                return false;
            }
        }
        if (fibres[0].state == FINISHED) {
            return true;
        }
        for (unsigned t = 0; t < threads; ++t) {
            fibres[t].state = READY;
        }
    }
}

}  // namespace

extern "C" {

UNWATCHED void emulated_barrier(int line) {
    if (line != skipped_barrier) {
        Fibre& fibre = slots[slot].fibres[running];
        char* tag = &slots[slot].barriers[fibre.passed++ % 2];
        __tsan_release(tag);
        fibre.line = line;
        fibre.state = AT_BARRIER;
        go(fibre.place, scheduler);
        __tsan_acquire(tag);
    }
}

UNWATCHED uint64_t emulated_shuffle(unsigned mask, uint64_t value, unsigned lane, int line) {
    Fibre& fibre = slots[slot].fibres[running];
    fibre.mask = mask;
    fibre.value = value;
    fibre.lane = lane;
    fibre.line = line;
    fibre.state = AT_SHUFFLE;
    go(fibre.place, scheduler);
    return fibre.exchanged;
}

// Runs a kernel to its end, in an order of blocks and threads that follows from the seed. Returns
// 0, or 1 if the threads of a block did not come to the same barriers or shuffles.
int emulated_run(const emulated::Kernel* launched, const unsigned* grid, const unsigned* block,
                 size_t shared, void** values, unsigned seed, int skipped) {
    static std::vector<unsigned> order;
    kernel = launched;
    arguments = values;
    skipped_barrier = skipped;
    kernel->position->grid = {grid[0], grid[1], grid[2]};
    kernel->position->block_size = {block[0], block[1], block[2]};
    scheduler.thread = __tsan_get_current_fiber();
    Random random = {(seed * 2654435761u) | 1};
    for (unsigned i = 0; i < 8; ++i) {
        random();
    }
    shuffle(order, grid[0] * grid[1] * grid[2], random);
    __tsan_release(&begin);
    for (const unsigned number : order) {
        if (!run_block(number, shared, random)) {
            give_up();
            return 1;
        }
    }
    __tsan_acquire(&end);
    return 0;
}

// Memory for arrays. Not NumPy's: AddressSanitizer knows where this begins and ends.
void* emulated_allocate(size_t bytes) { return std::malloc(bytes); }
void emulated_release(void* memory) { std::free(memory); }

// Only the first `used` bytes may be accessed from now on.
void emulated_limit(char* memory, size_t used, size_t bytes) {
    ASAN_UNPOISON_MEMORY_REGION(memory, used);
    ASAN_POISON_MEMORY_REGION(memory + used, bytes - used);
}
}
