// A tensor by PyTorch's stable ABI, and ops that take and return such tensors.
//
// torch::stable::Tensor counts its references in a block of its own and asks PyTorch for each size
// and stride, and TORCH_BOX copies what an op returns: for an op on a few elements these take as
// long as its kernel. Here a tensor has one owner, is moved or lent, and is asked once.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

namespace gankern {

using torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// What the shim calls a dtype, asked once.
struct DtypeCodes {
  int32_t f32 = aoti_torch_dtype_float32(), f16 = aoti_torch_dtype_float16(),
          bf16 = aoti_torch_dtype_bfloat16(), f64 = aoti_torch_dtype_float64();
};
inline const DtypeCodes dtype_codes;
inline int32_t shim_code(ScalarType dtype) {
  return dtype == ScalarType::Float      ? dtype_codes.f32
         : dtype == ScalarType::Half     ? dtype_codes.f16
         : dtype == ScalarType::BFloat16 ? dtype_codes.bf16
                                         : dtype_codes.f64;
}

class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle), owned_(true) {}
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    if (handle_ == other.handle_) {  // lent to itself: t = row_major(t)
      if (other.owned_) std::swap(owned_, other.owned_);
      return *this;
    }
    std::swap(handle_, other.handle_), std::swap(owned_, other.owned_);
    forget(), other.forget();
    return *this;
  }
  // A copy would be made unseen, and what is lent of it would not live.
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (owned_) aoti_torch_delete_tensor_object(handle_);
  }

  // The same tensor, while its owner lives.
  static Tensor lent(AtenTensorHandle handle) { return Tensor(handle, false); }
  Tensor lent() const& { return lent(handle_); }
  Tensor lent() const&& = delete;

  AtenTensorHandle get() const { return handle_; }
  // For another owner.
  AtenTensorHandle release() { return std::exchange(owned_, false) ? handle_ : another(); }

  // By PyTorch's own class, to call its operators.
  explicit Tensor(const torch::stable::Tensor& t) : handle_(another(t.get())), owned_(true) {}
  torch::stable::Tensor stable() const { return torch::stable::Tensor(another()); }

  int64_t dim() const {
    if (dim_ < 0) TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle_, &dim_));
    return dim_;
  }
  Sizes sizes() const {
    if (!sizes_) TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle_, &sizes_));
    return Sizes(sizes_, dim());
  }
  Sizes strides() const {
    if (!strides_) TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle_, &strides_));
    return Sizes(strides_, dim());
  }
  int64_t size(int64_t i) const { return sizes()[within(i)]; }
  int64_t stride(int64_t i) const { return strides()[within(i)]; }
  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t size : sizes()) n *= size;
    return n;
  }
  // As torch.Tensor.is_contiguous().
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dim() - 1; i >= 0; i--) {
      if (size(i) == 1) continue;
      if (stride(i) != expected) return numel() == 0;
      expected *= size(i);
    }
    return true;
  }
  // Undefined for a dtype that no op takes.
  ScalarType scalar_type() const {
    int32_t code;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &code));
    return code == dtype_codes.f32    ? ScalarType::Float
           : code == dtype_codes.f16  ? ScalarType::Half
           : code == dtype_codes.bf16 ? ScalarType::BFloat16
           : code == dtype_codes.f64  ? ScalarType::Double
                                      : ScalarType::Undefined;
  }
  size_t element_size() const {
    int32_t code;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &code));
    return aoti_torch_dtype_element_size(code);
  }
  const void* const_data_ptr() const {
    const void* data;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_, &data));
    return data;
  }
  void* mutable_data_ptr() const {
    void* data;
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_, &data));
    return data;
  }
  int32_t get_device_index() const {
    int32_t index;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle_, &index));
    return index;
  }

 private:
  Tensor(AtenTensorHandle handle, bool owned) : handle_(handle), owned_(owned) {}
  static AtenTensorHandle another(AtenTensorHandle handle) {
    AtenTensorHandle copy;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &copy));
    return copy;
  }
  AtenTensorHandle another() const { return another(handle_); }
  void forget() { dim_ = -1, sizes_ = strides_ = nullptr; }
  int64_t within(int64_t i) const {
    if (i < 0 || i >= dim()) fail_within(i);
    return i;
  }
  [[noreturn, gnu::cold, gnu::noinline]] void fail_within(int64_t i) const {
    STD_TORCH_CHECK(false, "dimension ", i, " of a tensor of ", dim());
    abort();  // not reached: the check throws
  }

  AtenTensorHandle handle_ = nullptr;
  bool owned_ = false;
  mutable int64_t dim_ = -1;
  mutable int64_t *sizes_ = nullptr, *strides_ = nullptr;
};
using MaybeTensor = std::optional<Tensor>;

// Arguments of an op from words, and what it returns. The dispatcher's words hold tensors that
// become the op's; words of csrc/eager lend them, by their handles, 0 for none.
template <typename T>
struct Word {
  static_assert(std::is_same_v<T, int64_t> || std::is_same_v<T, double> || std::is_same_v<T, bool>);
  static T take(StableIValue word) { return torch::stable::detail::to<T>(word); }
  static T borrow(StableIValue word) {
    T value;
    memcpy(&value, &word, sizeof value);
    return value;
  }
};
template <>
struct Word<Tensor> {
  static Tensor take(StableIValue word) {
    return Tensor(torch::stable::detail::to<AtenTensorHandle>(word));
  }
  static Tensor borrow(StableIValue word) {
    return Tensor::lent(torch::stable::detail::to<AtenTensorHandle>(word));
  }
  static StableIValue give(Tensor&& t) { return torch::stable::detail::from(t.release()); }
};
template <>
struct Word<MaybeTensor> {
  static MaybeTensor take(StableIValue word) {
    const auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(word);
    return handle ? MaybeTensor(Tensor(*handle)) : std::nullopt;
  }
  static MaybeTensor borrow(StableIValue word) {
    return word ? MaybeTensor(Word<Tensor>::borrow(word)) : std::nullopt;
  }
};

template <auto function>
struct Boxing;
template <typename R, typename... Args, R (*function)(Args...)>
struct Boxing<function> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t outputs) {
    constexpr uint64_t kOutputs = [] {
      if constexpr (std::is_same_v<R, Tensor>)
        return 1;
      else
        return std::tuple_size_v<R>;
    }();
    STD_TORCH_CHECK(arguments == sizeof...(Args) && outputs == kOutputs, "the schema has ",
                    arguments, " arguments and ", outputs, " outputs, the function ",
                    sizeof...(Args), " and ", kOutputs);
    call<false>(stack, std::index_sequence_for<Args...>());
  }
  static void call_lent(StableIValue* stack) {
    call<true>(stack, std::index_sequence_for<Args...>());
  }

 private:
  template <bool kLent, typename T>
  static T argument(StableIValue word) {
    if constexpr (kLent)
      return Word<T>::borrow(word);
    else
      return Word<T>::take(word);
  }
  template <bool kLent, size_t... I>
  static void call(StableIValue* stack, std::index_sequence<I...>) {
    // In braces, so in this order: what is not taken would be lost.
    std::tuple<std::decay_t<Args>...> arguments{argument<kLent, std::decay_t<Args>>(stack[I])...};
    auto returned = std::apply(function, arguments);
    if constexpr (std::is_same_v<R, Tensor>)
      stack[0] = Word<Tensor>::give(std::move(returned));
    else
      std::apply(
          [&](auto&... t) {
            size_t i = 0;
            ((stack[i++] = Word<Tensor>::give(std::move(t))), ...);
          },
          returned);
  }
};

}  // namespace gankern
