// Calls that came to one launch of a kernel, done again when the same call comes: tensors in, a new tensor out, nothing
// of Python between. What the tensors mean, and why they led to that launch, is the caller's business. They are read
// through DLPack's functions, so that nothing of torch is needed to build the module.
#pragma once

#include <Python.h>

namespace edgecolbert {

// The type `Launches`; null with a Python error. See _C.pyi.
PyObject* launches_type();

}  // namespace edgecolbert
