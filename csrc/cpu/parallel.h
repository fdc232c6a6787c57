// One parallel loop a call.
#pragma once

#include <cstdint>
#include <type_traits>

namespace edgecolbert {

bool has_openmp();

// How many threads a loop of `tasks` tasks uses when the caller asks for `threads`: 1 in a forked child, whose OpenMP
// pool is gone.
int threads_for(int64_t tasks, int threads);

// Runs body(context, task, thread) for every task: neighbouring tasks on one thread, until a thread is done and takes
// some of what another has not begun. `body` must not throw. Subnormal operands cost dozens of cycles each, so they
// count as zero inside; the caller's floating-point mode is restored.
void run_tasks(int64_t tasks, int threads, void (*body)(void* context, int64_t task, int thread), void* context);

template <class Body>
void parallel_for(int64_t tasks, int threads, Body&& body) {
  run_tasks(
      tasks, threads,
      [](void* context, int64_t task, int thread) {
        (*static_cast<std::remove_reference_t<Body>*>(context))(task, thread);
      },
      &body);
}

}  // namespace edgecolbert
