// Python bindings. No tensor crosses them: Python passes addresses, sizes and strides, and asks a bound stage to step.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/stage_cpu.h"
#if PYDIFF_WITH_CUDA
#include "cuda/launch.h"
#endif

#ifndef PYDIFF_CUDA_ARCHS
#define PYDIFF_CUDA_ARCHS ""
#endif

namespace py = pybind11;
using namespace pydiff;

namespace {

// Work below this many elements is over before another thread has woken.
constexpr int64_t kParallelElements = 65536;
// Noise costs several times as much an element.
constexpr int64_t kParallelNormals = 16384;

using Strides = std::vector<int64_t>;
using ViewSpec = std::tuple<uintptr_t, int, int64_t, Strides>;  // address, dtype, row stride, sample strides

#if PYDIFF_WITH_CUDA
void check_cuda(int error, const char* what) {
  if (!error) return;
  throw std::runtime_error(std::string(what) + ": " + cuda_error_name(error) + " (" + cuda_error_text(error) + ")");
}
#endif

View make_view(const ViewSpec& spec, const std::vector<int64_t>& shape) {
  View view;
  auto [address, dtype, row_stride, strides] = spec;
  if (strides.size() != shape.size()) throw std::invalid_argument("as many strides as sample dimensions are needed");
  view.data = reinterpret_cast<char*>(address);
  view.dtype = dtype;
  view.row_stride = row_stride;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (size, stride), outermost first
  for (size_t k = 0; k < shape.size(); ++k) {
    if (shape[k] == 1) continue;
    if (!dims.empty() && dims.back().second == strides[k] * shape[k]) dims.back() = {dims.back().first * shape[k], strides[k]};
    else dims.emplace_back(shape[k], strides[k]);
  }
  if (dims.empty()) dims.emplace_back(1, 1);
  if (dims.size() > size_t(kMaxDims)) throw std::invalid_argument("too many dimensions that memory does not merge");
  view.dims = int32_t(dims.size());
  for (size_t k = 0; k < dims.size(); ++k) view.sizes[k] = dims[k].first, view.strides[k] = dims[k].second;
  return view;
}

// First and last byte that a view of `rows` rows touches, as offsets from its address.
std::pair<int64_t, int64_t> extent(const View& view, int64_t rows) {
  int64_t low = 0, high = 0;
  auto reach = [&](int64_t size, int64_t stride) { (stride < 0 ? low : high) += (size - 1) * stride; };
  reach(rows, view.row_stride);
  for (int k = 0; k < view.dims; ++k) reach(view.sizes[k], view.strides[k]);
  return {low * item_size(view.dtype), (high + 1) * item_size(view.dtype)};
}

bool same_layout(const View& a, const View& b) {
  if (a.dtype != b.dtype || a.dims != b.dims || a.row_stride != b.row_stride) return false;
  for (int k = 0; k < a.dims; ++k)
    if (a.sizes[k] != b.sizes[k] || a.strides[k] != b.strides[k]) return false;
  return true;
}

py::object attribute(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

py::object call(PyObject* object, PyObject* method) {
  PyObject* value = PyObject_CallMethodNoArgs(object, method);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

uintptr_t address_from(PyObject* value) {
  uintptr_t address = PyLong_AsUnsignedLongLong(value);
  if (PyErr_Occurred()) throw py::error_already_set();
  return address;
}

// The names of the tensor attributes a step reads, made once.
struct Names {
  PyObject *dtype, *shape, *stride, *device, *data_ptr, *is_neg;
  static const Names& get() {
    static const Names names = {intern("dtype"),  intern("shape"),    intern("stride"),
                                intern("device"), intern("data_ptr"), intern("is_neg")};
    return names;
  }
  static PyObject* intern(const char* text) { return PyUnicode_InternFromString(text); }
};

// A stage operation with every pointer, size and stride in place. `step(m)` checks that m is laid out like the model
// output it was bound for and that no tensor has moved, and runs; False means that it did not and must be bound anew.
class BoundStage {
 public:
  BoundStage(py::dict sizes, py::dict pointers, py::dict views, py::object m, py::list watched, py::object threads,
             py::object stream)
      : threads_(std::move(threads)), stream_(std::move(stream)), type_(py::type::of(m)), dtype_(m.attr("dtype")),
        shape_(m.attr("shape")), stride_(m.attr("stride")()), device_(m.attr("device")) {
    auto size = [&](const char* name) { return sizes[name].cast<int64_t>(); };
    auto pointer = [&](const char* name) { return reinterpret_cast<void*>(pointers[name].cast<uintptr_t>()); };
    args_ = {};
    args_.rows = size("rows");
    args_.stages = size("stages");
    args_.draws = size("draws");
    args_.draw_stride = size("draw_stride");
    args_.slots = int32_t(size("slots"));
    args_.copies = int32_t(size("copies"));
    args_.scalar = int32_t(size("scalar"));
    device_index_ = int(size("device"));
    args_.registers = pointer("registers");
    args_.coefficients = pointer("coefficients");
    args_.indices = static_cast<const int32_t*>(pointer("indices"));
    args_.cursor = static_cast<int32_t*>(pointer("cursor"));
    args_.stop = static_cast<const int32_t*>(pointer("stop"));
    args_.seeds = static_cast<const int64_t*>(pointer("seeds"));
    args_.model_time = pointer("model_time");
    args_.nonfinite = static_cast<int32_t*>(pointer("nonfinite"));
    args_.arrived = static_cast<uint32_t*>(pointer("arrived"));
    auto shape = sizes["shape"].cast<std::vector<int64_t>>();
    args_.elements = 1;
    for (int64_t n : shape) args_.elements *= n;
    auto view = [&](const char* name) {
      return views.contains(name) ? make_view(views[name].cast<ViewSpec>(), shape) : View();
    };
    args_.m = view("m");
    args_.model_input = view("model_input");
    args_.mask = view("mask");
    args_.known = view("known");
    args_.constant = view("constant");
    args_.extra = view("extra");
    args_.noise = view("noise");
    for (py::handle tensor : watched) {
      py::object method = tensor.attr("data_ptr");
      watched_.emplace_back(method, method());
    }
    plain_ = m.attr("is_contiguous")().cast<bool>();
    large_ = args_.rows * args_.elements >= kParallelElements;
    m_extent_ = extent(args_.m, args_.copies * args_.rows);
    input_extent_ = extent(args_.model_input, args_.copies * args_.rows);
    m_like_input_ = same_layout(args_.m, args_.model_input);
#if PYDIFF_WITH_CUDA
    if (device_index_ >= 0) check_cuda(prepare_cuda(device_index_), "loading the stage kernels");
#endif
  }

  bool step(py::handle m) {
    const Names& names = Names::get();
    PyObject* p = m.ptr();
    if (reinterpret_cast<PyObject*>(Py_TYPE(p)) != type_.ptr()) return false;
    if (attribute(p, names.dtype).ptr() != dtype_.ptr()) return false;
    if (!equal(attribute(p, names.shape), shape_) || !equal(call(p, names.stride), stride_)) return false;
    if (!equal(attribute(p, names.device), device_)) return false;
    if (!plain_ && call(p, names.is_neg).ptr() == Py_True) return false;
    for (auto& [method, address] : watched_) {
      py::object now = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(method.ptr()));
      if (!now) throw py::error_already_set();
      if (!equal(now, address)) return false;
    }
    StageArgs args = args_;
    args.m.data = reinterpret_cast<char*>(address_from(call(p, names.data_ptr).ptr()));
    if (overlaps(args)) return false;
    run(args);
    return true;
  }

 private:
  static bool equal(const py::object& a, const py::object& b) {
    int same = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
    if (same < 0) throw py::error_already_set();
    return same;
  }

  // A model may return its own input: then every element is read before it is written. Nothing else may be shared.
  bool overlaps(const StageArgs& args) const {
    const char *low = args.m.data + m_extent_.first, *high = args.m.data + m_extent_.second;
    const char* registers = static_cast<const char*>(args.registers);
    int64_t bytes = (args.slots + 1) * args.rows * args.elements * item_size(args.scalar);
    if (low < registers + bytes && registers < high) return true;
    const char* input = args.model_input.data;
    if (!input || (input == args.m.data && m_like_input_)) return false;
    return low < input + input_extent_.second && input + input_extent_.first < high;
  }

  void run(const StageArgs& args) {
#if PYDIFF_WITH_CUDA
    if (device_index_ >= 0) {
      auto stream = reinterpret_cast<void*>(stream_(device_index_).cast<uintptr_t>());
      return check_cuda(stage_cuda(args, device_index_, stream), "launching the stage kernel");
    }
#endif
    const char* fault;
    if (large_) {
      int threads = threads_().cast<int>();
      py::gil_scoped_release release;
      fault = stage_cpu(args, threads);
    } else {
      fault = stage_cpu(args, 1);
    }
    if (fault) throw py::index_error(fault);
  }

  StageArgs args_;
  int device_index_;
  bool plain_, large_, m_like_input_;
  std::pair<int64_t, int64_t> m_extent_, input_extent_;
  py::object threads_, stream_, type_, dtype_, shape_, stride_, device_;
  std::vector<std::pair<py::object, py::object>> watched_;  // data_ptr of a tensor, and what it returned when bound
};

void normal(uintptr_t out, uintptr_t seeds, uint32_t draw, int64_t rows, int64_t elements, int threads, int device,
            uintptr_t stream) {
  auto* to = reinterpret_cast<float*>(out);
  auto* keys = reinterpret_cast<const int64_t*>(seeds);
  if (device >= 0) {
#if PYDIFF_WITH_CUDA
    auto error = normal_cuda(to, keys, draw, rows, elements, device, reinterpret_cast<void*>(stream));
    return check_cuda(error, "launching the noise kernel");
#else
    (void)stream;
    throw std::runtime_error("pydiff was built without CUDA");
#endif
  }
  if (rows * elements < kParallelNormals) return normal_cpu(to, keys, draw, rows, elements, 1);
  py::gil_scoped_release release;
  normal_cpu(to, keys, draw, rows, elements, threads);
}

std::vector<uint32_t> philox_words(std::vector<uint32_t> counter, std::vector<uint32_t> key) {
  if (counter.size() != 4 || key.size() != 2) throw std::invalid_argument("four counter and two key words are needed");
  Words r = philox({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
  return {r.r0, r.r1, r.r2, r.r3};
}

// For tests: `count` pairs of words to the two normals each gives.
void box_muller_words(uintptr_t r0, uintptr_t r1, uintptr_t cosine, uintptr_t sine, int64_t count) {
  auto *a = reinterpret_cast<const uint32_t*>(r0), *b = reinterpret_cast<const uint32_t*>(r1);
  auto *c = reinterpret_cast<float*>(cosine), *s = reinterpret_cast<float*>(sine);
  for (int64_t i = 0; i < count; ++i) {
    Pair pair = box_muller(a[i], b[i]);
    c[i] = pair.cosine;
    s[i] = pair.sine;
  }
}

py::dict layout() {
  py::dict d;
  d["X"] = int(kX), d["SLOT"] = int(kSlot), d["D"] = int(kD), d["M"] = int(kM), d["CONSTANT"] = int(kConstant);
  d["EXTRA"] = int(kExtra), d["Z0"] = int(kZ0), d["Z1"] = int(kZ1);
  d["NUM_OPERANDS"] = kNumOperands, d["NUM_SLOTS"] = kNumSlots;
  d["WEIGHTS"] = kWeights, d["OUTPUT"] = kOutput, d["GUIDANCE"] = kGuidance, d["CLIP"] = kClip, d["KNOWN"] = kKnown;
  d["INPUT_SCALE"] = kInputScale, d["TIME"] = kTime, d["SECOND_TIME"] = kSecondTime;
  d["COEFFICIENT_COLUMNS"] = kCoefficientColumns, d["WRITE_A"] = kWriteA, d["WRITE_B"] = kWriteB;
  d["DRAW0"] = kDraw0, d["DRAW1"] = kDraw1, d["INDEX_COLUMNS"] = kIndexColumns;
  return d;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (auto k = usable_kernels(); *k; ++k) names.push_back((*k)->name);
  return names;
}

py::dict build_info() {
  py::dict d;
  d["compiler"] = __VERSION__;
  d["cuda"] = bool(PYDIFF_WITH_CUDA);
  d["cuda_archs"] = PYDIFF_CUDA_ARCHS;
  d["isa"] = kernels().name;
  d["isas"] = usable_isas();
  d["threads"] = parallel_backend();
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled operations of pydiff.";
  py::class_<BoundStage>(module, "BoundStage")
      .def(py::init<py::dict, py::dict, py::dict, py::object, py::list, py::object, py::object>(), py::arg("sizes"),
           py::arg("pointers"), py::arg("views"), py::arg("m"), py::arg("watched"), py::arg("threads"),
           py::arg("stream"))
      .def("step", &BoundStage::step, "Run one stage; False if m or a bound tensor is not as it was when bound.");
  module.def("normal", &normal);
  module.def("philox", &philox_words);
  module.def("box_muller", &box_muller_words);
  module.def("layout", &layout);
  module.def("build_info", &build_info);
  module.def("select_isa", [](const std::string& name) {
    if (!select_kernels(name.c_str())) throw std::invalid_argument("no loops for '" + name + "' run on this machine");
  });
}
