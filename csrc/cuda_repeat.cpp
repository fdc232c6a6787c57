#include "cuda_repeat.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda_launch.h"

namespace edgecolbert {
namespace {

// From here on an address is no offset, which is all that is left of one when a storage was given back, as sharding
// does between uses. Below it lie boards that share their memory, segments that expand, and the heaps of some programs.
constexpr uint64_t large_address = uint64_t(1) << 40;
// Compilers make no use of a larger one.
constexpr uint64_t alignment = 16;
constexpr size_t most_entries = 4096;

// A reference that is given back.
class Ref {
 public:
  Ref() = default;
  explicit Ref(PyObject* owned) : object_(owned) {}
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }
  static Ref to(PyObject* borrowed) {
    Py_XINCREF(borrowed);
    return Ref(borrowed);
  }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_ = nullptr;
};

// With a Python error where the callee raised; so all below that answers with nothing, or false.
Ref call(const Ref& function) { return Ref(PyObject_CallNoArgs(function.get())); }

Ref call(const Ref& function, PyObject* argument) {
  PyObject* const arguments[] = {nullptr, argument};
  return Ref(PyObject_Vectorcall(function.get(), arguments + 1, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
}

bool integer(PyObject* object, uint64_t& value) {
  if (!object) return false;
  value = PyLong_AsUnsignedLongLongMask(object);
  return value != uint64_t(-1) || !PyErr_Occurred();
}

bool integer(const Ref& object, uint64_t& value) { return integer(object.get(), value); }

// What a call came to; without a function, nothing that could be repeated.
struct Entry {
  CudaKernel kernel;
  std::vector<uint64_t> arguments;  // addresses of the inputs come first, and are filled in
  size_t output = 0;                // the place of the output's address among them
  Ref made;                         // what `empty` is called with, a tuple
  std::vector<Ref> held;            // objects that the key names by their addresses, and the kernel's owner
};

// As dlpack.h 1.x has them: a tensor, and what a library reads its own tensors with. Python's attributes take ten times
// as long, shapes and strides most of it.
struct Tensor {
  void* data;
  int32_t device_type, device;
  int32_t rank;
  uint32_t dtype;  // kind, bits and lanes
  const int64_t *shape, *strides;
  uint64_t offset;  // in bytes, of `data`
};

struct Exchange {
  uint32_t major, minor;
  const Exchange* older;
  void* owning[3];
  int (*read)(void* object, Tensor* tensor);
};

// What a call's launch depends on, and the addresses of its inputs. Objects count by identity.
struct Call {
  static constexpr size_t most_words = 256;
  uint64_t words[most_words];
  size_t size = 0;  // counts on beyond what there is room for
  uint64_t addresses[most_kernel_arguments];
  Ref device;
  std::vector<Ref>* held;

  explicit Call(std::vector<Ref>* receiver = nullptr) : held(receiver) {}
  void word(uint64_t value) {
    if (size < most_words) words[size] = value;
    ++size;
  }
  bool word(const Ref& object) {
    uint64_t value;
    if (!integer(object, value)) return false;
    word(value);
    return true;
  }
  void identity(PyObject* object) {
    word(reinterpret_cast<uintptr_t>(object));
    if (held) held->push_back(Ref::to(object));
  }
  std::string key() const { return std::string(reinterpret_cast<const char*>(words), size * sizeof words[0]); }
};

class Launches {
 public:
  // False with a Python error.
  bool make(PyObject* arguments, PyObject* keywords);
  // Null where nothing is repeated, with a Python error or without.
  PyObject* repeat(PyObject* const* arguments, Py_ssize_t count);
  bool missed(PyObject* const* arguments, Py_ssize_t count) const;
  bool keep(PyObject* const* arguments, Py_ssize_t count, PyObject* launch);
  size_t size() const { return table_.size(); }
  void clear() {
    // First out of the way: what is let go may call back.
    const auto gone = std::exchange(table_, {});
  }

 private:
  bool read(PyObject* const* arguments, Py_ssize_t count, Call& read) const;
  bool read_tensor(PyObject* object, uint64_t device, Call& read, uint64_t& address) const;
  bool is_offset(PyObject* object, uint32_t dtype, uint64_t address) const;
  bool read_surroundings(Call& read) const;
  bool is_tensor(PyObject* object) const;

  Ref tensor_types_, keys_of_, keys_of_calls_, raw_, function_modes_, grad_enabled_, device_, stream_, empty_, entries_,
      variable_;
  Ref exchange_owner_, requires_grad_, storage_offset_;
  const Exchange* exchange_ = nullptr;
  Py_ssize_t inputs_ = 0;
  int device_type_ = 0;
  std::unordered_map<std::string, std::shared_ptr<const Entry>> table_;
  // Arguments of the last call that was not in the table; they are compared and never looked into, as they may be gone.
  std::vector<PyObject*> missed_;
};

bool Launches::make(PyObject* arguments, PyObject* keywords) {
  static const char* names[] = {"inputs",        "device_type", "exchange",       "tensor_types", "keys_of",
                                "keys_of_calls", "raw",         "function_modes", "grad_enabled", "device",
                                "stream",        "empty",       "entries",        "variable",     nullptr};
  PyObject* given[12];
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "$niOO!OOOOOOOOO!O", const_cast<char**>(names), &inputs_,
                                   &device_type_, &given[0], &PyTuple_Type, &given[1], &given[2], &given[3], &given[4],
                                   &given[5], &given[6], &given[7], &given[8], &given[9], &PyTuple_Type, &given[10],
                                   &given[11]))
    return false;
  Ref* const kept[] = {&exchange_owner_, &tensor_types_, &keys_of_, &keys_of_calls_, &raw_,     &function_modes_,
                       &grad_enabled_,   &device_,       &stream_,  &empty_,         &entries_, &variable_};
  for (int i = 0; i < 12; ++i) *kept[i] = Ref::to(given[i]);
  exchange_ = static_cast<const Exchange*>(PyCapsule_GetPointer(exchange_owner_.get(), "dlpack_exchange_api"));
  if (!exchange_) return false;
  bool right = exchange_->major == 1 && exchange_->read && inputs_ >= 1 && inputs_ < most_kernel_arguments &&
               PyContextVar_CheckExact(variable_.get());
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(entries_.get()); ++i) {
    PyObject* const each = PyTuple_GET_ITEM(entries_.get(), i);
    right = right && PyTuple_Check(each) && PyTuple_GET_SIZE(each) == 2 && PyDict_Check(PyTuple_GET_ITEM(each, 0));
  }
  if (!right) {
    PyErr_SetString(PyExc_ValueError,
                    "want DLPack 1.x that reads tensors, 1 to 63 inputs, entries of (dict, key), a context variable");
    return false;
  }
  requires_grad_ = Ref(PyUnicode_InternFromString("requires_grad"));
  storage_offset_ = Ref(PyUnicode_InternFromString("storage_offset"));
  return requires_grad_ && storage_offset_;
}

bool Launches::is_tensor(PyObject* object) const {
  PyObject* const types = tensor_types_.get();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types); ++i)
    if (PyTuple_GET_ITEM(types, i) == reinterpret_cast<PyObject*>(Py_TYPE(object))) return true;
  return false;
}

bool Launches::read(PyObject* const* arguments, Py_ssize_t count, Call& read) const {
  // The cheapest first, as most of what is not repeated goes no further.
  Tensor first;
  if (count < inputs_ || !is_tensor(arguments[0])) return false;
  for (Py_ssize_t i = 1; i < inputs_; ++i)
    if (arguments[i] != Py_None && !is_tensor(arguments[i])) return false;
  if (exchange_->read(arguments[0], &first) || first.device_type != device_type_) return false;
  read.device = call(device_);
  uint64_t current;
  if (!integer(read.device, current)) return false;
  const Ref differentiable = call(grad_enabled_);
  if (!differentiable) return false;
  read.word(current);
  for (Py_ssize_t i = 0; i < inputs_; ++i) {
    read.addresses[i] = 0;
    read.word(arguments[i] != Py_None);
    if (arguments[i] == Py_None) continue;
    if (differentiable.get() != Py_False && Ref(PyObject_GetAttr(arguments[i], requires_grad_.get())).get() != Py_False)
      return false;
    if (!read_tensor(arguments[i], current, read, read.addresses[i])) return false;
  }
  for (Py_ssize_t i = inputs_; i < count; ++i) read.identity(arguments[i]);
  return read_surroundings(read) && read.size <= Call::most_words;
}

bool Launches::read_tensor(PyObject* object, uint64_t device, Call& read, uint64_t& address) const {
  Tensor tensor;
  if (exchange_->read(object, &tensor) || tensor.device_type != device_type_ || uint64_t(tensor.device) != device)
    return false;
  address = reinterpret_cast<uintptr_t>(tensor.data) + tensor.offset;
  if (address < large_address && is_offset(object, tensor.dtype, address)) return false;
  read.word(address % alignment);
  read.word(tensor.dtype);
  read.word(uint64_t(tensor.rank));
  for (int32_t i = 0; i < tensor.rank; ++i) read.word(uint64_t(tensor.shape[i]));
  for (int32_t i = 0; i < tensor.rank; ++i) read.word(uint64_t(tensor.strides[i]));
  const Ref keys = call(keys_of_, object);
  return keys && read.word(call(raw_, keys.get()));
}

bool Launches::is_offset(PyObject* object, uint32_t dtype, uint64_t address) const {
  const Ref offset(PyObject_CallMethodNoArgs(object, storage_offset_.get()));
  const uint64_t bytes = (dtype >> 8 & 0xff) / 8;
  uint64_t elements;
  return !integer(offset, elements) || address == elements * bytes;
}

bool Launches::read_surroundings(Call& read) const {
  const Ref keys = call(keys_of_calls_);
  if (!keys || !read.word(call(raw_, keys.get())) || !read.word(call(function_modes_))) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(entries_.get()); ++i) {
    PyObject* const each = PyTuple_GET_ITEM(entries_.get(), i);
    PyObject* const value = PyDict_GetItemWithError(PyTuple_GET_ITEM(each, 0), PyTuple_GET_ITEM(each, 1));
    if (!value && PyErr_Occurred()) return false;
    read.identity(value);
  }
  PyObject* value = nullptr;
  if (PyContextVar_Get(variable_.get(), nullptr, &value)) return false;
  read.identity(value);
  Py_XDECREF(value);
  return true;
}

PyObject* Launches::repeat(PyObject* const* arguments, Py_ssize_t count) {
  missed_.clear();
  Call asked;
  if (!read(arguments, count, asked)) return nullptr;
  const auto found = table_.find(asked.key());
  if (found == table_.end()) {
    missed_.assign(arguments, arguments + count);
    return nullptr;
  }
  // Shared, as the table may be emptied by whoever runs while memory is allocated or the driver waits.
  const std::shared_ptr<const Entry> entry = found->second;
  if (!entry->kernel.function) return nullptr;
  Ref output(PyObject_Call(empty_.get(), entry->made.get(), nullptr));
  uint64_t stream, values[most_kernel_arguments];
  std::copy(entry->arguments.begin(), entry->arguments.end(), values);
  std::copy_n(asked.addresses, inputs_, values);
  Tensor made_tensor;
  if (!output || exchange_->read(output.get(), &made_tensor) || !integer(call(stream_, asked.device.get()), stream))
    return nullptr;
  values[entry->output] = reinterpret_cast<uintptr_t>(made_tensor.data) + made_tensor.offset;
  if (start(entry->kernel, reinterpret_cast<void*>(stream), values, Py_ssize_t(entry->arguments.size())))
    return nullptr;
  return output.release();
}

bool Launches::missed(PyObject* const* arguments, Py_ssize_t count) const {
  return !missed_.empty() && std::equal(missed_.begin(), missed_.end(), arguments, arguments + count);
}

bool Launches::keep(PyObject* const* arguments, Py_ssize_t count, PyObject* launch) {
  const auto entry = std::make_shared<Entry>();
  Call asked(&entry->held);
  if (!read(arguments, count, asked)) return false;
  if (launch != Py_None) {
    unsigned long long address, function;
    Py_ssize_t output;
    PyObject *values, *made, *owner;
    CudaKernel& kernel = entry->kernel;
    if (!PyTuple_Check(launch)) {
      PyErr_SetString(PyExc_TypeError, "want a launch as a tuple, or None");
      return false;
    }
    if (!PyArg_ParseTuple(launch, "KK(III)IIO!nO!O", &address, &function, &kernel.grid[0], &kernel.grid[1],
                          &kernel.grid[2], &kernel.threads, &kernel.shared, &PyTuple_Type, &values, &output,
                          &PyTuple_Type, &made, &owner))
      return false;
    const Py_ssize_t size = PyTuple_GET_SIZE(values);
    if (!address || !function || size > most_kernel_arguments || output < inputs_ || output >= size) {
      PyErr_SetString(PyExc_ValueError, "a launch that cannot be repeated");
      return false;
    }
    kernel.launch = reinterpret_cast<CudaLaunch>(address);
    kernel.function = reinterpret_cast<void*>(function);
    entry->arguments.resize(size_t(size));
    for (Py_ssize_t i = 0; i < size; ++i)
      if (!integer(PyTuple_GET_ITEM(values, i), entry->arguments[size_t(i)])) return false;
    entry->output = size_t(output);
    entry->made = Ref::to(made);
    entry->held.push_back(Ref::to(owner));
  }
  if (table_.size() >= most_entries) clear();
  table_[asked.key()] = entry;
  return true;
}

struct Object {
  PyObject_HEAD Launches launches;
};

Launches& of(PyObject* self) { return reinterpret_cast<Object*>(self)->launches; }

PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  PyObject* const self = type->tp_alloc(type, 0);
  if (!self) return nullptr;
  new (&of(self)) Launches();
  if (of(self).make(arguments, keywords)) return self;
  Py_DECREF(self);
  return nullptr;
}

void dealloc(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  of(self).~Launches();
  type->tp_free(self);
  Py_DECREF(type);
}

Py_ssize_t length(PyObject* self) { return Py_ssize_t(of(self).size()); }

PyObject* repeat(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  if (PyObject* const output = of(self).repeat(arguments, count)) return output;
  // What is wrong, whoever answers instead says.
  PyErr_Clear();
  Py_RETURN_NONE;
}

PyObject* missed(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  return PyBool_FromLong(of(self).missed(arguments, count));
}

PyObject* keep(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  const bool kept = count > 0 && of(self).keep(arguments, count - 1, arguments[count - 1]);
  return PyErr_Occurred() ? nullptr : PyBool_FromLong(kept);
}

PyObject* clear(PyObject* self, PyObject*) {
  of(self).clear();
  Py_RETURN_NONE;
}

template <class F>
PyCFunction function(F* f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef methods[] = {{"repeat", function(&repeat), METH_FASTCALL,
                          "The output of a launch that these arguments came to before, else None."},
                         {"missed", function(&missed), METH_FASTCALL,
                          "Whether the last call of repeat was with these, and did not know them."},
                         {"keep", function(&keep), METH_FASTCALL,
                          "With the launch last, or None: what `repeat` of the others does from now on."},
                         {"clear", &clear, METH_NOARGS, "Forget all launches."},
                         {nullptr, nullptr, 0, nullptr}};

PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(&make)},
                       {Py_tp_dealloc, reinterpret_cast<void*>(&dealloc)},
                       {Py_tp_methods, methods},
                       {Py_sq_length, reinterpret_cast<void*>(&length)},
                       {0, nullptr}};

PyType_Spec spec = {"edgecolbert_kernels._C.Launches", sizeof(Object), 0, Py_TPFLAGS_DEFAULT, slots};

}  // namespace

PyObject* launches_type() { return PyType_FromSpec(&spec); }

}  // namespace edgecolbert
