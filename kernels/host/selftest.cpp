// Does the fake driver find what it is there to find? One case for each call: `selftest CASE`.
//
// Cases exit with 0 if all is as it should be, 1 with a line if not. Those named in `scripts/gpu/fake-driver` as such are
// faulty on purpose, and must abort or be reported by ThreadSanitizer.

#include "shim.h"

// --- kernels ------------------------------------------------------------------------------------------------------

struct SumArgs {
    const float* in;
    float* out; // one for each block of 256
};

static __device__ __forceinline__ void tree(float* part) {
    for (unsigned half = 128; half > 0; half /= 2) {
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
        __syncthreads();
    }
}

KERNEL(sum, SumArgs, 256) {
    __shared__ float part[256];
    part[threadIdx.x] = args.in[blockIdx.x * 256 + threadIdx.x];
    __syncthreads();
    tree(part);
    if (threadIdx.x == 0) args.out[blockIdx.x] = part[0];
}

KERNEL(sum_without_barrier, SumArgs, 256) {
    __shared__ float part[256];
    part[threadIdx.x] = args.in[blockIdx.x * 256 + threadIdx.x];
    tree(part);
    if (threadIdx.x == 0) args.out[blockIdx.x] = part[0];
}

// Thread 0 may run into the second round while others still read the first: caught only if barriers are told apart.
KERNEL(sum_twice_without_barrier_between, SumArgs, 256) {
    __shared__ float first;
    float sum = 0;
    for (unsigned i = 0; i < 2; ++i) {
        if (threadIdx.x == 0) first = args.in[i];
        __syncthreads();
        sum += first;
    }
    if (threadIdx.x == 255) args.out[blockIdx.x] = sum;
}

KERNEL(every_block_writes_one, SumArgs, 32) {
    if (threadIdx.x == 0) args.out[0] = static_cast<float>(blockIdx.x);
}

KERNEL(every_thread_writes_one, SumArgs, 32) { args.out[0] = static_cast<float>(threadIdx.x); }

KERNEL(some_leave_early, SumArgs, 256) {
    __shared__ float part[256];
    if (threadIdx.x >= 100) return;
    part[threadIdx.x] = args.in[threadIdx.x];
    __syncthreads();
    if (threadIdx.x >= 50) return;
    part[threadIdx.x] += part[threadIdx.x + 50];
    __syncthreads();
    if (threadIdx.x != 0) return;
    float sum = 0;
    for (unsigned i = 0; i < 50; ++i) sum += part[i];
    args.out[0] = sum;
}

KERNEL(divergent_barrier, SumArgs, 64) {
    if (threadIdx.x < 32) __syncthreads();
    args.out[threadIdx.x] = 1;
    __syncthreads();
}

KERNEL(hundred_barriers, SumArgs, 256) {
    __shared__ float part[256];
    part[threadIdx.x] = args.in[threadIdx.x];
    for (unsigned i = 0; i < 100; ++i) __syncthreads();
    args.out[blockIdx.x * 256 + threadIdx.x] = part[255 - threadIdx.x];
}

struct IndexArgs {
    unsigned* out;
    alignas(16) float4 unused;
};

KERNEL(index, IndexArgs, 24) {
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    args.out[block * 24 + thread] = block * 24 + thread;
}

KERNEL(past_the_end, IndexArgs, 1) { args.out[4] = 7; }

// --- the driver, in this program ----------------------------------------------------------------------------------

#include "fake_cuda.cpp"

#include <thread>

namespace {

#define CHECK(what)                                                                            \
    do {                                                                                       \
        if (!(what)) {                                                                         \
            std::printf("selftest.cpp:%d: not so: %s\n", __LINE__, #what);                     \
            std::exit(1);                                                                      \
        }                                                                                      \
    } while (false)
#define OK(call) CHECK((call) == CUDA_SUCCESS)

struct Gpu {
    Stream *a = nullptr, *b = nullptr;
    Module* module = nullptr;

    Gpu() {
        OK(cuInit(0));
        Device* context = nullptr;
        OK(cuDevicePrimaryCtxRetain(&context, 0));
        OK(cuCtxSetCurrent(context));
        OK(cuStreamCreate(&a, 1));
        OK(cuStreamCreate(&b, 1));
        OK(cuModuleLoadData(&module, "any"));
    }

    int launch(const char* name, unsigned blocks, unsigned threads, void* args, Stream* stream) const {
        const Function* function = nullptr;
        OK(cuModuleGetFunction(&function, module, name));
        return cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, &args, nullptr);
    }
};

template <typename T>
T* device(size_t count) {
    Ptr at = 0;
    OK(cuMemAlloc_v2(&at, count * sizeof(T)));
    return reinterpret_cast<T*>(device_pointer(at));
}

template <typename T>
T* pinned(size_t count) {
    void* at = nullptr;
    OK(cuMemHostAlloc(&at, count * sizeof(T), 1));
    return static_cast<T*>(at);
}

template <typename T>
Ptr ptr(const T* at) {
    return reinterpret_cast<uintptr_t>(at);
}

bool is_poison(float v) { return __float_as_uint(v) == 0xFBFBFBFBu; }

// What `name` makes of ones.
std::vector<float> sums(const char* name, unsigned blocks, unsigned threads) {
    Gpu gpu;
    const std::vector<float> ones(1024, 1.0f);
    auto* in = device<float>(1024);
    auto* out = device<float>(256);
    std::vector<float> result(256);
    SumArgs args{in, out};
    OK(cuMemcpyHtoDAsync_v2(ptr(in), ones.data(), 4096, gpu.a));
    OK(gpu.launch(name, blocks, threads, &args, gpu.a));
    OK(cuMemcpyDtoHAsync_v2(result.data(), ptr(out), 1024, gpu.a));
    return result;
}

void reduction() {
    const std::vector<float> result = sums("sum", 4, 256);
    for (unsigned i = 0; i < 4; ++i) CHECK(result[i] == 256.0f);
    CHECK(is_poison(result[4]));
}

void early_return() { CHECK(sums("some_leave_early", 1, 256)[0] == 100.0f); }

// The last block to run is the one that is seen.
void block_order() {
    const char* order = std::getenv("SAFEGENE_FAKE_CUDA");
    const float last = sums("every_block_writes_one", 4, 32)[0];
    if (std::strcmp(order, "blocks=up") == 0) CHECK(last == 3.0f);
    if (std::strcmp(order, "blocks=down") == 0) CHECK(last == 0.0f);
}

void orders_are_permutations() {
    for (uint64_t count : {1u, 2u, 3u, 12u, 1024u, 1000u}) {
        for (uint64_t seed = 0; seed < 20; ++seed) {
            const shim::Order orders[] = {{shim::Order::UP, 0}, {shim::Order::DOWN, 0}, {shim::Order::SHUFFLED, seed}};
            for (const shim::Order& order : orders) {
                std::vector<bool> seen(count);
                const auto steps = order.over(count);
                for (uint64_t i = 0; i < count; ++i) {
                    CHECK(steps[i] < count && !seen[steps[i]]);
                    seen[steps[i]] = true;
                }
            }
        }
    }
}

void indices() {
    Gpu gpu;
    auto* out = device<unsigned>(24 * 30);
    IndexArgs args{out, {}};
    void* params[] = {&args};
    const Function* function = nullptr;
    OK(cuModuleGetFunction(&function, gpu.module, "index"));
    OK(cuLaunchKernel(function, 2, 3, 5, 2, 3, 4, 0, gpu.a, params, nullptr));
    std::vector<unsigned> result(24 * 30);
    OK(cuMemcpyDtoHAsync_v2(result.data(), ptr(out), 24 * 30 * 4, gpu.a));
    for (unsigned i = 0; i < 24 * 30; ++i) CHECK(result[i] == i);
}

void late_order() {
    Gpu gpu;
    auto* in = pinned<float>(1024);
    auto* back = pinned<float>(4);
    auto* x = device<float>(1024);
    auto* y = device<float>(4);
    SumArgs args{x, y};
    std::fill_n(in, 1024, 1.0f);
    std::fill_n(back, 4, 256.0f); // what would be right
    OK(cuMemcpyHtoDAsync_v2(ptr(x), in, 4096, gpu.a));
    OK(gpu.launch("sum", 4, 256, &args, gpu.a));
    OK(cuMemcpyDtoHAsync_v2(back, ptr(y), 16, gpu.a));
    args.out = nullptr; // taken at the launch
    CHECK(is_poison(back[0])); // read too early
    in[0] = 2.0f;              // changed too early
    CHECK(cuStreamQuery(gpu.a) == CUDA_ERROR_NOT_READY);
    CHECK(is_poison(back[0]));
    OK(cuStreamSynchronize(gpu.a));
    CHECK(back[0] == 257.0f && back[1] == 256.0f);
    OK(cuStreamQuery(gpu.a));

    // Memory that is not pinned is read at the call.
    std::vector<float> plain(1024, 3.0f);
    OK(cuMemcpyHtoDAsync_v2(ptr(x), plain.data(), 4096, gpu.a));
    std::fill(plain.begin(), plain.end(), 0.0f);
    OK(cuMemcpyDtoHAsync_v2(plain.data(), ptr(x), 4096, gpu.a));
    CHECK(plain[0] == 3.0f && plain[1023] == 3.0f);
}

void early_order() {
    Gpu gpu;
    auto* back = pinned<float>(4);
    auto* x = device<float>(4);
    OK(cuMemsetD32Async(ptr(x), 0x3f800000, 4, gpu.a));
    OK(cuMemcpyDtoHAsync_v2(back, ptr(x), 16, gpu.a));
    CHECK(back[3] == 1.0f);
}

void events_between_streams() {
    Gpu gpu;
    auto* in = pinned<float>(1);
    auto* back = pinned<float>(1);
    auto* x = device<float>(1);
    *in = 5.0f;
    Event *copied = nullptr, *timed = nullptr;
    OK(cuEventCreate(&copied, 2));
    OK(cuEventCreate(&timed, 0));
    OK(cuStreamWaitEvent(gpu.b, copied, 0)); // never recorded: nothing to wait for
    OK(cuEventQuery(copied));

    // Without an event the younger stream runs first and reads poison.
    OK(cuMemcpyHtoDAsync_v2(ptr(x), in, 4, gpu.a));
    OK(cuMemcpyDtoHAsync_v2(back, ptr(x), 4, gpu.b));
    OK(cuCtxSynchronize());
    CHECK(is_poison(*back));

    *in = 6.0f;
    OK(cuEventRecord(timed, gpu.a));
    OK(cuMemcpyHtoDAsync_v2(ptr(x), in, 4, gpu.a));
    OK(cuEventRecord(copied, gpu.a));
    OK(cuStreamWaitEvent(gpu.b, copied, 0));
    OK(cuMemsetD32Async(ptr(x), 0, 1, gpu.a)); // behind the record: not waited for
    OK(cuMemcpyDtoHAsync_v2(back, ptr(x), 4, gpu.b));
    OK(cuEventRecord(copied, gpu.a)); // a later record changes nothing for who waits already
    OK(cuEventDestroy_v2(copied));
    float ms = -1;
    CHECK(cuEventElapsedTime_v2(&ms, timed, timed) == CUDA_ERROR_NOT_READY);
    OK(cuStreamSynchronize(gpu.b));
    CHECK(*back == 6.0f);
    OK(cuEventElapsedTime_v2(&ms, timed, timed));
    CHECK(ms == 0.0f);
    CHECK(cuEventSynchronize(copied) == CUDA_ERROR_INVALID_HANDLE);
}

// The default stream and streams without CU_STREAM_NON_BLOCKING wait for each other.
void default_stream() {
    Gpu gpu;
    Stream* blocking = nullptr;
    OK(cuStreamCreate(&blocking, 0));
    auto* x = device<unsigned>(1);
    auto* back = pinned<unsigned>(1);
    OK(cuMemsetD32_v2(ptr(x), 1, 1));
    OK(cuMemsetD32Async(ptr(x), 2, 1, blocking));
    OK(cuMemcpyDtoHAsync_v2(back, ptr(x), 4, nullptr));
    OK(cuStreamSynchronize(nullptr));
    CHECK(*back == 2);
    unsigned sync = 0;
    OK(cuMemcpyDtoH_v2(&sync, ptr(x), 4));
    CHECK(sync == 2);
}

void several_threads() {
    Gpu gpu;
    Device* context = current;
    std::vector<std::thread> threads;
    for (unsigned number = 1; number <= 4; ++number) {
        threads.emplace_back([&gpu, context, number] {
            CHECK(cuCtxSynchronize() == CUDA_ERROR_INVALID_CONTEXT); // a context is current in one thread only
            OK(cuCtxSetCurrent(context));
            Stream* stream = nullptr;
            OK(cuStreamCreate(&stream, 1));
            SumArgs args{device<float>(1024), device<float>(4)};
            const std::vector<float> in(1024, static_cast<float>(number));
            float out[4];
            for (unsigned round = 0; round < 5; ++round) {
                OK(cuMemcpyHtoDAsync_v2(ptr(args.in), in.data(), 4096, stream));
                OK(gpu.launch("sum", 4, 256, &args, stream));
                OK(cuMemcpyDtoHAsync_v2(out, ptr(args.out), 16, stream));
                CHECK(out[3] == 256.0f * static_cast<float>(number));
            }
            OK(cuStreamDestroy_v2(stream));
        });
    }
    for (std::thread& thread : threads) thread.join();
}

// With memory=1000000.
void memory_limit() {
    Gpu gpu;
    Ptr a = 0, b = 0;
    size_t free_bytes = 0, total = 0;
    OK(cuMemAllocAsync(&a, 600000, gpu.a));
    CHECK(cuMemAlloc_v2(&b, 500000) == CUDA_ERROR_OUT_OF_MEMORY);
    OK(cuMemGetInfo_v2(&free_bytes, &total));
    CHECK(free_bytes == 400000 && total == 1000000);
    OK(cuMemFreeAsync(a, gpu.a));
    OK(cuMemGetInfo_v2(&free_bytes, &total));
    CHECK(free_bytes == 400000); // the free has not run
    CHECK(cuMemsetD8Async(a, 0, 1, gpu.a) == CUDA_ERROR_INVALID_VALUE);
    OK(cuMemAlloc_v2(&b, 1000000)); // runs it
    OK(cuMemFree_v2(b));
    CHECK(cuMemFree_v2(b) == CUDA_ERROR_INVALID_VALUE);
}

void what_is_refused() {
    Ptr at = 0;
    CHECK(cuMemAlloc_v2(&at, 1) == CUDA_ERROR_NOT_INITIALIZED);
    OK(cuInit(0));
    CHECK(cuMemAlloc_v2(&at, 1) == CUDA_ERROR_INVALID_CONTEXT);
    Gpu gpu;
    CHECK(cuMemAlloc_v2(&at, 0) == CUDA_ERROR_INVALID_VALUE);
    auto* x = device<unsigned>(24);
    char host[128] = {};
    OK(cuMemcpyHtoD_v2(ptr(x), host, 96));
    CHECK(cuMemcpyHtoD_v2(ptr(x), host, 97) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuMemcpyHtoD_v2(ptr(x) + 1, host, 96) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuMemcpyDtoH_v2(host, ptr(x) - 1, 4) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuMemcpyHtoD_v2(ptr(x), x, 4) == CUDA_ERROR_INVALID_VALUE);
    OK(cuMemHostRegister_v2(host, 64, 0));
    CHECK(cuMemHostRegister_v2(host + 32, 64, 0) == CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    CHECK(cuMemcpyHtoD_v2(ptr(x), host, 96) == CUDA_ERROR_INVALID_VALUE); // half of it pinned
    OK(cuMemHostUnregister(host));
    CHECK(cuMemHostUnregister(host) == CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    IndexArgs args{x, {}};
    void* params[] = {&args};
    const Function* f = nullptr;
    CHECK(cuModuleGetFunction(&f, gpu.module, "no_such_kernel") == CUDA_ERROR_NOT_FOUND);
    OK(cuModuleGetFunction(&f, gpu.module, "index"));
    CHECK(cuLaunchKernel(f, 1, 1, 1, 25, 1, 1, 0, gpu.a, params, nullptr) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuLaunchKernel(f, 0, 1, 1, 24, 1, 1, 0, gpu.a, params, nullptr) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuLaunchKernel(f, 1, 65536, 1, 24, 1, 1, 0, gpu.a, params, nullptr) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuLaunchKernel(f, 1, 1, 65536, 24, 1, 1, 0, gpu.a, params, nullptr) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuLaunchKernel(f, 1u << 31, 1, 1, 24, 1, 1, 0, gpu.a, params, nullptr) == CUDA_ERROR_INVALID_VALUE);
    OK(cuModuleUnload(gpu.module));
    CHECK(cuLaunchKernel(f, 1, 1, 1, 24, 1, 1, 0, gpu.a, params, nullptr) == CUDA_ERROR_INVALID_HANDLE);
    OK(cuStreamDestroy_v2(gpu.b));
    CHECK(cuStreamSynchronize(gpu.b) == CUDA_ERROR_INVALID_HANDLE);
}

// With fail=cuStreamSynchronize:2:700 and fail=cuMemAlloc_v2:*:2.
void failures_on_purpose() {
    Gpu gpu;
    Ptr at = 0;
    CHECK(cuMemAlloc_v2(&at, 4) == CUDA_ERROR_OUT_OF_MEMORY);
    OK(cuStreamSynchronize(gpu.a));
    CHECK(cuStreamSynchronize(gpu.a) == CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK(cuMemAllocAsync(&at, 4, gpu.a) == CUDA_ERROR_ILLEGAL_ADDRESS); // stays
    OK(cuDevicePrimaryCtxRelease_v2(0));
    Gpu again; // a new context is sound
    OK(cuMemAllocAsync(&at, 4, again.a));
}

void overwritten_margin() {
    Gpu gpu;
    IndexArgs args{device<unsigned>(4), {}};
    OK(gpu.launch("past_the_end", 1, 1, &args, gpu.a));
    OK(cuStreamSynchronize(gpu.a));
}

void written_after_free() {
    Gpu gpu;
    auto* x = device<unsigned>(24);
    IndexArgs args{x, {}};
    OK(gpu.launch("index", 1, 24, &args, gpu.a));
    OK(cuMemFreeAsync(ptr(x), gpu.b)); // without an order between the two
    OK(cuStreamSynchronize(gpu.b));
    OK(cuStreamSynchronize(gpu.a));
}

void pinned_memory_freed_in_use() {
    Gpu gpu;
    auto* host = pinned<float>(4);
    OK(cuMemcpyHtoDAsync_v2(ptr(device<float>(4)), host, 16, gpu.a));
    OK(cuMemFreeHost(host));
}

// Microseconds for one thread to pass one barrier.
void speed() {
    constexpr unsigned blocks = 400;
    static float in[256], out[blocks * 256];
    SumArgs args{in, out};
    const auto from = std::chrono::steady_clock::now();
    shim::launch(*shim::find_kernel("hundred_barriers"), &args, {blocks, 1, 1}, {256, 1, 1}, {});
    const double us = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - from).count();
    std::printf("%.5f us a barrier and thread; a block of 256 threads and 100 barriers %.1f us\n",
                us / (blocks * 256.0 * 100.0), us / blocks);
}

struct Case {
    const char* name;
    void (*run)();
};
constexpr Case CASES[] = {
    {"reduction", reduction},
    {"early_return", early_return},
    {"block_order", block_order},
    {"orders_are_permutations", orders_are_permutations},
    {"indices", indices},
    {"late_order", late_order},
    {"early_order", early_order},
    {"events_between_streams", events_between_streams},
    {"default_stream", default_stream},
    {"several_threads", several_threads},
    {"memory_limit", memory_limit},
    {"what_is_refused", what_is_refused},
    {"failures_on_purpose", failures_on_purpose},
    {"overwritten_margin", overwritten_margin},
    {"written_after_free", written_after_free},
    {"pinned_memory_freed_in_use", pinned_memory_freed_in_use},
    {"missing_barrier", [] { sums("sum_without_barrier", 1, 256); }},
    {"missing_barrier_in_loop", [] { sums("sum_twice_without_barrier_between", 1, 256); }},
    {"threads_write_one_address", [] { sums("every_thread_writes_one", 1, 32); }},
    {"blocks_write_one_address", [] { sums("every_block_writes_one", 4, 32); }},
    {"divergent_barrier", [] { sums("divergent_barrier", 1, 64); }},
    {"speed", speed},
};

} // namespace

int main(int count, char** words) {
    for (const Case& one : CASES) {
        if (count != 2 || std::strcmp(one.name, words[1]) != 0) continue;
        one.run();
        return 0;
    }
    std::printf("usage: selftest CASE; one of\n");
    for (const Case& one : CASES) std::printf("  %s\n", one.name);
    return 2;
}
