// The Python module `simt`: loads libraries of kernels, calls launchers on numpy arrays, counts.
#include <dlfcn.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "runtime.h"

namespace py = pybind11;

namespace simt {

static bool is_dense(const py::array& a) {
  std::vector<std::pair<py::ssize_t, py::ssize_t>> dims;
  for (py::ssize_t i = 0; i < a.ndim(); i++)
    if (a.shape(i) != 1) dims.emplace_back(a.strides(i), a.shape(i));
  std::sort(dims.begin(), dims.end());
  py::ssize_t expected = a.itemsize();
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

static Value pass_array(const Export& f, int i, const py::handle& given) {
  Value v{};
  if (given.is_none()) return v;
  const std::string name = std::string(f.name) + ": argument " + std::to_string(i);
  if (!py::isinstance<py::array>(given))
    throw py::type_error(name + " must be a numpy array or None");
  const auto array = py::reinterpret_borrow<py::array>(given);
  const Parameter& p = f.parameters[i];
  if (array.size() && !is_dense(array)) throw py::value_error(name + " must be dense in memory");
  if (p.size && p.size != array.itemsize())
    throw py::type_error(name + " must have elements of " + std::to_string(p.size) +
                         " bytes, got " + std::to_string(array.itemsize()));
  if (p.kind == 'w' && !array.writeable()) throw py::value_error(name + " must be writeable");
  v.pointer = const_cast<void*>(array.data());
  const auto begin = reinterpret_cast<uintptr_t>(v.pointer);
  regions.push_back({begin, begin + array.nbytes(), p.kind == 'w', i});
  return v;
}

static py::object call(const Export& f, const py::args& args) {
  if (static_cast<int>(args.size()) != f.count)
    throw py::type_error(std::string(f.name) + ": takes " + std::to_string(f.count) +
                         " arguments, got " + std::to_string(args.size()));
  struct Known {
    Known() { running.known_arrays = true; }
    ~Known() {
      running.known_arrays = false;
      regions.clear();
    }
  } known;
  std::vector<Value> values(f.count + 1);  // the stream, which is null, comes last
  for (int i = 0; i < f.count; i++) {
    const char kind = f.parameters[i].kind;
    if (kind == 'f')
      values[i].real = args[i].cast<double>();
    else if (kind == 'i')
      values[i].integer = py::int_(args[i]).cast<int64_t>();
    else
      values[i] = pass_array(f, i, args[i]);
  }
  const int64_t result = f.call(f.function, values.data());
  if (!f.returns_error) return py::int_(result);
  if (result) throw Error(std::string(f.name) + " returned CUDA error " + std::to_string(result));
  return py::none();
}

// Opens a library of kernels; its launchers become functions of the namespace that is returned.
static py::object load(const std::string& path) {
  static std::map<std::string, std::pair<size_t, size_t>> loaded;
  if (!loaded.count(path)) {
    const size_t before = exports().size();
    // Global, so that libraries of torch ops find the launchers.
    if (!dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL)) throw Error(dlerror());
    loaded[path] = {before, exports().size()};
  }
  py::object space = py::module_::import("types").attr("SimpleNamespace")();
  for (size_t i = loaded[path].first; i < loaded[path].second; i++) {
    const Export f = exports()[i];
    space.attr(f.name) =
        py::cpp_function([f](const py::args& args) { return call(f, args); }, py::name(f.name));
  }
  return space;
}

static py::dict as_dict(const Counters& c) {
  py::dict d;
#define X(name) d[#name] = c.name;
  SIMT_COUNTERS(X)
#undef X
  return d;
}

static py::dict all_counters() {
  Counters total;
  py::dict kernels;
  for (const auto& [kernel, c] : counters) {
#define X(name) total.name += c.name;
    SIMT_COUNTERS(X)
#undef X
    kernels[py::str(function_name(kernel))] = as_dict(c);
  }
  py::list launches;
  for (const LaunchRecord& r : launch_records)
    launches.append(py::dict(py::arg("kernel") = function_name(r.kernel),
                             py::arg("grid") = py::make_tuple(r.grid.x, r.grid.y, r.grid.z),
                             py::arg("block") = py::make_tuple(r.block.x, r.block.y, r.block.z),
                             py::arg("smem") = r.smem));
  py::dict d = as_dict(total);
  d["kernels"] = kernels;
  d["launch_list"] = launches;
  d["asked_shared"] = asked_shared;
  return d;
}

static void reset() {
  counters.clear();
  launch_records.clear();
  asked_shared = false;
}

// Memory as cudaMalloc gives it: aligned to 256 bytes.
static py::array allocate(const std::vector<py::ssize_t>& shape, const py::dtype& dtype) {
  size_t bytes = dtype.itemsize();
  for (const py::ssize_t n : shape) bytes *= n;
  constexpr std::align_val_t kAlignment{256};
  void* memory = ::operator new(bytes, kAlignment);
  const py::capsule owner(memory, [](void* p) {
    checks::forget(p);
    ::operator delete(p, kAlignment);
  });
  return py::array(dtype, shape, memory, owner);
}

static py::array empty(const std::vector<py::ssize_t>& shape, const py::object& dtype) {
  py::array array = allocate(shape, py::dtype::from_args(dtype));
  std::memset(array.mutable_data(), 0xff, array.nbytes());
  checks::unwritten(array.data(), array.nbytes());
  return array;
}

static py::array copy(const py::array& given) {
  const auto dense =
      py::module_::import("numpy").attr("ascontiguousarray")(given).cast<py::array>();
  py::array array =
      allocate({dense.shape(), dense.shape() + dense.ndim()}, py::dtype::from_args(dense.dtype()));
  std::memcpy(array.mutable_data(), dense.data(), dense.nbytes());
  return array;
}

}  // namespace simt

PYBIND11_MODULE(simt, m) {
  m.doc() = "Runs CUDA kernels, compiled by g++, on the CPU: checks them and counts their traffic.";
  py::register_exception<simt::Error>(m, "Error", PyExc_RuntimeError);
  m.attr("variant") = simt::variant;
  m.def("load", &simt::load, py::arg("path"), "Loads a library; returns its launchers by name.");
  m.def("counters", &simt::all_counters,
        "Totals, \"kernels\" and \"launch_list\"; \"asked_shared\": plans may depend on "
        "max_shared().");
  m.def("reset", &simt::reset, "Sets all counters to zero.");
  m.def(
      "processors", [](int count) { simt::processors = count; }, py::arg("count"),
      "Sets the multiprocessors that kernels' launchers see: fewer for less work.");
  m.def("max_shared", &simt::set_max_shared, py::arg("bytes"),
        "Sets the bytes of shared memory that a block can ask for, as smaller GPUs have them.");
  m.def("empty", &simt::empty, py::arg("shape"), py::arg("dtype"),
        "A NaN-filled array; reading it before a kernel wrote it is an error (race build).");
  m.def("copy", &simt::copy, py::arg("array"),
        "A contiguous copy, aligned to 256 bytes as on the GPU, so that sectors count as there.");
  m.def(
      "only_last", [](uint64_t blocks) { simt::last_blocks = blocks; }, py::arg("blocks"),
      "Of the launches that follow, runs so many blocks alone, the last ones; 0: all.");
}
