// The compiled module: addresses and integers in, nothing out. Shapes, dtypes and lifetimes are the caller's to check.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "cpu/dispatch.h"
#include "cpu/dispatch_rate.h"
#include "cpu/driver.h"
#include "cpu/parallel.h"
#include "cuda_launch.h"
#include "cuda_repeat.h"

namespace py = pybind11;
using namespace edgecolbert;

namespace {

std::atomic<bool> screening{true};

int64_t integer(PyObject* tuple, Py_ssize_t i) {
  const int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

template <class T>
T* address(int64_t value) {
  return reinterpret_cast<T*>(value);
}

Sequences read_sequences(const py::tuple& arguments) {
  PyObject* const t = arguments.ptr();
  Sequences s;
  const bool list = arguments.size() == 6 || arguments.size() == 7;
  if (!list && arguments.size() != 13) throw py::value_error("a sequence description has 6, 7 or 13 integers");
  const int64_t dtype = integer(t, list ? 0 : 1);
  const int64_t dim = integer(t, list ? 1 : 2);
  if (dtype < 0 || dtype > 3) throw py::value_error("unknown dtype code " + std::to_string(dtype));
  if (dim < 1 || dim > INT32_MAX / 64) throw py::value_error("dim out of range: " + std::to_string(dim));
  s.dtype = DType(dtype);
  s.dim = int32_t(dim);
  const int64_t bytes = bytes_of(s.dtype);
  if (list) {
    s.dim_stride = bytes;
    s.pointers = address<const int64_t>(integer(t, 2));
    s.lengths = address<const int64_t>(integer(t, 3));
    s.token_strides = address<const int64_t>(integer(t, 4));
    s.count = integer(t, 5);
    if (arguments.size() == 7) s.scales = address<const float>(integer(t, 6));
  } else {
    s.data = address<const char>(integer(t, 0));
    s.dim_stride = integer(t, 3) * bytes;
    s.token_stride = integer(t, 4) * bytes;
    s.inner_stride = integer(t, 5) * bytes;
    s.outer_stride = integer(t, 6) * bytes;
    s.inner_count = integer(t, 7);
    s.count = integer(t, 8);
    s.length = integer(t, 9);
    s.offsets = address<const int64_t>(integer(t, 10));
    s.mask = address<const uint8_t>(integer(t, 11));
    s.scales = address<const float>(integer(t, 12));
  }
  if ((s.dtype == DType::i8) != (s.scales != nullptr)) throw py::value_error("int8 has scales, other dtypes have none");
  if (s.inner_count < 1 || s.count < 0 || s.length < 0)
    throw py::value_error("negative size in a sequence description");
  return s;
}

// Token strides of a list are handed over in elements.
struct ByteStrides {
  explicit ByteStrides(Sequences& s) {
    if (!s.token_strides) return;
    const int64_t bytes = bytes_of(s.dtype);
    strides.assign(s.token_strides, s.token_strides + s.count);
    for (int64_t& stride : strides) stride *= bytes;
    s.token_strides = strides.data();
  }
  std::vector<int64_t> strides;
};

Pairs read_pairs(int layout, const py::tuple& index, const Sequences& queries, const Sequences& documents) {
  if (layout < 0 || layout > 2) throw py::value_error("unknown layout " + std::to_string(layout));
  Pairs pairs;
  pairs.layout = Layout(layout);
  if (pairs.layout == Layout::own && (queries.count ? documents.count % queries.count : documents.count)) {
    throw py::value_error("the number of documents is no multiple of the number of queries");
  }
  if (pairs.layout == Layout::indexed) {
    pairs.count = integer(index.ptr(), 0);
    pairs.query_index = address<const int64_t>(integer(index.ptr(), 1));
    pairs.document_index = address<const int64_t>(integer(index.ptr(), 2));
  }
  if (queries.dim != documents.dim) throw py::value_error("queries and documents differ in dim");
  return pairs;
}

// Token numbers within a document are int32 where they are kept: in masks and in the argmax.
void check_lengths(const Sequences& documents, bool numbered) {
  if (!numbered) return;
  const int64_t different =
      documents.offsets || documents.lengths ? documents.count : std::min<int64_t>(documents.count, 1);
  for (int64_t j = 0; j < different; ++j) {
    if (documents.tokens(j) > INT32_MAX) {
      throw py::value_error("D has a document of " + std::to_string(documents.tokens(j)) +
                            " tokens; with a mask or a gradient want at most 2147483647");
    }
  }
}

void check_winners(const Winners& winners, const Sequences& queries, const Pairs& pairs) {
  if (!winners.data) return;
  if (winners.bytes != 2 && winners.bytes != 4) throw py::value_error("argmax_bytes must be 2 or 4");
  if (queries.pointers || (queries.offsets && pairs.layout != Layout::all))
    throw py::value_error("no argmax for this layout of queries");
}

void py_forward(const py::tuple& queries, const py::tuple& documents, int layout, const py::tuple& index, int64_t out,
                int64_t argmax, int argmax_bytes, int precision, bool zero_mode, bool normalize, int threads) {
  ForwardCall call;
  call.queries = read_sequences(queries);
  call.documents = read_sequences(documents);
  if (call.queries.dtype == DType::i8) throw py::value_error("queries are not int8");
  const ByteStrides query_strides(call.queries), document_strides(call.documents);
  call.pairs = read_pairs(layout, index, call.queries, call.documents);
  call.out = address<float>(out);
  call.winners = {address<void>(argmax), argmax_bytes};
  check_winners(call.winners, call.queries, call.pairs);
  check_lengths(call.documents, call.winners.data || call.documents.mask);
  call.fixed_point = precision == 1;
  call.masked_is_zero = zero_mode;
  call.normalize = normalize;
  call.threads = threads;
  const Kernels& isa = kernels();
  const py::gil_scoped_release release;
  call.screen = screening.load(std::memory_order_relaxed);
  forward(isa, call);
}

void py_backward(const py::tuple& queries, const py::tuple& documents, int layout, const py::tuple& index, int64_t grad,
                 int64_t argmax, int argmax_bytes, int64_t grad_queries, int64_t grad_documents, bool normalize,
                 bool accumulate_queries, int threads) {
  BackwardCall call;
  call.queries = read_sequences(queries);
  call.documents = read_sequences(documents);
  if (call.queries.pointers || call.documents.pointers) throw py::value_error("no backward for lists");
  if (call.queries.dtype == DType::i8 || call.documents.dtype == DType::i8)
    throw py::value_error("no backward for int8: a gradient does not go through its rounding");
  call.pairs = read_pairs(layout, index, call.queries, call.documents);
  call.gradient = address<const float>(grad);
  call.winners = {address<void>(argmax), argmax_bytes};
  check_winners(call.winners, call.queries, call.pairs);
  call.grad_queries = address<char>(grad_queries);
  call.grad_documents = address<char>(grad_documents);
  call.accumulate_queries = accumulate_queries;
  call.normalize = normalize;
  call.threads = threads;
  const Kernels& isa = kernels();
  const py::gil_scoped_release release;
  backward(isa, call);
}

void py_pack_offsets(const py::tuple& source, int64_t out, int threads) {
  const Sequences sequences = read_sequences(source);
  const py::gil_scoped_release release;
  pack_offsets(sequences, address<int64_t>(out), threads);
}

int64_t py_pack(const py::tuple& source, bool normalize, int dtype, int64_t offsets, int64_t out, int64_t scales,
                int threads) {
  PackCall call;
  call.source = read_sequences(source);
  if (call.source.dtype == DType::i8) throw py::value_error("packs float rows, not int8");
  const ByteStrides strides(call.source);
  if (dtype < 0 || dtype > 3) throw py::value_error("unknown dtype code " + std::to_string(dtype));
  check_lengths(call.source, call.source.mask);
  call.dtype = DType(dtype);
  call.normalize = normalize;
  call.offsets = address<const int64_t>(offsets);
  call.out = address<char>(out);
  call.scales = address<float>(scales);
  call.threads = threads;
  const Kernels& isa = kernels();
  const py::gil_scoped_release release;
  return pack(isa, call);
}

void py_unpack(const py::tuple& source, int64_t out, int threads) {
  UnpackCall call;
  call.source = read_sequences(source);
  if (!call.source.offsets) throw py::value_error("unpacks packed rows");
  call.out = address<float>(out);
  call.threads = threads;
  const Kernels& isa = kernels();
  const py::gil_scoped_release release;
  unpack(isa, call);
}

double measure_peak(const std::string& kind, double seconds) {
  if (kind != "f32" && kind != "i16" && kind != "i8")
    throw py::value_error("kind must be 'f32', 'i16' or 'i8', got '" + kind + "'");
  const Kernels& isa = kernels();
  const Peak peak = kind == "f32" ? Peak::f32 : kind == "i16" ? Peak::i16 : Peak::i8;
  const py::gil_scoped_release release;
  using Clock = std::chrono::steady_clock;
  double best = 0.0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  do {
    const auto start = Clock::now();
    const uint64_t operations = isa.peak_operations(peak);
    const double elapsed = std::chrono::duration<double, std::nano>(Clock::now() - start).count();
    best = std::max(best, double(operations) / elapsed);
  } while (Clock::now() < end);
  return best;
}

void move_lines(uintptr_t source, uintptr_t out, uintptr_t runs, int64_t count, int ratio, int threads) {
  if (source % 64 || out % 64) throw py::value_error("source and out must be aligned to 64 bytes");
  if (ratio != 1 && ratio != 2 && ratio != 4) throw py::value_error("ratio must be 1, 2 or 4");
  const Kernels& isa = kernels();
  const py::gil_scoped_release release;
  const int64_t pieces = int64_t(threads) * 16;
  parallel_for(pieces, threads, [&](int64_t piece, int) {
    const int64_t begin = count * piece / pieces, end = count * (piece + 1) / pieces;
    isa.move_lines(reinterpret_cast<const float*>(source), reinterpret_cast<float*>(out),
                   reinterpret_cast<const LineRun*>(runs) + begin, end - begin, ratio);
  });
}

// Not by pybind11, whose calls cost as much as a launch may.
PyMethodDef direct[] = {
    {"cuda_launch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&cuda_launch)), METH_FASTCALL,
     "Starts a kernel: address of cuLaunchKernel, function, grid (x, y, z), threads, shared bytes, "
     "stream, and its arguments, a tuple of int of 8 bytes each."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of edgecolbert_kernels. Use the package's functions: these trust their arguments.";
  if (PyModule_AddFunctions(m.ptr(), direct)) throw py::error_already_set();
  PyObject* const launches = launches_type();
  if (!launches) throw py::error_already_set();
  m.add_object("Launches", py::reinterpret_steal<py::object>(launches));
  m.def("built_isas", &built_isas, "Instruction sets compiled in, best first.");
  m.def("available_isas", &available_isas, "Of these, what this CPU runs, best first.");
  m.def(
      "get_isa", [] { return std::string(kernels().name); },
      "The instruction set in use; RuntimeError when EDGECOLBERT_ISA cannot run.");
  m.def(
      "set_screening", [](bool on) { return screening.exchange(on); }, py::arg("on"),
      "Whether int8 may find the tokens that can win, and what it was before. Exact scores have the same bits either "
      "way.");
  m.def(
      "screened",
      [] {
        const Screened found = screened();
        return py::make_tuple(found.tried, found.done);
      },
      "How many documents have been tried to screen so far, and how many of them were.");
  m.def("set_isa", &set_isa, py::arg("name"), "Forces an instruction set; '' reads EDGECOLBERT_ISA again.");
  m.def("has_openmp", &has_openmp);
  m.def("measure_peak", &measure_peak, py::arg("kind"), py::arg("seconds") = 0.05,
        "G operations/s (2 a multiply-add) of one thread on registers alone: 'f32', 'i16' or 'i8' (0 where there are "
        "none).");
  m.def(
      "dispatch_rate", &dispatch_rate, py::call_guard<py::gil_scoped_release>(),
      "No-operations that this core starts a cycle, over 0.2 ms: fewer than at other times while another thread shares "
      "the core. 0 where it cannot be measured.");
  m.def(
      "move_lines", &move_lines, py::arg("source"), py::arg("out"), py::arg("runs"), py::arg("count"), py::arg("ratio"),
      py::arg("threads"),
      "For every `ratio` (1, 2 or 4) lines of a run, and for what is left at its end, writes their float32 sum past "
      "the caches. `runs` is int64 [count, 3]: first line read, lines read, first line written. Addresses that are no "
      "multiple of 64, or another ratio: ValueError.");
  m.def("forward", &py_forward, py::arg("queries"), py::arg("documents"), py::arg("layout"), py::arg("index"),
        py::arg("out"), py::arg("argmax"), py::arg("argmax_bytes"), py::arg("precision"), py::arg("zero_mode"),
        py::arg("normalize"), py::arg("threads"));
  m.def("backward", &py_backward, py::arg("queries"), py::arg("documents"), py::arg("layout"), py::arg("index"),
        py::arg("grad"), py::arg("argmax"), py::arg("argmax_bytes"), py::arg("grad_queries"), py::arg("grad_documents"),
        py::arg("normalize"), py::arg("accumulate_queries"), py::arg("threads"));
  m.def("pack_offsets", &py_pack_offsets, py::arg("source"), py::arg("out"), py::arg("threads"));
  m.def("pack", &py_pack, py::arg("source"), py::arg("normalize"), py::arg("dtype"), py::arg("offsets"), py::arg("out"),
        py::arg("scales"), py::arg("threads"));
  m.def("unpack", &py_unpack, py::arg("source"), py::arg("out"), py::arg("threads"));
}
