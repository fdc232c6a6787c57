// One kernel of one file with its constants, as a library: SOURCE and KERNEL name them.

#include "cuda.h"

#include SOURCE

#include <utility>

// The kernels call what they have of dynamic shared memory so. The most that a block may have on compute
// capability 9.0.
constexpr size_t MOST_SHARED = 232448;
alignas(16) thread_local float sums[MOST_SHARED / sizeof(float)];

namespace {

const int64_t* arguments;

template <typename T>
T argument(int64_t value) {
  static_assert(sizeof(T) == sizeof value, "a parameter is an address or a 64-bit integer");
  return emulated::bits<T>(value);
}

template <typename... T, size_t... N>
void call(void (*kernel)(T...), std::index_sequence<N...>) {
  kernel(argument<T>(arguments[N])...);
}

template <typename... T>
constexpr int count(void (*)(T...)) {
  return sizeof...(T);
}

template <typename... T>
constexpr int pointers(void (*)(T...)) {
  return (0 + ... + std::is_pointer_v<T>);
}

template <typename T>
constexpr bool writes = std::is_pointer_v<T> && !std::is_const_v<std::remove_pointer_t<T>>;

// A bit for each argument.
template <typename... T>
constexpr unsigned written(void (*)(T...)) {
  unsigned bits = 0, n = 0;
  ((bits |= unsigned(writes<T>) << n++), ...);
  return bits;
}

}  // namespace

extern "C" {

int num_arguments() { return count(KERNEL); }
int num_pointers() { return pointers(KERNEL); }
unsigned written_pointers() { return written(KERNEL); }

// 0, or the message says what went wrong.
int launch(const int64_t* given, unsigned blocks_x, unsigned blocks_y, int threads, size_t shared, int backwards,
           char* message, size_t room) {
  arguments = given;
  return emulated::run([] { call(KERNEL, std::make_index_sequence<count(KERNEL)>()); }, {blocks_x, blocks_y, 1},
                       threads, reinterpret_cast<char*>(sums), shared, MOST_SHARED, backwards, message, room);
}
}
