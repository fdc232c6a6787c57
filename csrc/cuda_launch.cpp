#include "cuda_launch.h"

#include <cstdint>

namespace edgecolbert {
namespace {

// As cuda.h has it: the function, the grid, the block, shared bytes, the stream, addresses of the arguments, and null.
using Launch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                       void**);

constexpr Py_ssize_t most_arguments = 64;

// Any integer modulo 2^64. A failure shows in PyErr_Occurred, which is asked once, after all of them.
uint64_t bits(PyObject* integer) { return PyLong_AsUnsignedLongLongMask(integer); }

void* pointer(PyObject* integer) { return reinterpret_cast<void*>(bits(integer)); }

}  // namespace

PyObject* cuda_launch(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 7 || !PyTuple_Check(arguments[2]) || PyTuple_GET_SIZE(arguments[2]) != 3 ||
      !PyTuple_Check(arguments[6])) {
    PyErr_SetString(PyExc_TypeError, "want address, function, grid (x, y, z), threads, shared, stream, tuple of int");
    return nullptr;
  }
  const Py_ssize_t size = PyTuple_GET_SIZE(arguments[6]);
  if (size > most_arguments) {
    PyErr_Format(PyExc_ValueError, "a kernel with %zd arguments; want at most %zd", size, most_arguments);
    return nullptr;
  }
  const auto launch = reinterpret_cast<Launch>(pointer(arguments[0]));
  void* const function = pointer(arguments[1]);
  unsigned grid[3];
  for (int i = 0; i < 3; ++i) grid[i] = unsigned(bits(PyTuple_GET_ITEM(arguments[2], i)));
  const unsigned threads = unsigned(bits(arguments[3])), shared = unsigned(bits(arguments[4]));
  void* const stream = pointer(arguments[5]);
  uint64_t values[most_arguments];
  void* addresses[most_arguments];
  for (Py_ssize_t i = 0; i < size; ++i) {
    values[i] = bits(PyTuple_GET_ITEM(arguments[6], i));
    addresses[i] = &values[i];
  }
  if (PyErr_Occurred()) return nullptr;
  if (!launch) {
    PyErr_SetString(PyExc_ValueError, "the address of cuLaunchKernel is 0");
    return nullptr;
  }
  int failure = 0;
  if (grid[0] && grid[1] && grid[2]) {
    // It waits where the stream's queue is full.
    PyThreadState* const state = PyEval_SaveThread();
    failure = launch(function, grid[0], grid[1], grid[2], threads, 1, 1, shared, stream, addresses, nullptr);
    PyEval_RestoreThread(state);
  }
  if (failure) {
    PyErr_Format(PyExc_RuntimeError, "cuLaunchKernel failed with CUDA error %d", failure);
    return nullptr;
  }
  Py_RETURN_NONE;
}

}  // namespace edgecolbert
