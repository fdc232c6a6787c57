// Kernels on a GPU, started through the driver's `cuLaunchKernel`. Its address comes from the caller, so that neither
// building nor loading the module needs anything of CUDA.
#pragma once

#include <Python.h>

#include <cstdint>

namespace edgecolbert {

constexpr Py_ssize_t most_kernel_arguments = 64;

// As cuda.h has it: the function, the grid, the block, shared bytes, the stream, addresses of the arguments, and null.
using CudaLaunch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                           void**);

struct CudaKernel {
  CudaLaunch launch = nullptr;
  void* function = nullptr;
  unsigned grid[3] = {}, threads = 0, shared = 0;
};

// With at most so many arguments of 8 bytes, without the GIL meanwhile; CUDA's error, 0 if there is none. An empty grid
// starts nothing.
int start(const CudaKernel& kernel, void* stream, uint64_t* arguments, Py_ssize_t count);

// For METH_FASTCALL. Arguments: the address of cuLaunchKernel, the function's handle, the grid (x, y, z), threads of a
// block, bytes of dynamic shared memory, the stream's handle, and the kernel's arguments: a tuple of integers, each of
// which the kernel takes in 8 bytes. An empty grid starts nothing.
PyObject* cuda_launch(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace edgecolbert
