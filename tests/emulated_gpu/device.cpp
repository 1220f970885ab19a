// CUDA's runtime and driver, as far as CuPy calls them, without a device: its memory is the host's
// memory, its kernels are shared libraries from g++, and `threads.cpp` runs them.
//
// Streams are queues. A stream runs what is in its queue at once (early), or when somebody waits
// for it (late: as late as CUDA allows). Where a program forgets to wait, late streams give it
// numbers that are not there yet. Graphs are lists of what was captured. What CUDA refuses while a
// stream captures is refused here, too.
//
// `emulated_log` tells what was called; `emulated_fail` lets a call fail. Functions of the runtime
// have the prefix `emulated_`: `__init__.py` lets CuPy's calls jump to them. Those of the driver
// have their own names. Numbers of errors, attributes and offsets in structures are those of
// CUDA 13.

#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "shim.h"

extern "C" int emulated_run(const emulated::Kernel*, const unsigned*, const unsigned*, size_t,
                            void**, unsigned seed, int skipped_barrier);

namespace {

enum Error {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_SUPPORTED = 801,
    INVALID_IMAGE = 200,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906,
};

// ------------------------------------------------------------------------- what was called

std::string log_text;
bool logging;

__attribute__((format(printf, 1, 2))) void note(const char* format, ...) {
    if (logging) {
        char line[4096];
        va_list values;
        va_start(values, format);
        vsnprintf(line, sizeof line, format, values);
        va_end(values);
        log_text += line;
        log_text += '\n';
    }
}

// ------------------------------------------------------------------------- errors on demand

struct Failure {
    std::string kind;  // of the call: "launch", "copy", "allocation", "product" or "wait"
    long calls;        // the number of calls of that kind that still succeed
    int error;
    bool lasting;  // whether all later calls of every kind fail, too
} failure = {"", 0, 0, false};
int lost;  // the error that every call has from now on; 0: none

int failing(const char* kind) {
    if (lost == 0 && failure.kind == kind && failure.calls-- <= 0) {
        if (failure.lasting) {
            lost = failure.error;
        }
        return failure.error;
    }
    return lost;
}

// ------------------------------------------------------------------------- streams

using Work = std::function<void()>;

struct Stream {
    int number;
    bool blocking;                 // CUDA orders it with the default stream
    std::vector<Work> queue = {};  // what was asked of it since the last wait
    size_t asked = 0, done = 0;    // the numbers of works since the stream was made
    bool capturing = false, invalid = false;
    std::vector<Work> captured = {};
};

Stream null_stream = {0, false};
std::vector<Stream*> streams = {&null_stream};
int last_number;

enum Late { DEFAULT = 1, OTHERS = 2 };
int late;  // which streams are late

Stream* stream_of(void* handle) {
    return reinterpret_cast<uintptr_t>(handle) <= 2 ? &null_stream : static_cast<Stream*>(handle);
}

// Runs what was asked of a stream, up to a number of works.
void finish(Stream* stream, size_t count) {
    while (stream->done < count) {
        const Work work = stream->queue[stream->queue.size() - (stream->asked - stream->done)];
        ++stream->done;
        work();
    }
    if (stream->done == stream->asked) {
        stream->queue.clear();
    }
}

void finish(Stream* stream) { finish(stream, stream->asked); }

void finish_all() {
    for (size_t i = 0; i < streams.size(); ++i) {
        finish(streams[i]);
    }
}

void add(Stream* stream, Work work) {
    stream->queue.push_back(std::move(work));
    ++stream->asked;
}

void wait_for(Stream* stream, Stream* other) {
    const size_t count = other->asked;
    if (other->done < count) {
        add(stream, [=] { finish(other, count); });
    }
}

int submit(Stream* stream, Work work) {
    if (stream->capturing) {
        stream->captured.push_back(std::move(work));
        return SUCCESS;
    }
    for (Stream* other : streams) {  // the default stream and blocking streams wait for each other
        if (other->blocking && stream == &null_stream) {
            if (other->capturing) {
                other->invalid = true;
                return CAPTURE_IMPLICIT;
            }
            wait_for(stream, other);
        }
    }
    if (stream->blocking) {
        wait_for(stream, &null_stream);
    }
    add(stream, std::move(work));
    if (!(late & (stream == &null_stream ? DEFAULT : OTHERS))) {
        finish(stream);
    }
    return lost;
}

int wait(Stream* stream) {
    if (stream->capturing) {
        stream->invalid = true;
        return CAPTURE_UNSUPPORTED;
    }
    if (const int error = failing("wait")) {
        return error;
    }
    finish(stream);
    return lost;
}

// ------------------------------------------------------------------------- memory

constexpr size_t PAGE = 4096;
size_t total_memory = size_t(80) << 30, used_memory;
bool guarded;  // a page that nobody may access behind every array; freed arrays are unmapped
struct Piece {
    size_t bytes;
    bool guarded;
};
std::map<char*, Piece> allocated, pinned;

char* allocate(size_t bytes) {
    char* memory = nullptr;
    if (!guarded) {
        memory = static_cast<char*>(std::aligned_alloc(512, (bytes + 511) / 512 * 512));
        memset(memory, 0xff, bytes);
        return memory;
    }
    const size_t body = (bytes + PAGE - 1) / PAGE * PAGE;
    memory = static_cast<char*>(
        mmap(nullptr, body + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    memset(memory, 0xff, body);
    mprotect(memory + body, PAGE, PROT_NONE);
    return memory + body - (bytes + 15) / 16 * 16;
}

void release(char* memory, Piece piece) {
    if (!piece.guarded) {
        std::free(memory);
        return;
    }
    const size_t body = (piece.bytes + PAGE - 1) / PAGE * PAGE;
    munmap(memory + (piece.bytes + 15) / 16 * 16 - body, body + PAGE);
}

bool is_in(const std::map<char*, Piece>& pieces, const void* memory) {
    auto next = pieces.upper_bound(static_cast<char*>(const_cast<void*>(memory)));
    if (next == pieces.begin()) {
        return false;
    }
    const auto& [begin, piece] = *std::prev(next);
    return memory < begin + piece.bytes;
}

bool capturing_anywhere() {
    for (const Stream* stream : streams) {
        if (stream->capturing) {
            return true;
        }
    }
    return false;
}

const char* in_capture() { return capturing_anywhere() ? " while a stream captures" : ""; }

enum Direction { HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE };
const char* const DIRECTIONS[] = {"host to host", "host to device", "device to host",
                                  "device to device", "default"};

// ------------------------------------------------------------------------- kernels

struct Module {
    void* library;
};
struct Function {
    std::string name;
    const emulated::Kernel* kernel;
    int most_shared = 48 << 10;
};
constexpr int LARGEST_SHARED = 227 << 10;  // bytes of a block
unsigned launches;

// A copy of a launch's arguments.
std::shared_ptr<std::vector<std::vector<char>>> copied(const emulated::Kernel* kernel,
                                                       void** arguments) {
    auto values = std::make_shared<std::vector<std::vector<char>>>();
    for (int i = 0; i < kernel->parameters; ++i) {
        const char* value = static_cast<char*>(arguments[i]);
        values->emplace_back(value, value + kernel->sizes[i]);
    }
    return values;
}

// Attributes of an H100, by their numbers.
const std::map<int, int> ATTRIBUTES = {
    {1, 1024},  // threads of a block
    {2, 1024},
    {3, 1024},
    {4, 64},  // a block's sizes
    {5, 2147483647},
    {6, 65535},
    {7, 65535},     // a grid's sizes
    {8, 48 << 10},  // bytes of shared memory of a block
    {10, 32},       // threads of a warp
    {12, 65536},    // registers of a block
    {13, 1980000},  // clock rate, kHz
    {16, 132},      // multiprocessors
    {36, 2619000},  // memory clock rate, kHz
    {37, 5120},     // bits of the memory bus
    {39, 2048},     // threads of a multiprocessor
    {75, 9},
    {76, 0},          // compute capability
    {81, 228 << 10},  // bytes of shared memory of a multiprocessor
    {87, 2},          // rate of float32 over that of float64
    {97, LARGEST_SHARED},
};

struct Graph {
    std::vector<Work> works;
};

struct Event {
    Stream* stream;
    size_t count;
};

}  // namespace

extern "C" {

// ------------------------------------------------------------------------- for tests

void emulated_set_streams(int which) {
    finish_all();
    late = which;
}
void emulated_set_guarded(int on) { guarded = on; }
void emulated_set_memory(size_t bytes) { total_memory = bytes; }
void emulated_log_start(void) {
    log_text.clear();
    logging = true;
}
const char* emulated_log_end(void) {
    logging = false;
    return log_text.c_str();
}
void emulated_fail(const char* kind, long calls, int error, int lasting) {
    failure = {kind, calls, error, lasting != 0};
    lost = 0;
}
int emulated_failing(const char* kind) { return failing(kind); }
void emulated_note(const char* line) { note("%s", line); }
void emulated_submit_product(void* stream, void (*run)(void*), void* data) {
    Stream* s = stream_of(stream);
    if (s->capturing) {
        s->invalid = true;
        return;
    }
    submit(s, [=] { run(data); });
}

// ------------------------------------------------------------------------- the runtime

int emulated_cudaGetDeviceCount(int* count) { return *count = 1, SUCCESS; }
int emulated_cudaGetDevice(int* device) { return *device = 0, lost; }
int emulated_cudaSetDevice(int) { return lost; }
int emulated_cudaRuntimeGetVersion(int* version) { return *version = 13000, SUCCESS; }
int emulated_cudaDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
int emulated_cudaMemGetInfo(size_t* free, size_t* total) {
    return *free = total_memory - used_memory, *total = total_memory, lost;
}

int emulated_cudaDeviceGetAttribute(int* value, int attribute, int) {
    const auto found = ATTRIBUTES.find(attribute);
    *value = found == ATTRIBUTES.end() ? 0 : found->second;
    return lost;
}

int emulated_cudaGetDeviceProperties(char* properties, int) {
    memset(properties, 0, 1008);
    strcpy(properties, "an emulated GPU");
    *reinterpret_cast<size_t*>(properties + 288) = total_memory;
    const std::pair<int, int> values[] = {{296, 48 << 10}, {304, 65536}, {308, 32},  {320, 1024},
                                          {360, 9},        {384, 132},   {592, 5120}};
    for (const auto& [offset, value] : values) {
        memcpy(properties + offset, &value, sizeof value);
    }
    return lost;
}

int emulated_cudaMalloc(void** memory, size_t bytes) {
    note("allocate %zu%s", bytes, in_capture());
    *memory = nullptr;
    if (const int error = failing("allocation")) {
        return error;
    }
    if (used_memory + bytes > total_memory) {
        return OUT_OF_MEMORY;
    }
    bytes = std::max(bytes, size_t(1));
    char* begin = allocate(bytes);
    allocated[begin] = {bytes, guarded};
    used_memory += bytes;
    *memory = begin;
    return SUCCESS;
}

int emulated_cudaFree(void* memory) {
    note("free%s", in_capture());
    finish_all();  // cudaFree waits for the device
    const auto found = allocated.find(static_cast<char*>(memory));
    if (found != allocated.end()) {
        used_memory -= found->second.bytes;
        release(found->first, found->second);
        allocated.erase(found);
    }
    return lost;
}

int emulated_cudaHostAlloc(void** memory, size_t bytes, unsigned) {
    note("allocate %zu on the host%s", bytes, in_capture());
    char* piece = static_cast<char*>(std::aligned_alloc(PAGE, (bytes + PAGE - 1) / PAGE * PAGE));
    pinned[piece] = {bytes, false};
    *memory = piece;
    return lost;
}

int emulated_cudaFreeHost(void* memory) {
    finish_all();
    pinned.erase(static_cast<char*>(memory));
    std::free(memory);
    return lost;
}

int emulated_cudaMemcpyAsync(void* to, const void* from, size_t bytes, int direction,
                             void* handle) {
    Stream* stream = stream_of(handle);
    note("copy %zu %s stream %d", bytes, DIRECTIONS[direction], stream->number);
    if (const int error = failing("copy")) {
        return error;
    }
    if (stream->capturing && direction != DEVICE_TO_DEVICE) {
        stream->invalid = true;
        return CAPTURE_UNSUPPORTED;
    }
    if (direction == HOST_TO_DEVICE && !is_in(pinned, from)) {  // copied before the call returns
        const char* bytes_of = static_cast<const char*>(from);
        auto staged = std::make_shared<std::vector<char>>(bytes_of, bytes_of + bytes);
        return submit(stream, [=] { memcpy(to, staged->data(), bytes); });
    }
    const int error = submit(stream, [=] { memcpy(to, from, bytes); });
    if (direction == DEVICE_TO_HOST && !is_in(pinned, to)) {  // the call returns after the copy
        finish(stream);
    }
    return error == SUCCESS ? lost : error;
}

int emulated_cudaMemcpy(void* to, const void* from, size_t bytes, int direction) {
    const int error = emulated_cudaMemcpyAsync(to, from, bytes, direction, nullptr);
    note("wait for stream 0");
    finish(&null_stream);
    return error == SUCCESS ? lost : error;
}

int emulated_cudaMemsetAsync(void* to, int value, size_t bytes, void* handle) {
    Stream* stream = stream_of(handle);
    note("set %zu stream %d", bytes, stream->number);
    return submit(stream, [=] { memset(to, value, bytes); });
}

int emulated_cudaMemset(void* to, int value, size_t bytes) {
    return emulated_cudaMemsetAsync(to, value, bytes, nullptr);
}

int emulated_cudaPointerGetAttributes(char* attributes, const void* memory) {
    memset(attributes, 0, 88);
    const int type = is_in(allocated, memory) ? 2 : is_in(pinned, memory) ? 1 : 0;
    memcpy(attributes, &type, sizeof type);
    return lost;
}

int emulated_cudaStreamCreateWithPriority(void** handle, unsigned flags, int) {
    Stream* stream = new Stream{++last_number, (flags & 1) == 0};
    streams.push_back(stream);
    *handle = stream;
    note("create stream %d", stream->number);
    return lost;
}
int emulated_cudaStreamCreate(void** stream) {
    return emulated_cudaStreamCreateWithPriority(stream, 0, 0);
}
int emulated_cudaStreamCreateWithFlags(void** stream, unsigned flags) {
    return emulated_cudaStreamCreateWithPriority(stream, flags, 0);
}
int emulated_cudaStreamDestroy(void* handle) {
    finish(stream_of(handle));  // others may still wait for it, so it stays in memory
    return lost;
}
int emulated_cudaStreamSynchronize(void* handle) {
    note("wait for stream %d", stream_of(handle)->number);
    return wait(stream_of(handle));
}
int emulated_cudaStreamQuery(void* handle) {
    const Stream* stream = stream_of(handle);
    return stream->done == stream->asked ? lost : NOT_READY;
}
int emulated_cudaStreamGetFlags(void* handle, unsigned* flags) {
    return *flags = !stream_of(handle)->blocking, lost;
}
int emulated_cudaDeviceSynchronize(void) {
    note("wait for the device");
    if (capturing_anywhere()) {
        return CAPTURE_UNSUPPORTED;
    }
    if (const int error = failing("wait")) {
        return error;
    }
    finish_all();
    return lost;
}

int emulated_cudaStreamBeginCapture(void* handle, int) {
    Stream* stream = stream_of(handle);
    if (stream == &null_stream || stream->capturing) {
        return CAPTURE_UNSUPPORTED;
    }
    stream->capturing = true;
    stream->invalid = false;
    stream->captured.clear();
    note("begin capture on stream %d", stream->number);
    return lost;
}
int emulated_cudaStreamEndCapture(void* handle, void** graph) {
    Stream* stream = stream_of(handle);
    stream->capturing = false;
    *graph = nullptr;
    if (stream->invalid) {
        return CAPTURE_INVALIDATED;
    }
    note("end capture of %zu on stream %d", stream->captured.size(), stream->number);
    *graph = new Graph{std::move(stream->captured)};
    stream->captured.clear();
    return lost;
}
int emulated_cudaStreamIsCapturing(void* handle, int* status) {
    const Stream* stream = stream_of(handle);
    return *status = stream->capturing ? 1 + stream->invalid : 0, lost;
}

int emulated_cudaGraphInstantiate(void** executable, void* graph, unsigned long long) {
    *executable = new Graph(*static_cast<Graph*>(graph));
    return lost;
}
int emulated_cudaGraphLaunch(void* executable, void* handle) {
    const Graph* graph = static_cast<Graph*>(executable);
    note("launch graph of %zu stream %d", graph->works.size(), stream_of(handle)->number);
    if (const int error = failing("launch")) {
        return error;
    }
    return submit(stream_of(handle), [=] {
        for (const Work& work : graph->works) {
            work();
        }
    });
}
int emulated_cudaGraphUpload(void*, void* handle) {
    note("upload graph stream %d", stream_of(handle)->number);
    return lost;
}
int emulated_cudaGraphDestroy(void* graph) {
    delete static_cast<Graph*>(graph);
    return lost;
}
int emulated_cudaGraphExecDestroy(void* executable) {
    finish_all();
    delete static_cast<Graph*>(executable);
    return lost;
}

int emulated_cudaEventCreateWithFlags(void** event, unsigned) {
    return *event = new Event{nullptr, 0}, lost;
}
int emulated_cudaEventCreate(void** event) { return emulated_cudaEventCreateWithFlags(event, 0); }
int emulated_cudaEventDestroy(void* event) {
    delete static_cast<Event*>(event);
    return SUCCESS;
}
int emulated_cudaEventRecord(void* event, void* handle) {
    Stream* stream = stream_of(handle);
    note("record stream %d", stream->number);
    if (stream->blocking) {
        wait_for(stream, &null_stream);
    }
    for (Stream* other : streams) {
        if (stream == &null_stream && other->blocking) {
            wait_for(stream, other);
        }
    }
    *static_cast<Event*>(event) = {stream, stream->asked};
    return lost;
}
int emulated_cudaStreamWaitEvent(void* handle, void* event, unsigned) {
    Stream* stream = stream_of(handle);
    const auto [other, count] = *static_cast<Event*>(event);
    note("stream %d waits for stream %d", stream->number, other == nullptr ? -1 : other->number);
    if (stream->capturing) {
        stream->invalid = true;
        return CAPTURE_ISOLATION;
    }
    if (other == nullptr || other == stream || other->done >= count) {
        return lost;
    }
    return submit(stream, [other = other, count = count] { finish(other, count); });
}
int emulated_cudaEventQuery(void* event) {
    const auto [stream, count] = *static_cast<Event*>(event);
    return stream == nullptr || stream->done >= count ? lost : NOT_READY;
}
int emulated_cudaEventSynchronize(void* event) {
    const auto [stream, count] = *static_cast<Event*>(event);
    note("wait for stream %d", stream == nullptr ? -1 : stream->number);
    if (const int error = failing("wait")) {
        return error;
    }
    if (stream != nullptr) {
        finish(stream, count);
    }
    return lost;
}
int emulated_cudaEventElapsedTime(float* milliseconds, void*, void*) {
    return *milliseconds = 1, lost;  // there is no time on this device
}

const char* emulated_cudaGetErrorName(int error) {
    static const std::map<int, const char*> names = {
        {INVALID_VALUE, "cudaErrorInvalidValue"},
        {OUT_OF_MEMORY, "cudaErrorMemoryAllocation"},
        {46, "cudaErrorDevicesUnavailable"},
        {ILLEGAL_ADDRESS, "cudaErrorIllegalAddress"},
        {LAUNCH_FAILED, "cudaErrorLaunchFailure"},
        {NOT_SUPPORTED, "cudaErrorNotSupported"},
        {CAPTURE_UNSUPPORTED, "cudaErrorStreamCaptureUnsupported"},
        {CAPTURE_INVALIDATED, "cudaErrorStreamCaptureInvalidated"},
        {CAPTURE_ISOLATION, "cudaErrorStreamCaptureIsolation"},
        {CAPTURE_IMPLICIT, "cudaErrorStreamCaptureImplicit"},
        {999, "cudaErrorUnknown"},
    };
    const auto found = names.find(error);
    return found == names.end() ? "cudaError" : found->second;
}
const char* emulated_cudaGetErrorString(int) { return "on the emulated GPU"; }
int last_error;
int emulated_cudaGetLastError(void) {
    const int error = last_error;
    last_error = SUCCESS;
    return error;
}
int emulated_cudaPeekAtLastError(void) { return last_error; }

int emulated_cudaFuncGetAttributes(char* attributes, const void*) {
    memset(attributes, 0, 144);
    const std::pair<int, int> values[] = {{24, 1024}, {28, 32}, {32, 90}, {36, 90}};
    for (const auto& [offset, value] : values) {
        memcpy(attributes + offset, &value, sizeof value);
    }
    return lost;
}
int emulated_cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
    return *blocks = 4, lost;
}
int emulated_cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int,
                                                                    size_t, unsigned) {
    return *blocks = 4, lost;
}
// CUB's and Thrust's kernels are in CuPy's wheel, compiled for GPUs.
int emulated_cudaLaunchKernel(...) {
    fprintf(stderr, "emulated GPU: CUB and Thrust are compiled for GPUs\n");
    return last_error = NOT_SUPPORTED;
}
int emulated_cudaLaunchKernelExC(...) { return emulated_cudaLaunchKernel(); }
// In place of all other functions of the runtime.
int emulated_other(void) {
    fprintf(stderr, "emulated GPU: CuPy called a function that is not emulated\n");
    return NOT_SUPPORTED;
}

// ------------------------------------------------------------------------- the driver

int cuGetErrorName(int error, const char** name) {
    *name = error == NOT_FOUND         ? "CUDA_ERROR_NOT_FOUND"
            : error == INVALID_VALUE   ? "CUDA_ERROR_INVALID_VALUE"
            : error == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS"
                                       : "CUDA_ERROR_UNKNOWN";
    return SUCCESS;
}
int cuGetErrorString(int, const char** text) { return *text = "on the emulated GPU", SUCCESS; }

// The image is a shared library, as `__init__.py` compiled it. Its size is not given: an ELF file
// ends with its table of sections or with the last section.
int cuModuleLoadData(Module** module, const char* image) {
    if (memcmp(image, ELFMAG, SELFMAG) != 0) {
        return INVALID_IMAGE;
    }
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image);
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image + header->e_shoff);
    size_t size = header->e_shoff + size_t(header->e_shnum) * header->e_shentsize;
    for (int i = 0; i < header->e_shnum; ++i) {
        if (sections[i].sh_type != SHT_NOBITS) {
            size = std::max(size, size_t(sections[i].sh_offset + sections[i].sh_size));
        }
    }
    const char* directory = getenv("TMPDIR");
    std::string path = std::string(directory == nullptr ? P_tmpdir : directory) + "/kernel-XXXXXX";
    const int file = mkstemp(path.data());
    const bool written = file >= 0 && write(file, image, size) == ssize_t(size);
    if (file >= 0) {
        close(file);
    }
    void* library = written ? dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (written && library == nullptr) {
        fprintf(stderr, "emulated GPU: %s\n", dlerror());
    }
    unlink(path.c_str());
    if (library == nullptr) {
        return INVALID_IMAGE;
    }
    note("load module%s", in_capture());
    *module = new Module{library};
    return lost;
}
int cuModuleLoad(void*, const char*) { return NOT_FOUND; }
int cuModuleUnload(Module*) {
    finish_all();
    return SUCCESS;
}
int cuModuleGetFunction(Function** function, Module* module, const char* name) {
    using Get = const emulated::Kernel* (*)();
    const auto get =
        reinterpret_cast<Get>(dlsym(module->library, (std::string("emulated_") + name).c_str()));
    if (get == nullptr) {
        return NOT_FOUND;
    }
    *function = new Function{name, get()};
    return lost;
}
int cuModuleGetGlobal_v2(void**, size_t*, Module*, const char*) { return NOT_FOUND; }

int cuLaunchKernel(Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                   void* handle, void** arguments, void**) {
    Stream* stream = stream_of(handle);
    const size_t threads = size_t(block_x) * block_y * block_z;
    note("launch %s grid %u,%u,%u block %zu shared %u stream %d%s", function->name.c_str(), grid_x,
         grid_y, grid_z, threads, shared, stream->number, stream->capturing ? " captured" : "");
    if (const int error = failing("launch")) {
        return error;
    }
    if (grid_x == 0 || grid_x > 2147483647u || grid_y == 0 || grid_y > 65535 || grid_z == 0 ||
        grid_z > 65535 || threads == 0 || threads > 1024 || int(shared) > function->most_shared) {
        return INVALID_VALUE;
    }
    const emulated::Kernel* kernel = function->kernel;
    const auto values = copied(kernel, arguments);
    return submit(stream, [=, name = function->name] {
        if (lost != 0) {
            return;
        }
        std::vector<void*> addresses;
        for (std::vector<char>& value : *values) {
            addresses.push_back(value.data());
        }
        const unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
        if (emulated_run(kernel, grid, block, shared, addresses.data(), ++launches, 0)) {
            fprintf(stderr, "emulated GPU: %s: a barrier that not all threads came to\n",
                    name.c_str());
            lost = LAUNCH_FAILED;
        }
    });
}
int cuLaunchCooperativeKernel(...) { return NOT_SUPPORTED; }

int cuFuncGetAttribute(int* value, int attribute, const Function* function) {
    return *value = attribute == 8 ? function->most_shared : 32, lost;
}
int cuFuncSetAttribute(Function* function, int attribute, int value) {
    if (attribute == 8) {
        if (value > LARGEST_SHARED) {
            return INVALID_VALUE;
        }
        function->most_shared = value;
    }
    return lost;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function*, int, size_t) {
    return *blocks = 4, lost;
}
int cuOccupancyMaxPotentialBlockSize(int* grid, int* block, Function*, void*, size_t, int) {
    return *grid = 132, *block = 256, lost;
}
#define NOTHING(name) \
    int name(...) { return lost; }
NOTHING(cuInit)
NOTHING(cuCtxGetCurrent)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxGetDevice)
NOTHING(cuCtxCreate_v2)
NOTHING(cuCtxCreate_v4)
NOTHING(cuCtxDestroy_v2)
NOTHING(cuDevicePrimaryCtxRelease_v2)
NOTHING(cuDevicePrimaryCtxRelease)
NOTHING(cuStreamGetCtx)
NOTHING(cuLinkCreate_v2)
NOTHING(cuLinkAddData_v2)
NOTHING(cuLinkAddFile_v2)
NOTHING(cuLinkComplete)
NOTHING(cuLinkDestroy)
}
