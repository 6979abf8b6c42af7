// Runs the blocks of a kernel launch on one CPU thread; the threads of a block take turns at barriers.
//
// Every thread of a block has its own stack of 64 KiB and runs until it meets a barrier or returns; then the next one
// goes on. Once all that have not returned are at the barrier, it opens. A thread that returned no longer counts, as on
// GPUs since Volta. Threads that wait at two different barriers are undefined in CUDA: we print both and abort.
//
// Blocks and threads start in an order that can be chosen, so that a kernel which depends on it is found out.
//
// Built with ThreadSanitizer, each thread of a block is a thread to it, too. What orders them is only what orders them on
// a GPU: barriers within a block, the start and the end of the launch. So a missing barrier is reported as a race, and
// so are two blocks that write one address, although everything runs one after another. As such threads are slow to
// make, three crews of them take the blocks in turn: of two blocks that one crew ran, a race is not seen. Run a test in
// several orders of the blocks.
//
// Only one launch may run at a time: the caller holds a lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <pthread.h>
#include <sys/mman.h>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define SHIM_UNSEEN __attribute__((no_sanitize_thread)) // our own bookkeeping is no part of the kernel
#else
#define SHIM_UNSEEN
#endif

// -DSHIM_UCONTEXT tries here what other processors use.
#if !defined(__x86_64__) || defined(SHIM_UCONTEXT)
#undef SHIM_UCONTEXT
#define SHIM_UCONTEXT 1
#include <ucontext.h>
#else
#define SHIM_UCONTEXT 0
#endif

namespace shim {

struct Dim {
    unsigned x = 1, y = 1, z = 1;
    unsigned long long count() const { return 1ull * x * y * z; }
};

struct Kernel {
    const char* name;
    size_t args_bytes;
    unsigned threads; // of every block
    void (*run)(const void* args);
};

inline std::vector<Kernel>& kernels() {
    static auto* table = new std::vector<Kernel>; // never freed: used until the process ends
    return *table;
}

inline const Kernel* find_kernel(const char* name) {
    for (const Kernel& kernel : kernels())
        if (std::strcmp(kernel.name, name) == 0) return &kernel;
    return nullptr;
}

struct Registration {
    explicit Registration(const Kernel& kernel) {
        if (kernel.threads == 0 || kernel.threads > 1024 || find_kernel(kernel.name)) {
            std::fprintf(stderr, "kernel `%s`: defined twice, or no block size from 1 to 1024\n", kernel.name);
            std::abort();
        }
        kernels().push_back(kernel);
    }
};

// An order of 0..count: ascending, descending, or i -> a * i + b for an `a` without a common factor with `count`.
struct Order {
    enum Kind { UP, DOWN, SHUFFLED } kind = UP;
    uint64_t seed = 0;

    struct Steps {
        uint64_t count, factor, offset;
        uint64_t operator[](uint64_t i) const {
            return static_cast<uint64_t>((static_cast<unsigned __int128>(i) * factor + offset) % count);
        }
    };

    Steps over(uint64_t count) const {
        if (kind == UP || count < 2) return {count, 1, 0};
        if (kind == DOWN) return {count, count - 1, count - 1};
        uint64_t state = seed;
        auto random = [&state] { // splitmix64
            uint64_t z = state += 0x9e3779b97f4a7c15;
            z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
            z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
            return z ^ (z >> 31);
        };
        uint64_t factor;
        do factor = random() % count;
        while (gcd(factor, count) != 1);
        return {count, factor, random() % count};
    }

    static uint64_t gcd(uint64_t a, uint64_t b) { return b == 0 ? a : gcd(b, a % b); }
};

struct Orders {
    Order blocks, threads;
};

} // namespace shim

// As kernels see them. Plain variables: one launch at a time, and each switch sets `threadIdx` anew.
inline shim::Dim threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr unsigned THREADS_MAX = 1024;
constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t GUARD_BYTES = 4096; // below each stack, so that an overflow faults

// A stack, and what is needed to go on where it stopped.
struct Fiber {
#if !SHIM_UCONTEXT
    void* stopped_at;
#else
    ucontext_t stopped_at;
#endif
    Dim index;
    unsigned thread;
    const char* file; // of the barrier at which it waits
    int line;
    unsigned stack;
    void* tsan;
};

// The block that is running.
struct Block {
    const Kernel* kernel;
    const void* args;
    Order::Steps order;
    unsigned threads;
    unsigned started; // so many of `order` have begun
    unsigned phase;   // barriers passed
    uint64_t number;  // blocks that its crew ran before, with ThreadSanitizer
    Fiber* current;
    Fiber launcher;
    Fiber fibers[THREADS_MAX];
    Fiber* going_on[THREADS_MAX]; // past the barrier before, in this order
    unsigned going_on_count, going_on_next;
    Fiber* waiting[THREADS_MAX]; // at the next barrier
    unsigned waiting_count;
    char* stacks; // of THREADS_MAX
    unsigned free_stacks[THREADS_MAX];
    unsigned free_stacks_count;
    unsigned stacks_made;
};
inline Block block;

#if !SHIM_UCONTEXT
// Saves what the calling convention says a function keeps, swaps stacks, and returns on the other one. Six pushes:
// a switch with `swapcontext` takes two system calls and some 50 times longer.
extern "C" void shim_switch(void** from, void* to);
asm(R"(
    .pushsection .text
    .hidden shim_switch
    .globl shim_switch
    .type shim_switch, @function
shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size shim_switch, .-shim_switch
    .popsection
)");
#endif

SHIM_UNSEEN inline void switch_to(Fiber* to) {
    Fiber* from = block.current;
    if (from == to) return;
    block.current = to;
    threadIdx = to->index;
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(to->tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if !SHIM_UCONTEXT
    shim_switch(&from->stopped_at, to->stopped_at);
#else
    swapcontext(&from->stopped_at, &to->stopped_at);
#endif
}

#ifdef __SANITIZE_THREAD__
// Addresses by which ThreadSanitizer knows the start of the launch, and for each crew barriers and ends of blocks. Two of
// each, in turn: a thread may reach the next barrier before another has left this one, or end before another begins.
inline char launch_tag;
constexpr unsigned BARRIER = 0, END = 2;
SHIM_UNSEEN inline void* tag(unsigned which) { return block.stacks + 64 * which; }
#endif

[[noreturn]] SHIM_UNSEEN inline void abort_divergent(const Fiber* a, const Fiber* b) {
    std::fprintf(stderr,
                 "kernel `%s`, block (%u, %u, %u): divergent barrier: thread %u waits at %s:%d, thread %u at %s:%d\n",
                 block.kernel->name, blockIdx.x, blockIdx.y, blockIdx.z, a->thread, a->file, a->line, b->thread,
                 b->file, b->line);
    std::abort();
}

inline void fiber_main();

// Takes the next thread of the block that has not begun, and makes it the one that this stack belongs to.
SHIM_UNSEEN inline Fiber* begin_thread(unsigned stack) {
    const unsigned thread = static_cast<unsigned>(block.order[block.started++]);
    Fiber* fiber = &block.fibers[thread];
    fiber->thread = thread;
    fiber->stack = stack;
    fiber->index.x = thread % blockDim.x;
    fiber->index.y = thread / blockDim.x % blockDim.y;
    fiber->index.z = thread / blockDim.x / blockDim.y;
    return fiber;
}

SHIM_UNSEEN inline Fiber* begin_thread_on_free_stack() {
    constexpr size_t each = GUARD_BYTES + STACK_BYTES;
#ifdef __SANITIZE_THREAD__
    const unsigned stack = static_cast<unsigned>(block.order[block.started]); // the same for this thread each time
#else
    const unsigned stack =
        block.free_stacks_count > 0 ? block.free_stacks[--block.free_stacks_count] : block.stacks_made++;
#endif
    char* low = block.stacks + GUARD_BYTES + stack * each;
    Fiber* fiber = begin_thread(stack);
#if !SHIM_UCONTEXT
    // Stacks begin at different lines of the cache, or 256 of them would share eight.
    char* top = low + STACK_BYTES - stack % 32 * 128;
    void** frame = reinterpret_cast<void**>(top);
    *--frame = nullptr; // where `fiber_main` would return to: it never does; its stack is aligned as after a call
    *--frame = reinterpret_cast<void*>(&fiber_main);
    for (int saved = 0; saved < 6; ++saved) *--frame = nullptr;
    fiber->stopped_at = frame;
#else
    getcontext(&fiber->stopped_at);
    fiber->stopped_at.uc_stack.ss_sp = low;
    fiber->stopped_at.uc_stack.ss_size = STACK_BYTES;
    fiber->stopped_at.uc_link = nullptr;
    makecontext(&fiber->stopped_at, fiber_main, 0);
#endif
    return fiber;
}

// Who runs next, after the current thread has stopped.
SHIM_UNSEEN inline Fiber* next_fiber() {
    if (block.going_on_next < block.going_on_count) return block.going_on[block.going_on_next++];
    if (block.started < block.threads) return begin_thread_on_free_stack();
    if (block.waiting_count == 0) return &block.launcher; // all have returned
    for (unsigned i = 0; i < block.waiting_count; ++i) {
        Fiber* fiber = block.waiting[i];
        const Fiber* first = block.waiting[0];
        if (fiber->line != first->line || (fiber->file != first->file && std::strcmp(fiber->file, first->file) != 0))
            abort_divergent(first, fiber);
        block.going_on[i] = fiber;
    }
    block.going_on_count = block.waiting_count;
    block.going_on_next = 1;
    block.waiting_count = 0;
    ++block.phase;
    return block.going_on[0];
}

SHIM_UNSEEN __attribute__((noinline)) inline void barrier(const char* file, int line) {
    Fiber* self = block.current;
    self->file = file;
    self->line = line;
    block.waiting[block.waiting_count++] = self;
#ifdef __SANITIZE_THREAD__
    void* here = tag(BARRIER + block.phase % 2);
    __tsan_release(here);
#endif
    switch_to(next_fiber());
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(here);
#endif
}

SHIM_UNSEEN inline void fiber_main() {
    for (;;) {
#ifdef __SANITIZE_THREAD__
        __tsan_acquire(&launch_tag);
        __tsan_acquire(tag(END + (block.number + 1) % 2)); // the block before had the same stacks and shared variables
#endif
        block.kernel->run(block.args);
#ifdef __SANITIZE_THREAD__
        __tsan_release(tag(END + block.number % 2));
#else
        // A thread that met no barrier leaves its stack to the next one: no switch at all.
        if (block.going_on_next == block.going_on_count && block.started < block.threads) {
            block.current = begin_thread(block.current->stack);
            threadIdx = block.current->index;
            continue;
        }
        block.free_stacks[block.free_stacks_count++] = block.current->stack;
#endif
        switch_to(next_fiber());
    }
}

inline char* map_stacks(unsigned count) {
    constexpr size_t each = GUARD_BYTES + STACK_BYTES;
    void* memory = mmap(nullptr, count * each, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) {
        std::perror("stacks for the threads of a block");
        std::abort();
    }
    return static_cast<char*>(memory);
}

// All threads of the block that `blockIdx` names, to their end.
SHIM_UNSEEN inline void run_block() {
    block.started = 0;
    block.phase = 0;
    block.going_on_count = block.going_on_next = 0;
    block.waiting_count = 0;
    block.current = &block.launcher;
    switch_to(next_fiber());
}

#ifdef __SANITIZE_THREAD__

// Threads to ThreadSanitizer that run every third block, on a thread of the operating system of their own, which has its
// own copy of the shared variables. Kept until the process ends.
struct Crew {
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
    bool begun = false, busy = false;
    char* stacks = nullptr;
    void* tsan[THREADS_MAX];
    unsigned tsan_made = 0;
    uint64_t blocks = 0;
};
inline Crew crews[3];
inline thread_local char shared_touched; // among the shared variables

// Only the threads of the blocks tell each other what they did; the one they run on learns nothing and tells nothing.
SHIM_UNSEEN inline void* crew_main(void* crew_pointer) {
    Crew* crew = static_cast<Crew*>(crew_pointer);
    *const_cast<volatile char*>(&shared_touched) = 1; // so that no thread of a block allocates them
    crew->stacks = map_stacks(THREADS_MAX);
    pthread_mutex_lock(&crew->lock);
    for (;;) {
        while (!crew->busy) pthread_cond_wait(&crew->changed, &crew->lock);
        while (crew->tsan_made < block.threads) crew->tsan[crew->tsan_made++] = __tsan_create_fiber(0);
        for (unsigned thread = 0; thread < block.threads; ++thread) block.fibers[thread].tsan = crew->tsan[thread];
        block.launcher.tsan = __tsan_get_current_fiber();
        block.stacks = crew->stacks;
        block.number = crew->blocks++;
        run_block();
        crew->busy = false;
        pthread_cond_signal(&crew->changed);
    }
    return nullptr;
}

SHIM_UNSEEN inline void run_block_by(Crew* crew) {
    pthread_mutex_lock(&crew->lock);
    if (!crew->begun) {
        pthread_t thread;
        const int error = pthread_create(&thread, nullptr, crew_main, crew);
        if (error != 0) {
            std::fprintf(stderr, "a thread for blocks: %s\n", std::strerror(error));
            std::abort();
        }
        pthread_detach(thread);
        crew->begun = true;
    }
    crew->busy = true;
    pthread_cond_signal(&crew->changed);
    while (crew->busy) pthread_cond_wait(&crew->changed, &crew->lock);
    pthread_mutex_unlock(&crew->lock);
}

#else

// Stacks are kept for the next launch: made once, for the largest block there can be.
inline void prepare_stacks() {
    if (block.stacks) return;
    block.stacks = map_stacks(THREADS_MAX);
    for (unsigned i = 0; i < THREADS_MAX; ++i)
        mprotect(block.stacks + i * (GUARD_BYTES + STACK_BYTES), GUARD_BYTES, PROT_NONE);
}

#endif

// Runs the whole grid. `args` points to the kernel's struct; `threads` has the kernel's number of threads.
SHIM_UNSEEN inline void launch(const Kernel& kernel, const void* args, Dim grid, Dim threads, const Orders& orders) {
    block.kernel = &kernel;
    block.args = args;
    block.threads = static_cast<unsigned>(threads.count());
    block.order = orders.threads.over(threads.count());
    gridDim = grid;
    blockDim = threads;
#ifdef __SANITIZE_THREAD__
    __tsan_release(&launch_tag);
#else
    prepare_stacks();
#endif
    const uint64_t blocks = grid.count();
    const Order::Steps order = orders.blocks.over(blocks);
    for (uint64_t i = 0; i < blocks; ++i) {
        const uint64_t at = order[i];
        blockIdx.x = static_cast<unsigned>(at % grid.x);
        blockIdx.y = static_cast<unsigned>(at / grid.x % grid.y);
        blockIdx.z = static_cast<unsigned>(at / grid.x / grid.y);
#ifdef __SANITIZE_THREAD__
        run_block_by(&crews[i % 3]);
#else
        run_block();
#endif
    }
#ifdef __SANITIZE_THREAD__
    for (const Crew& crew : crews) {
        if (!crew.begun) continue;
        block.stacks = crew.stacks;
        __tsan_acquire(tag(END));
        __tsan_acquire(tag(END + 1));
    }
#endif
}

} // namespace shim
