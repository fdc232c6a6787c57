#include "cuda_launch.h"

namespace edgecolbert {
namespace {

// Any integer modulo 2^64. A failure shows in PyErr_Occurred, which is asked once, after all of them.
uint64_t bits(PyObject* integer) { return PyLong_AsUnsignedLongLongMask(integer); }

void* pointer(PyObject* integer) { return reinterpret_cast<void*>(bits(integer)); }

}  // namespace

int start(const CudaKernel& kernel, void* stream, uint64_t* arguments, Py_ssize_t count) {
  const unsigned* const grid = kernel.grid;
  if (!grid[0] || !grid[1] || !grid[2]) return 0;
  void* addresses[most_kernel_arguments];
  for (Py_ssize_t i = 0; i < count; ++i) addresses[i] = &arguments[i];
  // It waits where the stream's queue is full.
  PyThreadState* const state = PyEval_SaveThread();
  const int failure = kernel.launch(kernel.function, grid[0], grid[1], grid[2], kernel.threads, 1, 1, kernel.shared,
                                    stream, addresses, nullptr);
  PyEval_RestoreThread(state);
  return failure;
}

PyObject* cuda_launch(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 7 || !PyTuple_Check(arguments[2]) || PyTuple_GET_SIZE(arguments[2]) != 3 ||
      !PyTuple_Check(arguments[6])) {
    PyErr_SetString(PyExc_TypeError, "want address, function, grid (x, y, z), threads, shared, stream, tuple of int");
    return nullptr;
  }
  const Py_ssize_t size = PyTuple_GET_SIZE(arguments[6]);
  if (size > most_kernel_arguments) {
    PyErr_Format(PyExc_ValueError, "a kernel with %zd arguments; want at most %zd", size, most_kernel_arguments);
    return nullptr;
  }
  CudaKernel kernel;
  kernel.launch = reinterpret_cast<CudaLaunch>(pointer(arguments[0]));
  kernel.function = pointer(arguments[1]);
  for (int i = 0; i < 3; ++i) kernel.grid[i] = unsigned(bits(PyTuple_GET_ITEM(arguments[2], i)));
  kernel.threads = unsigned(bits(arguments[3]));
  kernel.shared = unsigned(bits(arguments[4]));
  void* const stream = pointer(arguments[5]);
  uint64_t values[most_kernel_arguments];
  for (Py_ssize_t i = 0; i < size; ++i) values[i] = bits(PyTuple_GET_ITEM(arguments[6], i));
  if (PyErr_Occurred()) return nullptr;
  if (!kernel.launch) {
    PyErr_SetString(PyExc_ValueError, "the address of cuLaunchKernel is 0");
    return nullptr;
  }
  if (const int failure = start(kernel, stream, values, size)) {
    PyErr_Format(PyExc_RuntimeError, "cuLaunchKernel failed with CUDA error %d", failure);
    return nullptr;
  }
  Py_RETURN_NONE;
}

}  // namespace edgecolbert
