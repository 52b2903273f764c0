// Remembered calls: what an op's Python checks and choices came to, by the arguments' types and
// shapes, so that the next such call goes from Python to the dispatcher without them. The autograd
// node is here too; its gradient is the op's Python one.
//
// An extension of one version of Python and of PyTorch, unlike the libraries of csrc/torch, and
// optional: gankern/ops/_remember.py says what a call is remembered as and does without.
// Kernels of csrc/torch are called as the dispatcher would call them, without it, unless something
// listens to it: a profiler. What is registered for their operators later is not asked.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <vector>

namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using NodePtr = decltype(torch::autograd::Edge::function);

constexpr size_t kMostCalls = 1024;  // of an op; then all are forgotten
constexpr int64_t kFew = 1 << 12;
constexpr int kAbi = 5;  // of the kernels and recipes, which _remember.py compares

[[noreturn]] void throw_raised() {
  python_error error;
  error.persist();
  throw error;
}

// Keeps torch.compile, where a step of it runs eagerly, from the frames of Python that are called.
class NoDynamo {
 public:
  static PyObject* setter;  // torch._C._dynamo.eval_frame.set_eval_frame
  NoDynamo() : prior_(PyObject_CallOneArg(setter, Py_None)) {
    if (!prior_) throw_raised();
  }
  NoDynamo(const NoDynamo&) = delete;
  NoDynamo& operator=(const NoDynamo&) = delete;
  ~NoDynamo() {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    Py_XDECREF(PyObject_CallOneArg(setter, prior_));
    Py_DECREF(prior_);
    PyErr_Restore(type, value, trace);
  }

 private:
  PyObject* prior_;
};
PyObject* NoDynamo::setter = nullptr;

// A reference that is dropped under the GIL, from whatever thread, and not after Python's end.
class Held {
 public:
  explicit Held(PyObject* object) : object_(object) { Py_INCREF(object_); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() {
    if (!Py_IsInitialized()) return;
    const py::gil_scoped_acquire gil;
    Py_DECREF(object_);
  }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

// What a call may depend on, as bytes.
class Key {
 public:
  template <typename T>
  void put(char tag, const T* values, size_t count) {
    const size_t bytes = count * sizeof(T);
    if (size_ + 1 + bytes > sizeof data_) {
      whole_ = false;
    } else {
      data_[size_++] = tag;
      if (bytes) memcpy(data_ + size_, values, bytes);
      size_ += bytes;
    }
  }
  void put(char tag, int64_t value) { put(tag, &value, 1); }
  void put(char tag) { put(tag, "", 0); }
  bool whole() const { return whole_; }
  operator std::string_view() const { return {data_, size_}; }

 private:
  char data_[1024];
  size_t size_ = 0;
  bool whole_ = true;
};

struct Hash {
  using is_transparent = void;
  size_t operator()(std::string_view s) const { return std::hash<std::string_view>()(s); }
};

// What is known of calls: that there was one, that there is no recipe, or the recipe.
template <typename R>
struct Known {
  bool asked = false;
  std::shared_ptr<const R> recipe;
};

// What is known, by the key. The place found last is looked at first: to hash a key takes longer
// than to compare it.
template <typename R>
class Table {
 public:
  Known<R>* find(std::string_view key) {
    if (last_ && last_->first == key) return &last_->second;
    const auto found = known_.find(key);
    if (found == known_.end()) return nullptr;
    last_ = &*found;
    return &found->second;
  }
  Known<R>& add(std::string_view key) {
    if (Known<R>* found = find(key)) return *found;
    if (known_.size() >= kMostCalls) last_ = nullptr, known_.clear();
    return known_[std::string(key)];
  }

 private:
  using Map = std::unordered_map<std::string, Known<R>, Hash, std::equal_to<>>;
  Map known_;
  typename Map::value_type* last_ = nullptr;
};

// What an operator returned: tensors.
using Outputs = c10::SmallVector<at::Tensor, 4>;

// An operator of the dispatcher and its arguments: a constant, or a tensor by its place among those
// of the call.
struct Call {
  struct Argument {
    int place;  // -1: the constant
    c10::IValue constant;
  };
  // As csrc/torch has it. A word is what torch/csrc/stable/stableivalue_conversions.h of PyTorch
  // 2.11 makes of a value, whose ABI those libraries keep, the value's bytes; of a tensor its
  // handle, which is lent, or 0.
  using Word = uint64_t;
  using Kernel = void (*)(Word*);
  static constexpr size_t kMost = 24;

  Call(c10::OperatorHandle op, uintptr_t kernel)
      : op(std::move(op)), kernel(reinterpret_cast<Kernel>(kernel)) {}
  c10::OperatorHandle op;
  Kernel kernel;  // null: only the dispatcher knows
  std::vector<Argument> arguments;
  Word constants[kMost] = {};

  template <typename T>
  static Word word(T value) {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ && sizeof(T) <= sizeof(Word));
    Word made = 0;
    memcpy(&made, &value, sizeof value);
    return made;
  }

  // An argument of which the schema says `wanted`.
  void add(int place, const c10::IValue& constant, const c10::Argument& wanted) {
    const size_t at = arguments.size();
    const auto kind = wanted.type()->kind();
    const bool optional = kind == c10::TypeKind::OptionalType;
    const bool whole = kind == c10::TypeKind::IntType || kind == c10::TypeKind::SymIntType;
    arguments.push_back({place, constant});
    if (at >= kMost)
      kernel = nullptr;
    else if (place >= 0 || (constant.isNone() && optional))
      constants[at] = 0;
    else if (constant.isBool() && kind == c10::TypeKind::BoolType)
      constants[at] = word(constant.toBool());
    else if (constant.isInt() && whole)
      constants[at] = word(constant.toInt());
    else if (constant.isDouble() && kind == c10::TypeKind::FloatType)
      constants[at] = word(constant.toDouble());
    else
      kernel = nullptr;
  }

  template <typename Tensors>  // of a place
  Outputs run(const Tensors& tensors) const {
    const size_t outputs = op.schema().returns().size();
    if (kernel && !at::hasCallbacks()) return run_kernel(tensors, outputs);
    torch::jit::Stack stack;
    stack.reserve(arguments.size());
    for (const auto& argument : arguments)
      if (argument.place >= 0)
        stack.emplace_back(tensors(argument.place));
      else
        stack.push_back(argument.constant);
    op.callBoxed(stack);
    Outputs found;
    for (size_t i = 0; i < outputs; i++) found.push_back(std::move(stack[i]).toTensor());
    return found;
  }

 private:
  template <typename Tensors>
  Outputs run_kernel(const Tensors& tensors, size_t outputs) const {
    Word stack[kMost];
    memcpy(stack, constants, arguments.size() * sizeof *stack);
    for (size_t i = 0; i < arguments.size(); i++)
      if (arguments[i].place >= 0) stack[i] = word(&tensors(arguments[i].place));
    kernel(stack);
    Outputs found;
    for (size_t i = 0; i < outputs; i++) {
      const std::unique_ptr<at::Tensor> made(reinterpret_cast<at::Tensor*>(stack[i]));
      found.push_back(std::move(*made));
    }
    return found;
  }
};

// The first gradient of an op: calls, of its node's tensors, then dy, then what the calls before
// returned.
struct Gradient {
  std::vector<Call> calls;
  std::vector<int> found;  // among all these, for each place of the Python gradient; -1: none
};

// What an op's call is, and how to differentiate it.
struct Recipe {
  struct Saved {
    enum { kInput, kOutput, kNothing } from;
    int place;  // in the op's arguments, in the operator's outputs
  };
  struct Edge {
    int input;  // its place in the op's arguments
    int place;  // in what the Python gradient returns
  };

  explicit Recipe(Call call) : call(std::move(call)) {}
  static inline std::atomic<int64_t> made{0};
  const int64_t id = ++made;  // no other's, for the cache of compiled autograd
  Call call;
  std::vector<Saved> saved;
  std::vector<Edge> edges;
  std::string name;                // of the node
  std::unique_ptr<Held> backward;  // (saved, needs, dy) -> gradients, `places` of them
  std::unique_ptr<Held> learn;     // (saved, needs, dy) -> what a Gradient is made of, or None
  std::unique_ptr<Held> traced;    // as backward, for a dy that has no shape
  int places = 0;
  bool materialize = true;

  mutable std::mutex mutex;  // of gradients: a device's backward has a thread
  mutable Table<Gradient> gradients;
};

// What else calls depend on: set_state() of Python's.
std::atomic<int64_t> state{0};

bool plain_state();
bool describe(Key& key, const at::Tensor& t, bool grad_mode);
std::shared_ptr<const Gradient> read_gradient(PyObject* told);

struct Backward final : Node {
  Backward(std::shared_ptr<const Recipe> recipe, torch::autograd::edge_list&& edges)
      : Node(std::move(edges)), recipe(std::move(recipe)) {}

  std::string name() const override { return recipe->name; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
  }

  // Those saved, undefined where that was None, and dy.
  variable_list unpack(const at::Tensor& dy) {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list tensors;
    tensors.reserve(recipe->saved.size() + 1);
    size_t kept = 0;
    for (const auto& value : recipe->saved)
      if (value.from == Recipe::Saved::kNothing)
        tensors.emplace_back();
      else
        tensors.push_back(saved[kept++].unpack(getptr()));
    tensors.push_back(dy);
    return tensors;
  }

  // Compiled autograd traces the Python gradient.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(recipe->id);
    args.collect(state.load());
    size_t kept = 0;
    for (const auto& value : recipe->saved)
      if (value.from != Recipe::Saved::kNothing)
        args.collect(saved[kept++], value.from == Recipe::Saved::kOutput && value.place == 0);
    for (size_t i = 0; i < recipe->edges.size(); i++) args.collect(task_should_compute_output(i));
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    swap.before(saved);
    at::Tensor dy = grads[0];
    if (!dy.defined() && recipe->materialize) dy = input_metadata(0).zeros_like();
    auto found = call_python(unpack(dy), nullptr, dy.defined() ? recipe->traced : recipe->backward);
    swap.after(saved);
    return found;
  }

  variable_list apply(variable_list&& grads) override {
    at::Tensor dy = grads[0];
    if (!dy.defined() && recipe->materialize) dy = input_metadata(0).zeros_like();
    variable_list tensors = unpack(dy);
    Key key;
    key.put('W', state);
    for (size_t i = 0; i < recipe->edges.size(); i++)
      key.put(task_should_compute_output(i) ? '1' : '0');
    bool learns = false;
    if (dy.defined() && !hooked && !torch::autograd::GradMode::is_enabled() && plain_state() &&
        describe(key, dy, false)) {
      const auto known = look_up(key);
      if (known.recipe) return run(*known.recipe, std::move(tensors));
      learns = !known.asked;
    }
    return call_python(tensors, learns ? &key : nullptr, recipe->backward);
  }

  // The second time that a gradient is looked for, `asked` is false and the caller shall learn it.
  Known<Gradient> look_up(const Key& key) const {
    const std::lock_guard<std::mutex> lock(recipe->mutex);
    if (Known<Gradient>* found = recipe->gradients.find(key)) {
      const auto known = *found;
      found->asked = true;
      return known;
    }
    recipe->gradients.add(key);
    return {true, nullptr};
  }

  variable_list run(const Gradient& gradient, variable_list&& tensors) const {
    for (const Call& call : gradient.calls)
      for (auto& made : call.run([&](int place) -> const at::Tensor& { return tensors[place]; }))
        tensors.push_back(std::move(made));
    variable_list out(recipe->edges.size());
    for (size_t i = 0; i < out.size(); i++) {
      const int place = gradient.found.at(recipe->edges[i].place);
      if (place >= 0) out[i] = tensors[place];
    }
    return out;
  }

  variable_list call_python(const variable_list& tensors, const Key* key,
                            const std::unique_ptr<Held>& backward) {
    const py::gil_scoped_acquire gil;
    const NoDynamo eager;
    const auto wrap = [](const at::Tensor& t) {
      PyObject* object = t.defined() ? THPVariable_Wrap(t) : Py_NewRef(Py_None);
      if (!object) throw_raised();
      return object;
    };
    const auto kept = static_cast<Py_ssize_t>(recipe->saved.size());
    THPObjectPtr saved_tensors(PyTuple_New(kept)), needs(PyTuple_New(recipe->places));
    if (!saved_tensors || !needs) throw_raised();
    for (Py_ssize_t i = 0; i < kept; i++)
      PyTuple_SET_ITEM(saved_tensors.get(), i, wrap(tensors[i]));
    for (int i = 0; i < recipe->places; i++) PyTuple_SET_ITEM(needs.get(), i, Py_NewRef(Py_False));
    for (size_t i = 0; i < recipe->edges.size(); i++)
      if (task_should_compute_output(i))
        PyTuple_SetItem(needs.get(), recipe->edges[i].place, Py_NewRef(Py_True));
    THPObjectPtr dy(wrap(tensors.back()));
    const auto call = [&](const std::unique_ptr<Held>& function) {
      PyObject* found = PyObject_CallFunctionObjArgs(function->get(), saved_tensors.get(),
                                                     needs.get(), dy.get(), nullptr);
      if (!found) throw_raised();
      return found;
    };
    if (key) {
      THPObjectPtr told(call(recipe->learn));
      if (told.get() != Py_None) {
        const auto gradient = read_gradient(told.get());
        const std::lock_guard<std::mutex> lock(recipe->mutex);
        recipe->gradients.add(*key) = {true, gradient};
      }
    }
    THPObjectPtr found(call(backward));
    TORCH_CHECK(PyTuple_Check(found.get()) && PyTuple_GET_SIZE(found.get()) == recipe->places,
                name(), ": the gradient must be a tuple of ", recipe->places);
    variable_list out(recipe->edges.size());
    for (size_t i = 0; i < out.size(); i++) {
      PyObject* t = PyTuple_GET_ITEM(found.get(), recipe->edges[i].place);
      if (THPVariable_Check(t)) out[i] = THPVariable_Unpack(t);
    }
    return out;
  }

  std::shared_ptr<const Recipe> recipe;
  std::vector<SavedVariable> saved;
  bool hooked = false;  // what is saved may come back with other strides
};

template <typename Ptr>  // the node lives by a std::shared_ptr in older PyTorch
Ptr make_node(std::shared_ptr<const Recipe> recipe, torch::autograd::edge_list&& edges,
              Backward** node) {
  if constexpr (std::is_same_v<Ptr, std::shared_ptr<Node>>) {
    *node = new Backward(std::move(recipe), std::move(edges));
    return Ptr(*node, [](auto* n) { deleteNode(n); });
  } else {
    auto made = c10::make_intrusive<Backward>(std::move(recipe), std::move(edges));
    *node = made.get();
    return made;
  }
}

// Whether nothing but autograd and autocast stands between a call and the kernel.
bool plain_state() {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return (local.included_ - c10::default_included_set).empty() &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !at::impl::torch_function_mode_enabled() &&
         !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

// The keys of a dense tensor of a CPU or a GPU, neither a view of functorch's nor a subclass.
uint64_t plain_keys() {
  using c10::DispatchKey;
  return c10::DispatchKeySet({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU,
                              DispatchKey::AutogradCUDA, DispatchKey::ADInplaceOrView,
                              DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA})
      .raw_repr();
}

// Adds to key all of an argument that a call may depend on; false if that is not known.
bool describe(Key& key, const at::Tensor& t, bool grad_mode) {
  static const uint64_t plain = plain_keys();
  if (!t.defined() || t.key_set().raw_repr() & ~plain) return false;
  const auto device = t.device();
  const int64_t about[] = {
      t.dim(),
      static_cast<int64_t>(t.scalar_type()),
      int64_t(device.index()) << 2 | int64_t(device.is_cuda()) << 1 |
          int64_t(grad_mode && t.requires_grad()),
  };
  key.put('T', about, 3);
  key.put('s', t.sizes().data(), t.dim());
  key.put('s', t.strides().data(), t.dim());
  return key.whole();
}

bool describe(Key& key, PyObject* a, bool grad_mode) {
  if (THPVariable_CheckExact(a)) return describe(key, THPVariable_Unpack(a), grad_mode);
  if (a == Py_None) {
    key.put('N');
  } else if (PyBool_Check(a)) {
    key.put(a == Py_True ? '1' : '0');
  } else if (PyLong_CheckExact(a)) {
    int overflow = 0;
    key.put('I', PyLong_AsLongLongAndOverflow(a, &overflow));
    if (overflow) return false;
  } else if (PyFloat_CheckExact(a)) {
    const double value = PyFloat_AS_DOUBLE(a);
    key.put('F', &value, 1);
  } else if (PyUnicode_CheckExact(a)) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(a, &size);
    if (!text) PyErr_Clear();
    if (!text) return false;
    key.put('S', size);
    key.put('c', text, size);
  } else if (PyTuple_Check(a) || PyList_CheckExact(a)) {  // a NamedTuple too
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(a);
    key.put(PyTuple_Check(a) ? 'U' : 'L', size);
    for (Py_ssize_t i = 0; i < size && key.whole(); i++)
      if (THPVariable_Check(PySequence_Fast_GET_ITEM(a, i)) ||
          !describe(key, PySequence_Fast_GET_ITEM(a, i), grad_mode))
        return false;
  } else {
    return false;
  }
  return key.whole();
}

c10::IValue constant(PyObject* value, const c10::Argument& argument) {
  if (value == Py_None) return c10::IValue();
  if (PyList_Check(value)) {
    const auto elements = py::reinterpret_borrow<py::list>(value);
    if (elements.size() && PyBool_Check(elements[0].ptr()))
      return c10::IValue(py::cast<std::vector<bool>>(value));
    return c10::IValue(py::cast<std::vector<int64_t>>(value));
  }
  if (PyBool_Check(value)) return c10::IValue(value == Py_True);
  if (argument.type()->kind() == c10::TypeKind::FloatType || PyFloat_Check(value))
    return py::cast<double>(value);
  TORCH_CHECK_TYPE(PyLong_Check(value), argument.name(),
                   " must be None, a bool, int or float, or a list of ints or bools");
  return py::cast<int64_t>(value);
}

// From what `_learn` and `_learn_gradient` of gankern/ops/_remember.py return.
Call read_call(py::handle name, py::handle arguments) {
  const auto [op, overload, kernel] = name.cast<std::tuple<std::string, std::string, uintptr_t>>();
  Call call(c10::Dispatcher::singleton().findSchemaOrThrow(op.c_str(), overload.c_str()), kernel);
  const auto& wanted = call.op.schema().arguments();
  for (const py::handle item : arguments.cast<py::tuple>()) {
    const auto [place, value] = item.cast<std::pair<int, py::object>>();
    const auto& argument = wanted.at(call.arguments.size());
    call.add(place, place < 0 ? constant(value.ptr(), argument) : c10::IValue(), argument);
  }
  for (size_t i = call.arguments.size(); i < wanted.size(); i++) {
    TORCH_CHECK(wanted[i].default_value(), op, " must get ", wanted[i].name());
    call.add(-1, *wanted[i].default_value(), wanted[i]);
  }
  return call;
}

std::shared_ptr<const Recipe> read_recipe(PyObject* object) {
  const auto told = py::reinterpret_borrow<py::tuple>(object);
  auto recipe = std::make_shared<Recipe>(read_call(told[0], told[1]));
  for (const py::handle item : told[2].cast<py::tuple>()) {
    const auto [input, output] = item.cast<std::pair<int, int>>();
    if (input >= 0)
      recipe->saved.push_back({Recipe::Saved::kInput, input});
    else if (output >= 0)
      recipe->saved.push_back({Recipe::Saved::kOutput, output});
    else
      recipe->saved.push_back({Recipe::Saved::kNothing, 0});
  }
  for (const py::handle item : told[3].cast<py::tuple>()) {
    const auto [input, place] = item.cast<std::pair<int, int>>();
    recipe->edges.push_back({input, place});
  }
  recipe->places = told[4].cast<int>();
  recipe->name = told[5].cast<std::string>();
  recipe->materialize = told[6].cast<bool>();
  recipe->backward = std::make_unique<Held>(told[7].cast<py::object>().ptr());
  recipe->learn = std::make_unique<Held>(told[8].cast<py::object>().ptr());
  recipe->traced = std::make_unique<Held>(told[9].cast<py::object>().ptr());
  return recipe;
}

std::shared_ptr<const Gradient> read_gradient(PyObject* object) {
  const auto told = py::reinterpret_borrow<py::tuple>(object);
  auto gradient = std::make_shared<Gradient>();
  for (const py::handle item : told[0].cast<py::list>()) {
    const auto [op, arguments] = item.cast<std::pair<py::object, py::object>>();
    gradient->calls.push_back(read_call(op, arguments));
  }
  gradient->found = told[1].cast<std::vector<int>>();
  return gradient;
}

PyObject* run(const std::shared_ptr<const Recipe>& recipe, PyObject* const* args, bool grad_mode) {
  const auto tensor = [&](int place) -> const at::Tensor& {
    return THPVariable_Unpack(args[place]);
  };
  bool records = false;
  if (grad_mode)
    for (const auto& edge : recipe->edges) records = records || tensor(edge.input).requires_grad();
  Outputs outputs;
  {
    const torch::autograd::AutoGradMode no_grad(false);
    bool few = tensor(recipe->edges[0].input).is_cpu();
    for (const auto& argument : recipe->call.arguments)
      few = few && (argument.place < 0 || tensor(argument.place).numel() <= kFew);
    if (few) {  // to release the GIL would take longer
      outputs = recipe->call.run(tensor);
    } else {
      c10::SmallVector<at::Tensor, 4> held;  // whatever other threads make of the arguments
      for (const auto& argument : recipe->call.arguments)
        if (argument.place >= 0) held.push_back(tensor(argument.place));
      size_t next = 0;  // they are asked for in order
      const py::gil_scoped_release no_gil;
      outputs = recipe->call.run([&](int) -> const at::Tensor& { return held[next++]; });
    }
  }
  const at::Tensor& y = outputs[0];
  if (records) {
    torch::autograd::edge_list edges;
    edges.reserve(recipe->edges.size());
    for (const auto& edge : recipe->edges)
      edges.push_back(torch::autograd::impl::gradient_edge(tensor(edge.input)));
    Backward* node = nullptr;
    const auto made = make_node<NodePtr>(recipe, std::move(edges), &node);
    torch::autograd::set_history(y, made);
    node->hooked = at::SavedTensorDefaultHooks::get_hooks().has_value();
    node->saved.reserve(recipe->saved.size());
    for (const auto& value : recipe->saved)
      if (value.from == Recipe::Saved::kInput)
        node->saved.emplace_back(tensor(value.place), false);
      else if (value.from == Recipe::Saved::kOutput)
        node->saved.emplace_back(outputs[value.place], value.place == 0);
  }
  return THPVariable_Wrap(y);
}

// A callable: an op's Python function, with the calls of it that are remembered.
struct Remembered {
  PyObject_HEAD vectorcallfunc vectorcall;
  PyObject* function;  // the op, checks and all
  PyObject* learn;     // (*args) -> a recipe, or None where there is none
  int64_t hits;
  Table<Recipe>* calls;
};

PyObject* call(PyObject* callable, PyObject* const* args, size_t nargsf, PyObject* names) {
  HANDLE_TH_ERRORS
  auto* self = reinterpret_cast<Remembered*>(callable);
  const Py_ssize_t n = PyVectorcall_NARGS(nargsf);
  const bool grad_mode = torch::autograd::GradMode::is_enabled();
  Key key;
  key.put('W', state);
  bool described = !names && plain_state();
  for (Py_ssize_t i = 0; described && i < n; i++) described = describe(key, args[i], grad_mode);
  if (!described) return PyObject_Vectorcall(self->function, args, nargsf, names);
  Known<Recipe>* const found = self->calls->find(key);
  if (!found) {
    self->calls->add(key);
  } else if (found->recipe) {
    self->hits++;
    const auto recipe = found->recipe;  // whatever becomes of the table meanwhile
    return run(recipe, args, grad_mode);
  } else if (!found->asked) {  // the second such call: more will come
    found->asked = true;
    THPObjectPtr told;
    {
      const NoDynamo eager;
      told = PyObject_Vectorcall(self->learn, args, nargsf, nullptr);
    }
    if (!told) return nullptr;
    if (told.get() != Py_None) {
      const auto recipe = read_recipe(told.get());
      self->calls->add(key) = {true, recipe};
      return run(recipe, args, grad_mode);
    }
  }
  return PyObject_Vectorcall(self->function, args, nargsf, names);
  END_HANDLE_TH_ERRORS
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject *function = nullptr, *learn = nullptr;
  if (!PyArg_ParseTuple(args, "OO", &function, &learn)) return nullptr;
  auto* self = reinterpret_cast<Remembered*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  self->vectorcall = call;
  self->function = Py_NewRef(function);
  self->learn = Py_NewRef(learn);
  self->calls = new Table<Recipe>();
  return reinterpret_cast<PyObject*>(self);
}

void free_remembered(PyObject* object) {
  auto* self = reinterpret_cast<Remembered*>(object);
  delete self->calls;
  Py_CLEAR(self->function);
  Py_CLEAR(self->learn);
  Py_TYPE(object)->tp_free(object);
}

PyObject* hits(PyObject* self, void*) {
  return PyLong_FromLongLong(reinterpret_cast<Remembered*>(self)->hits);
}

PyObject* again(PyObject* object, PyObject*) {
  auto* self = reinterpret_cast<Remembered*>(object);
  return PyObject_CallFunctionObjArgs(reinterpret_cast<PyObject*>(Py_TYPE(object)), self->function,
                                      self->learn, nullptr);
}

PyMethodDef methods[] = {
    {"again", again, METH_NOARGS, "the same, with nothing remembered"},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef properties[] = {
    {"hits", hits, nullptr, "calls that went without the function", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyTypeObject remembered_type{};

PyObject* set_state(PyObject*, PyObject* value) {
  const long long asked = PyLong_AsLongLong(value);
  if (asked == -1 && PyErr_Occurred()) return nullptr;
  state = asked;
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"set_state", set_state, METH_O, "set_state(int): what else calls depend on, 0 at first"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "_eager", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__eager() {
  try {
    const auto module = py::module_::import("torch._C._dynamo.eval_frame");
    NoDynamo::setter = py::object(module.attr("set_eval_frame")).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
  PyTypeObject& type = remembered_type;
  Py_SET_REFCNT(&type, 1);
  type.tp_name = "gankern._eager.Remembered";
  type.tp_basicsize = sizeof(Remembered);
  type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  type.tp_vectorcall_offset = offsetof(Remembered, vectorcall);
  type.tp_call = PyVectorcall_Call;
  type.tp_new = make;
  type.tp_dealloc = free_remembered;
  type.tp_getset = properties;
  type.tp_methods = methods;
  type.tp_doc = "Remembered(function, learn): function, by what its calls came to before";
  if (PyType_Ready(&type) < 0) return nullptr;
  PyObject* module = PyModule_Create(&module_def);
  if (!module) return nullptr;
  Py_INCREF(&type);
  if (PyModule_AddObject(module, "Remembered", reinterpret_cast<PyObject*>(&type)) < 0 ||
      PyModule_AddIntConstant(module, "ABI", kAbi) < 0)
    return nullptr;
  return module;
}
