// A CUDA driver without a GPU: a libcuda.so.1 with the calls that our CUDA code makes, so that all of it runs anywhere.
//
// Device memory is host memory, kernels are our `.cu` sources compiled for the CPU (shim.h). It is an instrument for
// tests, so wherever CUDA leaves something open, the outcome that hides least is chosen:
//
// - Queued work runs as late as possible: when its stream, event or context is waited for, or a stream that waits for
//   it has to go on. A result read too early is poison; a source changed too early copies the change. Streams without
//   an order between them run in the reverse order of their creation. A query first answers "not ready".
// - New memory and the target of a queued copy to the host are filled with 0xFB, freed memory with 0xFD. Both sides of
//   an allocation have a margin that is checked, and freed memory is kept for a while and checked, too.
// - Copies to the device from memory that is not pinned take its bytes at once, copies from the device to such memory
//   wait for the stream: as the real driver does.
// - Ranges, handles, block sizes and grids are validated. What CUDA refuses is refused with its code, and a line on
//   stderr says why. What would corrupt memory unnoticed aborts.
//
// SAFEGENE_FAKE_CUDA is a list with commas of
//   order=late|early         `early` runs all work when it is queued
//   blocks=up|down|SEED      order of the blocks of a launch; `threads=` likewise, within a block
//   devices=N                default 1. With 0, cuInit still succeeds; fail=cuInit:*:100 is a driver without a GPU
//   memory=BYTES             of each device, default 2 GiB
//   cc=MAJOR.MINOR           compute capability, default 9.0
//   driver=VERSION           default 13000
//   fail=SYMBOL:NTH:CODE     the NTH call (from 1, or `*` for all) of a function returns CODE and does nothing; may be
//                            repeated. Codes of device faults (700, 719, ...) stay: all later calls return them, too
//   log                      a line on stderr for every call
//   stats=FILE               at exit, counts of calls, launches and bytes as JSON; `%p` in FILE is the process id
//
// Not here: graphs, textures, managed memory, peer access, everything else we do not call.

#include "shim.h"

#ifdef KERNEL_SOURCE
#include KERNEL_SOURCE
#endif

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include <unistd.h>

namespace {

// --- what CUDA calls its errors -----------------------------------------------------------------------------------

#define ERRORS(E)                                                                              \
    E(0, CUDA_SUCCESS, "no error")                                                             \
    E(1, CUDA_ERROR_INVALID_VALUE, "invalid argument")                                         \
    E(2, CUDA_ERROR_OUT_OF_MEMORY, "out of memory")                                            \
    E(3, CUDA_ERROR_NOT_INITIALIZED, "initialization error")                                   \
    E(4, CUDA_ERROR_DEINITIALIZED, "driver shutting down")                                     \
    E(34, CUDA_ERROR_STUB_LIBRARY, "CUDA driver is a stub library")                            \
    E(46, CUDA_ERROR_DEVICE_UNAVAILABLE, "CUDA-capable device(s) is/are busy or unavailable")  \
    E(100, CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected")                         \
    E(101, CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal")                                \
    E(200, CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid")                         \
    E(201, CUDA_ERROR_INVALID_CONTEXT, "invalid device context")                               \
    E(209, CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device") \
    E(214, CUDA_ERROR_ECC_UNCORRECTABLE, "uncorrectable ECC error encountered")                \
    E(218, CUDA_ERROR_INVALID_PTX, "a PTX JIT compilation failed")                             \
    E(220, CUDA_ERROR_NVLINK_UNCORRECTABLE, "uncorrectable NVLink error detected during the execution") \
    E(221, CUDA_ERROR_JIT_COMPILER_NOT_FOUND, "PTX JIT compiler library not found")            \
    E(222, CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "the provided PTX was compiled with an unsupported toolchain.") \
    E(300, CUDA_ERROR_INVALID_SOURCE, "device kernel image is invalid")                        \
    E(301, CUDA_ERROR_FILE_NOT_FOUND, "file not found")                                        \
    E(304, CUDA_ERROR_OPERATING_SYSTEM, "OS call failed or operation not supported on this OS") \
    E(400, CUDA_ERROR_INVALID_HANDLE, "invalid resource handle")                               \
    E(401, CUDA_ERROR_ILLEGAL_STATE, "the operation cannot be performed in the present state") \
    E(500, CUDA_ERROR_NOT_FOUND, "named symbol not found")                                     \
    E(600, CUDA_ERROR_NOT_READY, "device not ready")                                           \
    E(700, CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered")             \
    E(701, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch")      \
    E(702, CUDA_ERROR_LAUNCH_TIMEOUT, "the launch timed out and was terminated")               \
    E(709, CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed")                            \
    E(710, CUDA_ERROR_ASSERT, "device-side assert triggered")                                  \
    E(712, CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "part or all of the requested memory range is already mapped") \
    E(713, CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "pointer does not correspond to a registered memory region") \
    E(714, CUDA_ERROR_HARDWARE_STACK_ERROR, "hardware stack error")                            \
    E(715, CUDA_ERROR_ILLEGAL_INSTRUCTION, "an illegal instruction was encountered")           \
    E(716, CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address")                                \
    E(717, CUDA_ERROR_INVALID_ADDRESS_SPACE, "operation not supported on global/shared address space") \
    E(718, CUDA_ERROR_INVALID_PC, "invalid program counter")                                   \
    E(719, CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure")                             \
    E(800, CUDA_ERROR_NOT_PERMITTED, "operation not permitted")                                \
    E(801, CUDA_ERROR_NOT_SUPPORTED, "operation not supported")                                \
    E(802, CUDA_ERROR_SYSTEM_NOT_READY, "system not yet initialized")                          \
    E(803, CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "system has unsupported display driver / cuda driver combination") \
    E(804, CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE, "forward compatibility was attempted on non supported HW") \
    E(908, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "attempt to terminate a thread-local capture sequence from another thread") \
    E(909, CUDA_ERROR_TIMEOUT, "wait operation timed out")                                     \
    E(999, CUDA_ERROR_UNKNOWN, "unknown error")

#define E(code, name, text) name = code,
enum : int { ERRORS(E) };
#undef E

struct ErrorText {
    int code;
    const char *name, *text;
};
#define E(code, name, text) {code, #name, text},
constexpr ErrorText ERROR_TEXTS[] = {ERRORS(E)};
#undef E

const ErrorText* error_text(int code) {
    for (const ErrorText& error : ERROR_TEXTS)
        if (error.code == code) return &error;
    return nullptr;
}

// After these a context is of no use any more.
bool stays(int code) {
    return code == 214 || code == 220 || code == 700 || code == 702 || code == 710 || (code >= 714 && code <= 719);
}

// --- settings -----------------------------------------------------------------------------------------------------

__attribute__((format(printf, 1, 2))) [[noreturn]] void fatal(const char* format, ...) {
    std::fputs("fake-cuda: ", stderr);
    va_list list;
    va_start(list, format);
    std::vfprintf(stderr, format, list);
    va_end(list);
    std::fputc('\n', stderr);
    std::abort();
}

struct Failure {
    std::string symbol;
    uint64_t nth; // 0 for every call
    int code;
};

struct Settings {
    bool early = false;
    bool log = false;
    shim::Orders orders;
    int devices = 1;
    size_t memory_bytes = size_t{2} << 30;
    int cc_major = 9, cc_minor = 0;
    int driver = 13000;
    std::vector<Failure> failures;
    std::string stats;
};

uint64_t number(const std::string& item, const std::string& digits) {
    char* end = nullptr;
    const uint64_t value = std::strtoull(digits.c_str(), &end, 10);
    if (digits.empty() || *end != '\0') fatal("SAFEGENE_FAKE_CUDA: `%s` has no number", item.c_str());
    return value;
}

shim::Order order_of(const std::string& item, const std::string& value) {
    if (value == "up") return {shim::Order::UP, 0};
    if (value == "down") return {shim::Order::DOWN, 0};
    return {shim::Order::SHUFFLED, number(item, value)};
}

Failure failure_of(const std::string& item, const std::string& value) {
    const size_t a = value.find(':'), b = value.find(':', a + 1);
    if (a == std::string::npos || b == std::string::npos)
        fatal("SAFEGENE_FAKE_CUDA: `%s` is not fail=SYMBOL:NTH:CODE", item.c_str());
    const std::string nth = value.substr(a + 1, b - a - 1);
    const Failure failure{value.substr(0, a), nth == "*" ? 0 : number(item, nth),
                          static_cast<int>(number(item, value.substr(b + 1)))};
    // The Rust side makes an enum of it, which must not hold anything else.
    if (!error_text(failure.code)) fatal("SAFEGENE_FAKE_CUDA: `%s`: no such code", item.c_str());
    return failure;
}

Settings read_settings() {
    Settings settings;
    const char* text = std::getenv("SAFEGENE_FAKE_CUDA");
    std::string rest = text ? text : "";
    while (!rest.empty()) {
        const size_t comma = std::min(rest.find(','), rest.size());
        const std::string item = rest.substr(0, comma);
        rest.erase(0, comma + 1);
        if (item.empty()) continue;
        const size_t equals = std::min(item.find('='), item.size());
        const std::string key = item.substr(0, equals);
        const std::string value = equals < item.size() ? item.substr(equals + 1) : "";
        if (item == "log") settings.log = true;
        else if (item == "order=late") settings.early = false;
        else if (item == "order=early") settings.early = true;
        else if (key == "blocks") settings.orders.blocks = order_of(item, value);
        else if (key == "threads") settings.orders.threads = order_of(item, value);
        else if (key == "devices") settings.devices = static_cast<int>(number(item, value));
        else if (key == "memory") settings.memory_bytes = number(item, value);
        else if (key == "driver") settings.driver = static_cast<int>(number(item, value));
        else if (key == "stats") settings.stats = value;
        else if (key == "fail") settings.failures.push_back(failure_of(item, value));
        else if (key == "cc" && value.find('.') != std::string::npos) {
            settings.cc_major = static_cast<int>(number(item, value.substr(0, value.find('.'))));
            settings.cc_minor = static_cast<int>(number(item, value.substr(value.find('.') + 1)));
        } else fatal("SAFEGENE_FAKE_CUDA: `%s` is not known", item.c_str());
    }
    return settings;
}

// --- state, all of it behind one lock -----------------------------------------------------------------------------

constexpr size_t MARGIN_BYTES = 4096;
constexpr size_t QUARANTINE_BYTES = size_t{64} << 20;
constexpr unsigned char NEW = 0xFB, FREED = 0xFD, MARGIN = 0xCA;

struct Stream;

struct Device {
    int ordinal;
    int retained = 0; // the primary context exists while this is above zero
    int broken = 0;   // an error that stays
    size_t used_bytes = 0;
    Stream* default_stream = nullptr;
    std::vector<Stream*> streams; // every stream there was, by age
    std::vector<std::string> ran; // kernels since the margins were last checked
};

struct Allocation {
    uint64_t id;
    Device* device;
    char* block; // margin, data, margin
    char* data;
    size_t bytes;
    bool free_queued = false;
};

struct Op {
    std::function<void()> run;
    Stream* after = nullptr; // run nothing, but wait for this stream to have done `after_count`
    uint64_t after_count = 0;
    const char* host_reads = nullptr; // pinned memory in use until this has run
    const char* host_writes = nullptr;
    size_t host_bytes = 0;
};

// Kept when destroyed, as others may wait for what it did.
struct Stream {
    uint64_t id;
    Device* device;
    bool with_default; // ordered with the default stream, as all that are not made with CU_STREAM_NON_BLOCKING
    bool alive = true;
    std::deque<Op> queue;
    uint64_t queued = 0, done = 0, asked = 0;
};

using Time = std::chrono::steady_clock::time_point;

struct Event {
    Device* device;
    bool timed;
    Stream* stream = nullptr; // of the last record
    uint64_t count = 0;       // what that stream has done when the event is complete
    std::shared_ptr<Time> at;
};

struct Module {
    std::set<std::unique_ptr<struct Function>> functions;
};

struct Function {
    const shim::Kernel* kernel;
};

struct Launches {
    uint64_t count = 0;
    unsigned grid_z_max = 0;
};

struct Bytes {
    uint64_t htod_pinned = 0, htod_unpinned = 0, dtoh_pinned = 0, dtoh_unpinned = 0, dtod = 0, memset = 0;
};

struct Driver {
    std::mutex lock;
    Settings settings = read_settings();
    bool initialised = false;
    std::vector<Device> devices;
    uint64_t last_id = 0;

    std::map<uintptr_t, Allocation> allocations; // by their first byte
    std::deque<Allocation> quarantine;
    size_t quarantine_bytes = 0;
    struct Pinned {
        size_t bytes;
        bool ours;
    };
    std::map<uintptr_t, Pinned> pinned;

    std::set<Stream*> streams;
    std::set<Event*> events;
    std::set<Module*> modules;
    std::set<const Function*> functions;

    std::map<std::string, uint64_t> calls;
    std::map<std::string, Launches> launches;
    Bytes bytes;
    uint64_t failed_on_purpose = 0;

    Driver() : devices(static_cast<size_t>(std::max(settings.devices, 0))) {
        for (size_t i = 0; i < devices.size(); ++i) devices[i].ordinal = static_cast<int>(i);
    }
};

// Never freed: other threads may call until the very end.
Driver& driver() {
    static Driver* one = new Driver;
    return *one;
}

thread_local Device* current = nullptr;
thread_local std::map<Device*, Stream*> streams_of_thread;

// --- a call -------------------------------------------------------------------------------------------------------

enum Needs { NOTHING, INIT, CONTEXT };

void drop_work(Device* device) {
    for (Stream* stream : device->streams) {
        stream->done = stream->queued;
        stream->queue.clear();
    }
}

// One call of one function: takes the lock, counts, and knows whether the call is refused before it does anything.
struct Call {
    std::lock_guard<std::mutex> guard;
    const char* symbol;
    int refused = CUDA_SUCCESS;

    Call(const char* symbol, Needs needs) : guard(driver().lock), symbol(symbol) {
        Driver& d = driver();
        const uint64_t nth = ++d.calls[symbol];
        for (const Failure& failure : d.settings.failures) {
            if (failure.symbol != symbol || (failure.nth != 0 && failure.nth != nth)) continue;
            ++d.failed_on_purpose;
            refused = failure.code;
            if (stays(refused) && current) {
                current->broken = refused;
                drop_work(current);
            }
            break;
        }
        if (refused == CUDA_SUCCESS && needs >= INIT && !d.initialised) refused = CUDA_ERROR_NOT_INITIALIZED;
        if (refused == CUDA_SUCCESS && needs >= CONTEXT) {
            if (!current || current->retained == 0) refused = CUDA_ERROR_INVALID_CONTEXT;
            else refused = current->broken;
        }
        if (refused != CUDA_SUCCESS) end(refused);
    }

    int end(int code) const {
        if (driver().settings.log) std::fprintf(stderr, "fake-cuda: %s -> %d\n", symbol, code);
        return code;
    }

    // Refuses what a test should hear of even if the caller drops the error.
    __attribute__((format(printf, 3, 4))) int refuse(int code, const char* format, ...) const {
        std::fprintf(stderr, "fake-cuda: %s: ", symbol);
        va_list list;
        va_start(list, format);
        std::vfprintf(stderr, format, list);
        va_end(list);
        std::fputc('\n', stderr);
        return end(code);
    }
};

#define API extern "C" __attribute__((visibility("default"))) int
#define ENTER(needs)                                                                           \
    Call call(__func__, needs);                                                                \
    if (call.refused != CUDA_SUCCESS) return call.refused

// --- memory -------------------------------------------------------------------------------------------------------

bool all(const char* at, size_t bytes, unsigned char value) {
    // Equal to itself one byte on, so every byte is the first.
    return bytes == 0 || (static_cast<unsigned char>(at[0]) == value && std::memcmp(at, at + 1, bytes - 1) == 0);
}

std::string kernels_ran(const Device* device) {
    std::string names;
    for (const std::string& name : device->ran) names += (names.empty() ? "" : ", ") + name;
    return names.empty() ? "none" : names;
}

void check_margins(const Allocation& a) {
    const bool before = all(a.block, static_cast<size_t>(a.data - a.block), MARGIN);
    if (before && all(a.data + a.bytes, MARGIN_BYTES, MARGIN)) return;
    fatal("memory %s allocation %llu of %zu bytes was overwritten; kernels since the last check: %s",
          before ? "behind" : "before", static_cast<unsigned long long>(a.id), a.bytes,
          kernels_ran(a.device).c_str());
}

void check_all_margins(Device* device) {
    if (device->ran.empty()) return;
    for (const auto& [at, allocation] : driver().allocations)
        if (allocation.device == device) check_margins(allocation);
    device->ran.clear();
}

void check_freed(const Allocation& a) {
    if (all(a.data, a.bytes, FREED)) return;
    fatal("allocation %llu of %zu bytes was written after it was freed", static_cast<unsigned long long>(a.id),
          a.bytes);
}

// The live allocation that holds the whole range.
Allocation* find_allocation(uintptr_t at, size_t bytes) {
    auto& all = driver().allocations;
    auto next = all.upper_bound(at);
    if (next == all.begin()) return nullptr;
    Allocation& a = std::prev(next)->second;
    const uintptr_t offset = at - reinterpret_cast<uintptr_t>(a.data);
    return offset <= a.bytes && bytes <= a.bytes - offset && !a.free_queued ? &a : nullptr;
}

void release(Allocation& a) {
    Driver& d = driver();
    check_margins(a);
    a.device->used_bytes -= a.bytes;
    std::memset(a.data, FREED, a.bytes);
    Allocation freed = a;
    d.allocations.erase(reinterpret_cast<uintptr_t>(a.data));
    d.quarantine.push_back(freed);
    d.quarantine_bytes += freed.bytes;
    while (d.quarantine_bytes > QUARANTINE_BYTES) {
        const Allocation old = d.quarantine.front();
        d.quarantine.pop_front();
        d.quarantine_bytes -= old.bytes;
        check_freed(old);
        std::free(old.block);
    }
}

enum class Host { UNPINNED, PINNED, PARTLY };

Host host_kind(const void* at, size_t bytes) {
    const uintptr_t low = reinterpret_cast<uintptr_t>(at), high = low + bytes;
    for (const auto& [first, range] : driver().pinned) {
        if (first + range.bytes <= low || high <= first) continue;
        return first <= low && high <= first + range.bytes ? Host::PINNED : Host::PARTLY;
    }
    return Host::UNPINNED;
}

bool overlap(const char* a, size_t a_bytes, const char* b, size_t b_bytes) {
    return a && b && a < b + b_bytes && b < a + a_bytes;
}

// Whether queued work still reads this host memory, or (with `or_writes`) uses it at all.
bool host_in_use(const void* at, size_t bytes, bool or_writes) {
    const char* low = static_cast<const char*>(at);
    for (const Device& device : driver().devices)
        for (const Stream* stream : device.streams)
            for (const Op& op : stream->queue)
                if (overlap(op.host_reads, op.host_bytes, low, bytes) ||
                    (or_writes && overlap(op.host_writes, op.host_bytes, low, bytes)))
                    return true;
    return false;
}

// --- streams ------------------------------------------------------------------------------------------------------

// Runs what `stream` has to have done, and first what that waits for. Waits only look back, so this ends.
void run_until(Stream* stream, uint64_t count) {
    while (stream->done < count && !stream->queue.empty()) {
        const Op op = std::move(stream->queue.front());
        stream->queue.pop_front();
        if (op.after) run_until(op.after, op.after_count);
        if (op.run) op.run();
        ++stream->done;
    }
}

void finish(Stream* stream) {
    run_until(stream, stream->queued);
    check_all_margins(stream->device);
}

void finish_all(Device* device) {
    for (auto stream = device->streams.rbegin(); stream != device->streams.rend(); ++stream)
        run_until(*stream, (*stream)->queued);
    check_all_margins(device);
}

void enqueue_one(Stream* stream, Op op) {
    stream->queue.push_back(std::move(op));
    ++stream->queued;
}

void enqueue(Stream* stream, Op op) {
    const bool is_default = stream == stream->device->default_stream;
    for (Stream* other : stream->device->streams) {
        if (!stream->with_default || !other->with_default || other == stream) continue;
        if ((is_default || other == stream->device->default_stream) && other->done < other->queued) {
            Op wait;
            wait.after = other;
            wait.after_count = other->queued;
            enqueue_one(stream, std::move(wait));
        }
    }
    enqueue_one(stream, std::move(op));
    if (driver().settings.early) finish(stream);
}

Stream* make_stream(Device* device, bool with_default) {
    auto* stream = new Stream{++driver().last_id, device, with_default, true, {}, 0, 0, 0};
    device->streams.push_back(stream);
    driver().streams.insert(stream);
    return stream;
}

// The stream behind a handle, or null: 0 and 1 are the default stream, 2 the calling thread's.
Stream* stream_of(Stream* handle) {
    const uintptr_t value = reinterpret_cast<uintptr_t>(handle);
    if (value <= 1) {
        if (!current->default_stream) current->default_stream = make_stream(current, true);
        return current->default_stream;
    }
    if (value == 2) {
        Stream*& own = streams_of_thread[current];
        if (!own || !own->alive) own = make_stream(current, true);
        return own;
    }
    return driver().streams.count(handle) ? handle : nullptr;
}

#define STREAM(stream, handle)                                                                 \
    Stream* stream = stream_of(handle);                                                        \
    if (!stream) return call.refuse(CUDA_ERROR_INVALID_HANDLE, "no such stream")
#define EVENT(handle)                                                                          \
    if (!driver().events.count(handle)) return call.refuse(CUDA_ERROR_INVALID_HANDLE, "no such event")

using Ptr = unsigned long long;

char* device_pointer(Ptr at) { return reinterpret_cast<char*>(static_cast<uintptr_t>(at)); }

#define DEVICE_RANGE(what, at, bytes)                                                          \
    if (!find_allocation(at, bytes))                                                           \
    return call.refuse(CUDA_ERROR_INVALID_VALUE, "%s: %zu bytes at %#llx are not within one live allocation", what, \
                       static_cast<size_t>(bytes), static_cast<Ptr>(at))

int copy_to_device(Call& call, Ptr to, const void* from, size_t bytes, Stream* handle, bool wait) {
    STREAM(stream, handle);
    if (bytes == 0) return call.end(CUDA_SUCCESS);
    DEVICE_RANGE("target", to, bytes);
    const Host kind = host_kind(from, bytes);
    if (!from || kind == Host::PARTLY || find_allocation(reinterpret_cast<uintptr_t>(from), 1))
        return call.refuse(CUDA_ERROR_INVALID_VALUE, "source: null, on the device, or only partly pinned");
    char* target = device_pointer(to);
    Op op;
    if (kind == Host::PINNED) {
        driver().bytes.htod_pinned += bytes;
        op.host_reads = static_cast<const char*>(from);
        op.host_bytes = bytes;
        op.run = [=] { std::memcpy(target, from, bytes); };
    } else {
        driver().bytes.htod_unpinned += bytes;
        auto staged = std::make_shared<std::string>(static_cast<const char*>(from), bytes);
        op.run = [=] { std::memcpy(target, staged->data(), bytes); };
    }
    enqueue(stream, std::move(op));
    if (wait) finish(stream);
    return call.end(CUDA_SUCCESS);
}

int copy_to_host(Call& call, void* to, Ptr from, size_t bytes, Stream* handle, bool wait) {
    STREAM(stream, handle);
    if (bytes == 0) return call.end(CUDA_SUCCESS);
    DEVICE_RANGE("source", from, bytes);
    const Host kind = host_kind(to, bytes);
    if (!to || kind == Host::PARTLY || find_allocation(reinterpret_cast<uintptr_t>(to), 1))
        return call.refuse(CUDA_ERROR_INVALID_VALUE, "target: null, on the device, or only partly pinned");
    (kind == Host::PINNED ? driver().bytes.dtoh_pinned : driver().bytes.dtoh_unpinned) += bytes;
    const char* source = device_pointer(from);
    Op op;
    op.run = [=] { std::memcpy(to, source, bytes); };
    if (kind == Host::PINNED) {
        op.host_writes = static_cast<const char*>(to);
        op.host_bytes = bytes;
        // Not with bytes that a queued copy has yet to read: that use is in order.
        if (!driver().settings.early && !host_in_use(to, bytes, false)) std::memset(to, NEW, bytes);
    }
    enqueue(stream, std::move(op));
    if (wait || kind == Host::UNPINNED) finish(stream);
    return call.end(CUDA_SUCCESS);
}

// Asynchronous towards the host in both forms, as in CUDA.
int copy_on_device(Call& call, Ptr to, Ptr from, size_t bytes, Stream* handle) {
    STREAM(stream, handle);
    if (bytes == 0) return call.end(CUDA_SUCCESS);
    DEVICE_RANGE("target", to, bytes);
    DEVICE_RANGE("source", from, bytes);
    driver().bytes.dtod += bytes;
    Op op;
    op.run = [=] { std::memmove(device_pointer(to), device_pointer(from), bytes); };
    enqueue(stream, std::move(op));
    return call.end(CUDA_SUCCESS);
}

template <typename T>
int fill(Call& call, Ptr at, T value, size_t count, Stream* handle) {
    STREAM(stream, handle);
    if (count == 0) return call.end(CUDA_SUCCESS);
    if (at % sizeof(T) != 0 || count > SIZE_MAX / sizeof(T))
        return call.refuse(CUDA_ERROR_INVALID_VALUE, "target is not aligned, or too long");
    DEVICE_RANGE("target", at, count * sizeof(T));
    driver().bytes.memset += count * sizeof(T);
    Op op;
    op.run = [=] { std::fill_n(reinterpret_cast<T*>(device_pointer(at)), count, value); };
    enqueue(stream, std::move(op));
    return call.end(CUDA_SUCCESS);
}

int allocate(Call& call, Ptr* out, size_t bytes) {
    Driver& d = driver();
    if (!out) return call.end(CUDA_ERROR_INVALID_VALUE);
    // What queued frees give back can be had, after waiting for them.
    if (bytes > d.settings.memory_bytes - current->used_bytes) finish_all(current);
    if (bytes > d.settings.memory_bytes - current->used_bytes) return call.end(CUDA_ERROR_OUT_OF_MEMORY);
    // Multiples of 256 bytes, as promised by CUDA, but not of 512.
    constexpr size_t before_max = MARGIN_BYTES + 512;
    void* block = nullptr;
    if (posix_memalign(&block, 512, before_max + bytes + MARGIN_BYTES) != 0) return call.end(CUDA_ERROR_OUT_OF_MEMORY);
    Allocation a{++d.last_id, current, static_cast<char*>(block), static_cast<char*>(block) + MARGIN_BYTES + 256, bytes};
    std::memset(a.block, MARGIN, static_cast<size_t>(a.data - a.block));
    std::memset(a.data, NEW, bytes);
    std::memset(a.data + bytes, MARGIN, MARGIN_BYTES);
    current->used_bytes += bytes;
    d.allocations.emplace(reinterpret_cast<uintptr_t>(a.data), a);
    *out = reinterpret_cast<uintptr_t>(a.data);
    return call.end(CUDA_SUCCESS);
}

} // namespace

// --- errors, devices, contexts ------------------------------------------------------------------------------------

API cuGetErrorName(int code, const char** out) {
    ENTER(NOTHING);
    const ErrorText* error = error_text(code);
    *out = error ? error->name : nullptr;
    return call.end(error ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

API cuGetErrorString(int code, const char** out) {
    ENTER(NOTHING);
    const ErrorText* error = error_text(code);
    *out = error ? error->text : nullptr;
    return call.end(error ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

API cuInit(unsigned flags) {
    ENTER(NOTHING);
    if (flags != 0) return call.end(CUDA_ERROR_INVALID_VALUE);
    driver().initialised = true;
    return call.end(CUDA_SUCCESS);
}

API cuDriverGetVersion(int* out) {
    ENTER(NOTHING);
    *out = driver().settings.driver;
    return call.end(CUDA_SUCCESS);
}

// Only there: NVRTC 13 looks for it in any driver, and crashes without it.
API cuGetExportTable(const void** out, const void*) {
    ENTER(NOTHING);
    *out = nullptr;
    return call.refuse(CUDA_ERROR_NOT_FOUND, "no tables");
}

API cuDeviceGetCount(int* out) {
    ENTER(INIT);
    *out = static_cast<int>(driver().devices.size());
    return call.end(CUDA_SUCCESS);
}

API cuDeviceGet(int* out, int ordinal) {
    ENTER(INIT);
    if (ordinal < 0 || static_cast<size_t>(ordinal) >= driver().devices.size())
        return call.end(CUDA_ERROR_INVALID_DEVICE);
    *out = ordinal;
    return call.end(CUDA_SUCCESS);
}

#define DEVICE(device, ordinal)                                                                \
    if ((ordinal) < 0 || static_cast<size_t>(ordinal) >= driver().devices.size())              \
        return call.end(CUDA_ERROR_INVALID_DEVICE);                                            \
    [[maybe_unused]] Device* device = &driver().devices[static_cast<size_t>(ordinal)]

API cuDeviceGetName(char* out, int bytes, int ordinal) {
    ENTER(INIT);
    DEVICE(device, ordinal);
    if (bytes < 1) return call.end(CUDA_ERROR_INVALID_VALUE);
    std::snprintf(out, static_cast<size_t>(bytes), "Fake GPU %d", ordinal);
    return call.end(CUDA_SUCCESS);
}

API cuDeviceTotalMem_v2(size_t* out, int ordinal) {
    ENTER(INIT);
    DEVICE(device, ordinal);
    *out = driver().settings.memory_bytes;
    return call.end(CUDA_SUCCESS);
}

API cuDeviceGetUuid_v2(unsigned char* out, int ordinal) {
    ENTER(INIT);
    DEVICE(device, ordinal);
    std::memset(out, 0xFA, 16);
    out[15] = static_cast<unsigned char>(ordinal);
    return call.end(CUDA_SUCCESS);
}

API cuDeviceGetUuid(unsigned char* out, int ordinal) {
    ENTER(INIT);
    DEVICE(device, ordinal);
    std::memset(out, 0xFA, 16);
    out[15] = static_cast<unsigned char>(ordinal);
    return call.end(CUDA_SUCCESS);
}

// Zero for what is not listed: "does not have it" is a fair answer for most.
API cuDeviceGetAttribute(int* out, int attribute, int ordinal) {
    ENTER(INIT);
    DEVICE(device, ordinal);
    const Settings& settings = driver().settings;
    static const std::map<int, int> fixed = {
        {1, 1024},         // threads per block
        {2, 1024},         // block x
        {3, 1024},         // block y
        {4, 64},           // block z
        {5, 2147483647},   // grid x
        {6, 65535},        // grid y
        {7, 65535},        // grid z
        {8, 48 << 10},     // shared memory per block
        {9, 64 << 10},     // constant memory
        {10, 32},          // warp
        {11, 2147483647},  // pitch
        {12, 65536},       // registers per block
        {13, 1500000},     // clock, kHz
        {14, 512},         // texture alignment
        {15, 1},           // copies overlap with kernels
        {16, 8},           // multiprocessors
        {19, 1},           // can map host memory
        {31, 1},           // concurrent kernels
        {36, 1000000},     // memory clock, kHz
        {37, 256},         // memory bus, bits
        {38, 4 << 20},     // L2 cache
        {39, 2048},        // threads per multiprocessor
        {40, 2},           // copy engines
        {41, 1},           // unified addressing
        {78, 1},           // stream priorities
        {81, 228 << 10},   // shared memory per multiprocessor
        {82, 65536},       // registers per multiprocessor
        {97, 227 << 10},   // shared memory per block, on request
        {99, 1},           // host memory can be registered
        {106, 32},         // blocks per multiprocessor
        {115, 1},          // memory pools
    };
    if (attribute == 75) *out = settings.cc_major;
    else if (attribute == 76) *out = settings.cc_minor;
    else if (attribute == 33) *out = ordinal + 1; // PCI bus
    else {
        const auto found = fixed.find(attribute);
        *out = found == fixed.end() ? 0 : found->second;
    }
    return call.end(CUDA_SUCCESS);
}

API cuDevicePrimaryCtxRetain(Device** out, int ordinal) {
    ENTER(INIT);
    DEVICE(device, ordinal);
    ++device->retained;
    *out = device;
    return call.end(CUDA_SUCCESS);
}

// The last release takes everything with it that was made in the context.
API cuDevicePrimaryCtxRelease_v2(int ordinal) {
    ENTER(INIT);
    DEVICE(device, ordinal);
    if (device->retained == 0) return call.end(CUDA_ERROR_INVALID_CONTEXT);
    if (--device->retained > 0) return call.end(CUDA_SUCCESS);
    if (device->broken == 0) finish_all(device);
    std::vector<Allocation*> left;
    for (auto& [at, allocation] : driver().allocations)
        if (allocation.device == device) left.push_back(&allocation);
    for (Allocation* allocation : left) release(*allocation);
    for (Stream* stream : device->streams) {
        stream->alive = false;
        driver().streams.erase(stream);
    }
    device->streams.clear();
    device->default_stream = nullptr;
    device->broken = 0;
    device->ran.clear();
    return call.end(CUDA_SUCCESS);
}

API cuCtxGetCurrent(Device** out) {
    ENTER(INIT);
    *out = current;
    return call.end(CUDA_SUCCESS);
}

API cuCtxSetCurrent(Device* context) {
    ENTER(INIT);
    if (context) {
        const auto& devices = driver().devices;
        const bool known = !devices.empty() && context >= &devices.front() && context <= &devices.back();
        if (!known || context->retained == 0) return call.end(CUDA_ERROR_INVALID_CONTEXT);
    }
    current = context;
    return call.end(CUDA_SUCCESS);
}

API cuCtxGetDevice(int* out) {
    ENTER(CONTEXT);
    *out = current->ordinal;
    return call.end(CUDA_SUCCESS);
}

API cuCtxSetFlags(unsigned) {
    ENTER(CONTEXT);
    return call.end(CUDA_SUCCESS);
}

API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    ENTER(CONTEXT);
    *least = 0;
    *greatest = -5;
    return call.end(CUDA_SUCCESS);
}

API cuCtxSynchronize() {
    ENTER(CONTEXT);
    finish_all(current);
    return call.end(CUDA_SUCCESS);
}

// --- streams and events -------------------------------------------------------------------------------------------

API cuStreamCreate(Stream** out, unsigned flags) {
    ENTER(CONTEXT);
    if (flags > 1) return call.end(CUDA_ERROR_INVALID_VALUE);
    *out = make_stream(current, flags == 0);
    return call.end(CUDA_SUCCESS);
}

API cuStreamCreateWithPriority(Stream** out, unsigned flags, int) {
    ENTER(CONTEXT);
    if (flags > 1) return call.end(CUDA_ERROR_INVALID_VALUE);
    *out = make_stream(current, flags == 0);
    return call.end(CUDA_SUCCESS);
}

API cuStreamDestroy_v2(Stream* handle) {
    ENTER(CONTEXT);
    if (!driver().streams.count(handle)) return call.refuse(CUDA_ERROR_INVALID_HANDLE, "no such stream");
    finish(handle);
    handle->alive = false;
    driver().streams.erase(handle);
    return call.end(CUDA_SUCCESS);
}

API cuStreamSynchronize(Stream* handle) {
    ENTER(CONTEXT);
    STREAM(stream, handle);
    finish(stream);
    return call.end(CUDA_SUCCESS);
}

namespace {

// The first question is always too early; the second finds it done.
int answer(Call& call, Stream* stream, uint64_t count) {
    if (stream->done < count && stream->asked < count) {
        stream->asked = count;
        return call.end(CUDA_ERROR_NOT_READY);
    }
    run_until(stream, count);
    return call.end(CUDA_SUCCESS);
}

} // namespace

API cuStreamQuery(Stream* handle) {
    ENTER(CONTEXT);
    STREAM(stream, handle);
    return answer(call, stream, stream->queued);
}

// For libraries that stand on this driver: a call that is made when the stream comes to it. No driver has it.
API cuFakeEnqueue(Stream* handle, void (*run)(void*), void* data) {
    ENTER(CONTEXT);
    STREAM(stream, handle);
    Op op;
    op.run = [run, data] { run(data); };
    enqueue(stream, std::move(op));
    return call.end(CUDA_SUCCESS);
}

API cuStreamWaitEvent(Stream* handle, Event* event, unsigned) {
    ENTER(CONTEXT);
    STREAM(stream, handle);
    EVENT(event);
    if (event->stream && event->stream != stream) {
        Op op;
        op.after = event->stream;
        op.after_count = event->count;
        enqueue(stream, std::move(op));
    }
    return call.end(CUDA_SUCCESS);
}

API cuEventCreate(Event** out, unsigned flags) {
    ENTER(CONTEXT);
    auto* event = new Event{current, (flags & 2) == 0, nullptr, 0, nullptr};
    driver().events.insert(event);
    *out = event;
    return call.end(CUDA_SUCCESS);
}

// Work that waits for the event knows the stream and the place in it, so it needs the event no more.
API cuEventDestroy_v2(Event* event) {
    ENTER(CONTEXT);
    EVENT(event);
    driver().events.erase(event);
    delete event;
    return call.end(CUDA_SUCCESS);
}

API cuEventRecord(Event* event, Stream* handle) {
    ENTER(CONTEXT);
    STREAM(stream, handle);
    EVENT(event);
    if (event->device != stream->device) return call.refuse(CUDA_ERROR_INVALID_HANDLE, "event of another context");
    event->stream = stream;
    event->at = std::make_shared<Time>();
    Op op;
    op.run = [at = event->at] { *at = std::chrono::steady_clock::now(); };
    enqueue(stream, std::move(op));
    event->count = stream->queued;
    return call.end(CUDA_SUCCESS);
}

API cuEventQuery(Event* event) {
    ENTER(CONTEXT);
    EVENT(event);
    return event->stream ? answer(call, event->stream, event->count) : call.end(CUDA_SUCCESS);
}

API cuEventSynchronize(Event* event) {
    ENTER(CONTEXT);
    EVENT(event);
    if (event->stream) {
        run_until(event->stream, event->count);
        check_all_margins(event->device);
    }
    return call.end(CUDA_SUCCESS);
}

namespace {

int elapsed(Call& call, float* out, Event* from, Event* to) {
    EVENT(from);
    EVENT(to);
    if (!from->stream || !to->stream || !from->timed || !to->timed) return call.end(CUDA_ERROR_INVALID_HANDLE);
    if (from->stream->done < from->count || to->stream->done < to->count) return call.end(CUDA_ERROR_NOT_READY);
    *out = std::chrono::duration<float, std::milli>(*to->at - *from->at).count();
    return call.end(CUDA_SUCCESS);
}

} // namespace

API cuEventElapsedTime(float* out, Event* from, Event* to) {
    ENTER(CONTEXT);
    return elapsed(call, out, from, to);
}

API cuEventElapsedTime_v2(float* out, Event* from, Event* to) {
    ENTER(CONTEXT);
    return elapsed(call, out, from, to);
}

// --- device memory ------------------------------------------------------------------------------------------------

API cuMemAlloc_v2(Ptr* out, size_t bytes) {
    ENTER(CONTEXT);
    if (bytes == 0) return call.end(CUDA_ERROR_INVALID_VALUE);
    return allocate(call, out, bytes);
}

API cuMemAllocAsync(Ptr* out, size_t bytes, Stream* handle) {
    ENTER(CONTEXT);
    STREAM(stream, handle);
    if (bytes == 0) {
        *out = 0;
        return call.end(CUDA_SUCCESS);
    }
    return allocate(call, out, bytes);
}

// Waits for the device, as the real one does.
API cuMemFree_v2(Ptr at) {
    ENTER(CONTEXT);
    if (at == 0) return call.end(CUDA_SUCCESS);
    finish_all(current);
    const auto found = driver().allocations.find(static_cast<uintptr_t>(at));
    if (found == driver().allocations.end() || found->second.free_queued)
        return call.refuse(CUDA_ERROR_INVALID_VALUE, "%#llx is not the start of a live allocation", at);
    release(found->second);
    return call.end(CUDA_SUCCESS);
}

API cuMemFreeAsync(Ptr at, Stream* handle) {
    ENTER(CONTEXT);
    STREAM(stream, handle);
    if (at == 0) return call.end(CUDA_SUCCESS);
    const auto found = driver().allocations.find(static_cast<uintptr_t>(at));
    if (found == driver().allocations.end() || found->second.free_queued)
        return call.refuse(CUDA_ERROR_INVALID_VALUE, "%#llx is not the start of a live allocation", at);
    found->second.free_queued = true;
    Op op;
    op.run = [at] { release(driver().allocations.at(static_cast<uintptr_t>(at))); };
    enqueue(stream, std::move(op));
    return call.end(CUDA_SUCCESS);
}

API cuMemGetInfo_v2(size_t* free, size_t* total) {
    ENTER(CONTEXT);
    *total = driver().settings.memory_bytes;
    *free = *total - current->used_bytes;
    return call.end(CUDA_SUCCESS);
}

API cuMemcpyHtoD_v2(Ptr to, const void* from, size_t bytes) {
    ENTER(CONTEXT);
    return copy_to_device(call, to, from, bytes, nullptr, true);
}

API cuMemcpyHtoDAsync_v2(Ptr to, const void* from, size_t bytes, Stream* stream) {
    ENTER(CONTEXT);
    return copy_to_device(call, to, from, bytes, stream, false);
}

API cuMemcpyDtoH_v2(void* to, Ptr from, size_t bytes) {
    ENTER(CONTEXT);
    return copy_to_host(call, to, from, bytes, nullptr, true);
}

API cuMemcpyDtoHAsync_v2(void* to, Ptr from, size_t bytes, Stream* stream) {
    ENTER(CONTEXT);
    return copy_to_host(call, to, from, bytes, stream, false);
}

API cuMemcpyDtoD_v2(Ptr to, Ptr from, size_t bytes) {
    ENTER(CONTEXT);
    return copy_on_device(call, to, from, bytes, nullptr);
}

API cuMemcpyDtoDAsync_v2(Ptr to, Ptr from, size_t bytes, Stream* stream) {
    ENTER(CONTEXT);
    return copy_on_device(call, to, from, bytes, stream);
}

API cuMemcpyPeerAsync(Ptr to, Device*, Ptr from, Device*, size_t bytes, Stream* stream) {
    ENTER(CONTEXT);
    return copy_on_device(call, to, from, bytes, stream);
}

API cuMemsetD8_v2(Ptr at, unsigned char value, size_t count) {
    ENTER(CONTEXT);
    return fill<uint8_t>(call, at, value, count, nullptr);
}

API cuMemsetD8Async(Ptr at, unsigned char value, size_t count, Stream* stream) {
    ENTER(CONTEXT);
    return fill<uint8_t>(call, at, value, count, stream);
}

API cuMemsetD32_v2(Ptr at, unsigned value, size_t count) {
    ENTER(CONTEXT);
    return fill<uint32_t>(call, at, value, count, nullptr);
}

API cuMemsetD32Async(Ptr at, unsigned value, size_t count, Stream* stream) {
    ENTER(CONTEXT);
    return fill<uint32_t>(call, at, value, count, stream);
}

// A pool has no effect here: memory goes back when the free has run.
API cuDeviceGetDefaultMemPool(Device** out, int ordinal) {
    ENTER(INIT);
    DEVICE(device, ordinal);
    *out = device;
    return call.end(CUDA_SUCCESS);
}

API cuMemPoolSetAttribute(Device*, int, void*) {
    ENTER(INIT);
    return call.end(CUDA_SUCCESS);
}

API cuMemPoolTrimTo(Device*, size_t) {
    ENTER(INIT);
    return call.end(CUDA_SUCCESS);
}

// --- pinned host memory -------------------------------------------------------------------------------------------

API cuMemHostAlloc(void** out, size_t bytes, unsigned flags) {
    ENTER(CONTEXT);
    if (bytes == 0 || flags > 7) return call.end(CUDA_ERROR_INVALID_VALUE);
    if (posix_memalign(out, 4096, bytes) != 0) return call.end(CUDA_ERROR_OUT_OF_MEMORY);
    std::memset(*out, NEW, bytes);
    driver().pinned[reinterpret_cast<uintptr_t>(*out)] = {bytes, true};
    return call.end(CUDA_SUCCESS);
}

API cuMemHostRegister_v2(void* at, size_t bytes, unsigned) {
    ENTER(CONTEXT);
    if (!at || bytes == 0) return call.end(CUDA_ERROR_INVALID_VALUE);
    if (host_kind(at, bytes) != Host::UNPINNED) return call.end(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    driver().pinned[reinterpret_cast<uintptr_t>(at)] = {bytes, false};
    return call.end(CUDA_SUCCESS);
}

namespace {

// The real driver does not wait for copies from memory that is unregistered, and may not for memory it freed.
void must_be_idle(const char* symbol, const void* at, size_t bytes) {
    if (host_in_use(at, bytes, true)) fatal("%s: queued copies still use the %zu bytes at %p", symbol, bytes, at);
}

} // namespace

API cuMemHostUnregister(void* at) {
    ENTER(CONTEXT);
    const auto found = driver().pinned.find(reinterpret_cast<uintptr_t>(at));
    if (found == driver().pinned.end() || found->second.ours) return call.end(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    must_be_idle(call.symbol, at, found->second.bytes);
    driver().pinned.erase(found);
    return call.end(CUDA_SUCCESS);
}

API cuMemFreeHost(void* at) {
    ENTER(CONTEXT);
    const auto found = driver().pinned.find(reinterpret_cast<uintptr_t>(at));
    if (found == driver().pinned.end() || !found->second.ours)
        return call.refuse(CUDA_ERROR_INVALID_VALUE, "%p is not the start of pinned memory", at);
    must_be_idle(call.symbol, at, found->second.bytes);
    driver().pinned.erase(found);
    std::free(at);
    return call.end(CUDA_SUCCESS);
}

// --- modules and launches -----------------------------------------------------------------------------------------

namespace {

int load(Call& call, Module** out, const void* image) {
    if (!image) return call.end(CUDA_ERROR_INVALID_VALUE);
    *out = new Module;
    driver().modules.insert(*out);
    return call.end(CUDA_SUCCESS);
}

} // namespace

// Any image will do: the kernels are in this library.
API cuModuleLoadData(Module** out, const void* image) {
    ENTER(CONTEXT);
    return load(call, out, image);
}

API cuModuleLoadDataEx(Module** out, const void* image, unsigned, int*, void**) {
    ENTER(CONTEXT);
    return load(call, out, image);
}

API cuModuleUnload(Module* module) {
    ENTER(CONTEXT);
    if (!driver().modules.count(module)) return call.refuse(CUDA_ERROR_INVALID_HANDLE, "no such module");
    for (const auto& function : module->functions) driver().functions.erase(function.get());
    driver().modules.erase(module);
    delete module;
    return call.end(CUDA_SUCCESS);
}

API cuModuleGetFunction(const Function** out, Module* module, const char* name) {
    ENTER(CONTEXT);
    if (!driver().modules.count(module)) return call.refuse(CUDA_ERROR_INVALID_HANDLE, "no such module");
    const shim::Kernel* kernel = shim::find_kernel(name);
    if (!kernel) return call.end(CUDA_ERROR_NOT_FOUND);
    auto function = std::make_unique<Function>(Function{kernel});
    *out = function.get();
    driver().functions.insert(*out);
    module->functions.insert(std::move(function));
    return call.end(CUDA_SUCCESS);
}

API cuFuncGetAttribute(int* out, int attribute, const Function* function) {
    ENTER(CONTEXT);
    if (!driver().functions.count(function)) return call.refuse(CUDA_ERROR_INVALID_HANDLE, "no such function");
    const Settings& settings = driver().settings;
    if (attribute == 0) *out = static_cast<int>(function->kernel->threads);
    else if (attribute == 4) *out = 32; // registers
    else if (attribute == 5 || attribute == 6) *out = settings.cc_major * 10 + settings.cc_minor;
    else *out = 0;
    return call.end(CUDA_SUCCESS);
}

API cuFuncSetAttribute(const Function* function, int, int) {
    ENTER(CONTEXT);
    if (!driver().functions.count(function)) return call.refuse(CUDA_ERROR_INVALID_HANDLE, "no such function");
    return call.end(CUDA_SUCCESS);
}

API cuLaunchKernel(const Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream* handle, void** params,
                   void** extra) {
    ENTER(CONTEXT);
    STREAM(stream, handle);
    if (!driver().functions.count(function)) return call.refuse(CUDA_ERROR_INVALID_HANDLE, "no such function");
    const shim::Kernel& kernel = *function->kernel;
    const shim::Dim grid{grid_x, grid_y, grid_z}, threads{block_x, block_y, block_z};
    if (stream->device != current) return call.refuse(CUDA_ERROR_INVALID_HANDLE, "stream of another context");
    if (grid.count() == 0 || grid_x > 2147483647u || grid_y > 65535 || grid_z > 65535)
        return call.refuse(CUDA_ERROR_INVALID_VALUE, "`%s`: grid %u x %u x %u", kernel.name, grid_x, grid_y, grid_z);
    if (block_x > 1024 || block_y > 1024 || block_z > 64 || threads.count() != kernel.threads)
        return call.refuse(CUDA_ERROR_INVALID_VALUE, "`%s`: block %u x %u x %u, the kernel has %u threads", kernel.name,
                           block_x, block_y, block_z, kernel.threads);
    if (shared_bytes != 0 || extra || !params || !params[0])
        return call.refuse(CUDA_ERROR_INVALID_VALUE, "`%s`: wants one struct of arguments, no shared bytes", kernel.name);
    Launches& launches = driver().launches[kernel.name];
    ++launches.count;
    launches.grid_z_max = std::max(launches.grid_z_max, grid_z);
    // Only the struct itself is taken now, as CUDA does; what it points to is read when the kernel runs.
    const auto* first = static_cast<const char*>(params[0]);
    auto args = std::make_shared<std::vector<char>>(first, first + kernel.args_bytes);
    Op op;
    op.run = [=, device = current, &kernel] {
        shim::launch(kernel, args->data(), grid, threads, driver().settings.orders);
        if (device->ran.empty() || device->ran.back() != kernel.name) device->ran.push_back(kernel.name);
    };
    enqueue(stream, std::move(op));
    return call.end(CUDA_SUCCESS);
}

// --- the end ------------------------------------------------------------------------------------------------------

namespace {

void write_stats(const Driver& d) {
    std::string path = d.settings.stats;
    if (const size_t at = path.find("%p"); at != std::string::npos) path.replace(at, 2, std::to_string(getpid()));
    std::FILE* file = std::fopen(path.c_str(), "w");
    if (!file) fatal("stats: cannot write `%s`", path.c_str());
    const char* comma = "";
    std::fputs("{\"calls\":{", file);
    for (const auto& [symbol, count] : d.calls) {
        std::fprintf(file, "%s\"%s\":%llu", comma, symbol.c_str(), static_cast<unsigned long long>(count));
        comma = ",";
    }
    comma = "";
    std::fputs("},\"launches\":{", file);
    for (const auto& [name, launches] : d.launches) {
        std::fprintf(file, "%s\"%s\":{\"count\":%llu,\"grid_z_max\":%u}", comma, name.c_str(),
                     static_cast<unsigned long long>(launches.count), launches.grid_z_max);
        comma = ",";
    }
    std::fprintf(file,
                 "},\"bytes\":{\"htod_pinned\":%llu,\"htod_unpinned\":%llu,\"dtoh_pinned\":%llu,\"dtoh_unpinned\":%llu,"
                 "\"dtod\":%llu,\"memset\":%llu},\"failed_on_purpose\":%llu}\n",
                 static_cast<unsigned long long>(d.bytes.htod_pinned),
                 static_cast<unsigned long long>(d.bytes.htod_unpinned),
                 static_cast<unsigned long long>(d.bytes.dtoh_pinned),
                 static_cast<unsigned long long>(d.bytes.dtoh_unpinned), static_cast<unsigned long long>(d.bytes.dtod),
                 static_cast<unsigned long long>(d.bytes.memset),
                 static_cast<unsigned long long>(d.failed_on_purpose));
    std::fclose(file);
}

// Queued work that nobody waited for is lost with the process, as it is on a GPU.
__attribute__((destructor)) void at_exit() {
    Driver& d = driver();
    std::unique_lock<std::mutex> guard(d.lock, std::try_to_lock);
    if (!guard.owns_lock() || !d.initialised) return; // another thread is in a call
    for (const auto& [at, allocation] : d.allocations) check_margins(allocation);
    for (const Allocation& allocation : d.quarantine) check_freed(allocation);
    if (!d.settings.stats.empty()) write_stats(d);
}

} // namespace
