// Kernels on a GPU, started through the driver's `cuLaunchKernel`. Its address comes from the caller, so that neither
// building nor loading the module needs anything of CUDA.
#pragma once

#include <Python.h>

namespace edgecolbert {

// For METH_FASTCALL. Arguments: the address of cuLaunchKernel, the function's handle, the grid (x, y, z), threads of a
// block, bytes of dynamic shared memory, the stream's handle, and the kernel's arguments: a tuple of integers, each of
// which the kernel takes in 8 bytes. An empty grid starts nothing.
PyObject* cuda_launch(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace edgecolbert
