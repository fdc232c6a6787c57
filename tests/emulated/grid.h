// A grid on the CPU: a thread of a block is a fiber, and blocks run one after another.
//
// A fiber runs until a function of its warp or block, which waits for the others; when all that takes part is there,
// they go on. Where nobody can, the launch fails and says who waits where. Shared memory is 0xff everywhere (NaN)
// before every block. An access outside of what is mapped, or an operation without a meaning, fails the launch too.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

namespace emulated {

constexpr int LANES = 32, MOST_THREADS = 1024;
constexpr size_t STACK = 64 << 10, LARGEST = 48;  // bytes of a stack, and of what a lane gives to its warp

struct Index {
  unsigned x, y, z;
};

enum State { FRESH, RUNS, AT_WARP, AT_BLOCK, LEFT };

struct Thread {
  Index thread;
  State state;
  const char* what;  // it waits for, and in which line
  int line;
  unsigned mask;
  ucontext_t context;
  jmp_buf at;
};

// What the lanes gave. It holds until all that took part have it, since they give again only after that.
struct Warp {
  alignas(16) char bytes[2][LANES][LARGEST];
  int latest;

  template <typename T>
  const T& given(int lane) const {
    static_assert(sizeof(T) <= LARGEST);
    return *reinterpret_cast<const T*>(bytes[latest][lane]);
  }
};

struct Grid {
  Index block;
  Thread* current;
  int count;  // of threads
  Thread threads[MOST_THREADS];
  Warp warps[MOST_THREADS / LANES];
  void (*kernel)();
  jmp_buf scheduler;
  sigjmp_buf failed;
  char* message;
  size_t room;
};

inline Grid grid;

struct Threads {
  Thread* begin() const { return grid.threads; }
  Thread* end() const { return grid.threads + grid.count; }
};

inline Threads threads() { return {}; }

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  int length = 0;
  if (grid.current) {
    length = snprintf(grid.message, grid.room, "block (%u, %u), thread %u: ", grid.block.x, grid.block.y,
                      grid.current->thread.x);
  }
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(grid.message + length, grid.room - length, format, arguments);
  va_end(arguments);
  siglongjmp(grid.failed, 1);
}

inline void wait(State state, const char* what, int line, unsigned mask) {
  Thread& self = *grid.current;
  self.state = state, self.what = what, self.line = line, self.mask = mask;
  if (!_setjmp(self.at)) _longjmp(grid.scheduler, 1);
}

inline void meet_block(const char* what, int line) { wait(AT_BLOCK, what, line, 0); }

inline const Warp& meet(const char* what, int line, unsigned mask, const void* given, size_t size) {
  const unsigned number = grid.current->thread.x;
  Warp& warp = grid.warps[number / LANES];
  if (!(mask >> number % LANES & 1)) fail("%s, line %d: it is not in its own mask", what, line);
  memcpy(warp.bytes[!warp.latest][number % LANES], given, size);
  wait(AT_WARP, what, line, mask);
  return warp;
}

inline void fiber() {
  grid.kernel();
  grid.current->state = LEFT;
  _longjmp(grid.scheduler, 1);
}

__attribute__((noinline)) inline void prepare(Thread& thread, char* stack) {
  thread.state = FRESH;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = stack;
  thread.context.uc_stack.ss_size = STACK;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, fiber, 0);
}

// Runs it until it waits or leaves.
__attribute__((noinline)) inline void resume(Thread& thread) {
  grid.current = &thread;
  if (!_setjmp(grid.scheduler)) {
    if (thread.state == FRESH) {
      thread.state = RUNS;
      setcontext(&thread.context);
    } else {
      thread.state = RUNS;
      _longjmp(thread.at, 1);
    }
  }
  grid.current = nullptr;
}

inline bool same(const Thread& a, const Thread& b) {
  return a.state == b.state && a.what == b.what && a.line == b.line && a.mask == b.mask;
}

// Lets a warp's lanes go on that have all met.
inline bool release(Warp& warp, Thread* lanes) {
  const Thread* first = nullptr;
  for (int n = 0; n < LANES && !first; ++n) {
    if (lanes[n].state == AT_WARP) first = &lanes[n];
  }
  if (!first) return false;
  // The kernels' masks are whole warps, so there is one meeting at a time.
  for (int n = 0; n < LANES; ++n) {
    if (first->mask >> n & 1 && !same(lanes[n], *first)) return false;
  }
  const unsigned mask = first->mask;
  warp.latest = !warp.latest;
  for (int n = 0; n < LANES; ++n) {
    if (mask >> n & 1) lanes[n].state = RUNS;
  }
  return true;
}

[[noreturn]] inline void stuck() {
  const Thread *one = nullptr, *other = nullptr;
  for (const Thread& thread : threads()) {
    if (!one && thread.state != LEFT) one = &thread;
  }
  for (const Thread& thread : threads()) {
    const bool together = one->state == AT_BLOCK || thread.thread.x / LANES == one->thread.x / LANES;
    if (!other && together && !same(thread, *one)) other = &thread;
  }
  if (!other) fail("block (%u, %u): nobody goes on from %s, line %d", grid.block.x, grid.block.y, one->what, one->line);
  if (other->state == LEFT) {
    fail("block (%u, %u): thread %u waits at %s, line %d, and thread %u left", grid.block.x, grid.block.y,
         one->thread.x, one->what, one->line, other->thread.x);
  }
  fail("block (%u, %u): thread %u waits at %s, line %d, and thread %u at %s, line %d", grid.block.x, grid.block.y,
       one->thread.x, one->what, one->line, other->thread.x, other->what, other->line);
}

inline void run_block(char* stacks, bool backwards) {
  const int count = grid.count;
  for (int n = 0; n < count; ++n) {
    Thread& thread = grid.threads[n];
    thread.thread = {static_cast<unsigned>(n), 0, 0};
    prepare(thread, stacks + n * STACK);
  }
  while (true) {
    bool ran = false;
    // A warp goes as far as it can, so that one which should have waited for another goes too far.
    for (int first = 0; first < count; first += LANES) {
      const int warp = (backwards ? count - LANES - first : first) / LANES;
      Thread* lanes = &grid.threads[warp * LANES];
      do {
        for (int n = 0; n < LANES; ++n) {
          Thread& thread = lanes[backwards ? LANES - 1 - n : n];
          if (thread.state == FRESH || thread.state == RUNS) resume(thread), ran = true;
        }
      } while (release(grid.warps[warp], lanes));
    }
    int left = 0, at_block = 0;
    for (const Thread& thread : threads()) {
      left += thread.state == LEFT;
      at_block += same(thread, grid.threads[0]) && thread.state == AT_BLOCK;
    }
    if (left == count) return;
    if (at_block == count) {
      for (Thread& thread : threads()) thread.state = RUNS;
    } else if (!ran) {
      stuck();
    }
  }
}

// This library's thread_local variables, which are the kernel's shared memory.
struct Shared {
  char* bytes;
  size_t size;
};

inline Shared shared_memory(const void* one_of_it) {
  struct Search {
    const char* inside;
    Shared found;
  } search = {static_cast<const char*>(one_of_it), {}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* given) {
        auto& search = *static_cast<Search*>(given);
        for (int n = 0; n < info->dlpi_phnum; ++n) {
          char* bytes = static_cast<char*>(info->dlpi_tls_data);
          const size_t size = info->dlpi_phdr[n].p_memsz;
          if (info->dlpi_phdr[n].p_type != PT_TLS || !bytes) continue;
          if (bytes <= search.inside && search.inside < bytes + size) search.found = {bytes, size};
        }
        return 0;
      },
      &search);
  if (!search.found.bytes) fail("the shared memory is not found");
  return search.found;
}

inline void caught(int number, siginfo_t* info, void*) {
  if (number == SIGILL) fail("an operation without a meaning: an index, a shift, a sum or an alignment");
  fail("an access outside, at %p", info->si_addr);
}

// `dynamic` is where shared memory lies whose size comes with the launch, `most` what there may be of it.
inline int run(void (*kernel)(), Index blocks, int threads, char* dynamic, size_t size, size_t most, bool backwards,
               char* message, size_t room) {
  grid.kernel = kernel, grid.message = message, grid.room = room, grid.current = nullptr;
  grid.count = threads;
  char* stacks = static_cast<char*>(
      mmap(nullptr, threads * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) return 2;
  const int signals[] = {SIGSEGV, SIGBUS, SIGILL};
  struct sigaction catching = {}, before[3];
  catching.sa_sigaction = caught;
  catching.sa_flags = SA_SIGINFO | SA_NODEFER;
  for (int n = 0; n < 3; ++n) sigaction(signals[n], &catching, &before[n]);
  const int failed = sigsetjmp(grid.failed, 1);
  if (!failed) {
    if (threads % LANES || threads > MOST_THREADS) fail("%d threads are not some whole warps", threads);
    if (size > most) fail("%zu bytes of shared memory, of %zu", size, most);
    const Shared shared = shared_memory(dynamic);
    const unsigned count = blocks.x * blocks.y;
    for (unsigned n = 0; n < count; ++n) {
      const unsigned number = backwards ? count - 1 - n : n;
      grid.block = {number % blocks.x, number / blocks.x, 0};
      memset(shared.bytes, 0xff, shared.size);
      run_block(stacks, backwards);
      for (size_t at = size; at < most; ++at) {
        if (dynamic[at] != '\xff')
          fail("block (%u, %u): wrote shared memory at %zu, of %zu", grid.block.x, grid.block.y, at, size);
      }
    }
  }
  for (int n = 0; n < 3; ++n) sigaction(signals[n], &before[n], nullptr);
  munmap(stacks, threads * STACK);
  return failed;
}

}  // namespace emulated
