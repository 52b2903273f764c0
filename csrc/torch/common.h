// What every op's torch side shares: which backend this is, checks, layouts, launch arguments.
//
// Each csrc/torch/<op>.cpp is compiled once per backend: -DGANKERN_BACKEND=cpu|cuda|simt, and
// -DGANKERN_NS=gankern|gankern_simt, the dispatcher's namespace. PyTorch's stable ABI only.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "../dtype.h"
#include "tensor.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

#define GK_CAT_(a, b) a##b
#define GK_CAT(a, b) GK_CAT_(a, b)
#define GK_IS_cpu 1
#define GK_IS_cuda 2
#define GK_IS_simt 3
#define GK_BACKEND_ID GK_CAT(GK_IS_, GANKERN_BACKEND)

// GANKERN_SCHEMAS(m) { m.def(...); } and GANKERN_IMPLS(m) { implement<&f>(m, ...); } register an
// op. The CPU library owns the schemas; the CUDA library adds kernels to them.
#if GK_BACKEND_ID == 2
#define GANKERN_SCHEMAS(m) \
  [[maybe_unused]] static void gk_unused_schemas(torch::stable::detail::StableLibrary& m)
#define GANKERN_IMPLS(m) STABLE_TORCH_LIBRARY_IMPL(GANKERN_NS, CUDA, m)
#else
#define GANKERN_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(GANKERN_NS, m)
#define GANKERN_IMPLS(m) STABLE_TORCH_LIBRARY_IMPL(GANKERN_NS, CPU, m)
#endif

// GANKERN_KERNEL(ret, name, args...) declares a launcher as kernels::name. For the CPU there is one
// per instruction set, chosen at each call; the first argument is the dtype, and float64 exists in
// the base build alone.
#if GK_BACKEND_ID == 1
#ifdef __x86_64__
#define GANKERN_KERNEL(ret, name, ...)                                                     \
  namespace gankern::cpu {                                                                 \
  namespace base {                                                                         \
  ret name(__VA_ARGS__);                                                                   \
  }                                                                                        \
  namespace avx2 {                                                                         \
  ret name(__VA_ARGS__);                                                                   \
  }                                                                                        \
  namespace avx512 {                                                                       \
  ret name(__VA_ARGS__);                                                                   \
  }                                                                                        \
  template <typename... Args>                                                              \
  ret name(int dtype, Args... rest) {                                                      \
    const int isa = dtype == kF64 ? 0 : gankern_cpu_isa();                                 \
    return (isa == 2 ? avx512::name : isa == 1 ? avx2::name : base::name)(dtype, rest...); \
  }                                                                                        \
  }
#else
#define GANKERN_KERNEL(ret, name, ...) \
  namespace gankern::cpu {             \
  inline namespace base {              \
  ret name(__VA_ARGS__);               \
  }                                    \
  }
#endif
#else
#define GANKERN_KERNEL(ret, name, ...) \
  namespace gankern::GANKERN_BACKEND { \
  ret name(__VA_ARGS__);               \
  }
#endif
// The instruction set in use: 0 base, 1 AVX2, 2 AVX-512 (csrc/torch/library.cpp).
extern "C" int gankern_cpu_isa();

namespace gankern {
namespace GANKERN_BACKEND {}
namespace kernels = ::gankern::GANKERN_BACKEND;

// What csrc/eager calls for each op of this library, without the dispatcher.
using Kernel = void (*)(StableIValue*);
inline std::map<std::string, Kernel> implementations;
template <auto function>
void implement(torch::stable::detail::StableLibrary& m, const char* name) {
  m.impl(name, Boxing<function>::call);
  implementations[name] = Boxing<function>::call_lent;
}

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    default:
      return "another dtype";
  }
}

inline int dtype_code(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kF32;
    case ScalarType::Half:
      return kF16;
    case ScalarType::BFloat16:
      return kBF16;
    case ScalarType::Double:
      return kF64;
    default:
      STD_TORCH_CHECK(false, op, ": ", name,
                      " must be float32, float16, bfloat16 or float64, got another dtype");
  }
}

// The dtype of a small operand beside x: x's own, or float32.
inline int param_code(const char* op, const char* name, const Tensor& t, int x_code) {
  const int code = dtype_code(op, name, t);
  STD_TORCH_CHECK(code == x_code || code == kF32, op, ": ", name,
                  " must have x's dtype or float32, got ", dtype_name(t.scalar_type()));
  return code;
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); i++)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

// True if the elements fill their memory without gaps or overlap, in whatever order of dimensions.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t i = 0; i < t.dim(); i++)
    if (t.size(i) != 1) dims.emplace_back(t.stride(i), t.size(i));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); i++)
    if (a.size(i) != 1 && a.stride(i) != b.stride(i)) return false;
  return true;
}

// Torch's own stable functions look an operator up by its name at every call, which takes longer
// than what most of them do: they are called where there is something to copy, and not to allocate.
inline Tensor copied(Tensor to, const Tensor& from) {
  torch::stable::Tensor out = to.stable();
  torch::stable::copy_(out, from.stable());
  return to;
}
inline void zero(const Tensor& t) {
  torch::stable::Tensor out = t.stable();
  torch::stable::zero_(out);
}
inline Tensor empty_like(const Tensor& t) {  // in t's order of dimensions, if it is dense
  return Tensor(torch::stable::empty_like(t.stable()));
}

// t, lent, or a copy in the layout that is wanted.
inline Tensor row_major(const Tensor& t) {
  return t.is_contiguous() ? t.lent() : Tensor(torch::stable::contiguous(t.stable()));
}
inline Tensor dense(const Tensor& t) { return is_dense(t) ? t.lent() : copied(empty_like(t), t); }
// What is lent of a temporary tensor would not live.
Tensor row_major(const Tensor&&) = delete;
Tensor dense(const Tensor&&) = delete;

// Uninitialised, of t's device, sizes and strides in elements.
// For tests: fresh memory of the CPU holds NaN, but where it is too much to be touched.
inline bool poisoned = GK_BACKEND_ID == 3;
inline Tensor empty_strided([[maybe_unused]] const Tensor& t, Sizes sizes, const int64_t* strides,
                            ScalarType dtype) {
  const int32_t code = shim_code(dtype);
  AtenTensorHandle out = nullptr;
#if GK_BACKEND_ID == 2
  const int32_t device = aoti_torch_device_type_cuda(), index = t.get_device_index();
#else
  const int32_t device = aoti_torch_device_type_cpu(), index = 0;
#endif
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides, code, device, index, &out));
  Tensor fresh(out);
  const int64_t bytes = poisoned ? fresh.numel() * static_cast<int64_t>(fresh.element_size()) : 0;
  if (0 < bytes && bytes <= 1 << 26) memset(fresh.mutable_data_ptr(), 0xff, bytes);
  return fresh;
}
struct RowMajor {
  int64_t strides[64];  // no tensor has more dimensions
  explicit RowMajor(Sizes sizes) {
    int64_t step = 1;
    for (size_t i = sizes.size(); i-- > 0; step *= std::max(sizes[i], int64_t(1)))
      strides[i] = step;
  }
};
inline Tensor empty_beside(const Tensor& t, Sizes sizes, ScalarType dtype) {
  return empty_strided(t, sizes, RowMajor(sizes).strides, dtype);
}
inline Tensor empty_beside(const Tensor& t, Sizes sizes) {
  return empty_beside(t, sizes, t.scalar_type());
}

// NCHW in channels-last memory (and not also contiguous).
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// A dense tensor around dimension `dim`, in memory order: index = (outer * C + c) * inner + rest.
struct Around {
  int64_t outer, C, inner;
};
inline Around around(const Tensor& t, int64_t dim) {
  const int64_t C = t.size(dim), numel = t.numel();
  if (numel == 0 || C == 1) return {1, C, C ? numel / C : 0};
  const int64_t inner = t.stride(dim);
  return {numel / (C * inner), C, inner};
}

// The current CUDA stream of t's device, with that device made current; null on the CPU.
class Launch {
 public:
  explicit Launch([[maybe_unused]] const Tensor& t)
#if GK_BACKEND_ID == 2
      : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
#else
  {
  }
#endif
  void* stream = nullptr;

  void check(const char* op, int error) const {
    STD_TORCH_CHECK(error == 0, op, ": the kernel launch failed with CUDA error ", error);
  }

 private:
#if GK_BACKEND_ID == 2
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// A fresh output, a large one of the CPU on huge pages: the first touch of small pages takes longer
// than most kernels.
inline Tensor fresh(Tensor t) {
#if GK_BACKEND_ID == 1 && defined(__linux__)
  constexpr uintptr_t kPage = 1 << 21;
  if (t.numel() < static_cast<int64_t>(kPage / sizeof(double))) return t;
  const auto at = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
  const uintptr_t begin = (at + kPage - 1) / kPage * kPage, end = (at + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return t;
}
inline Tensor fresh_like(const Tensor& t) {
  return fresh(is_dense(t) ? empty_strided(t, t.sizes(), t.strides().data(), t.scalar_type())
                           : empty_like(t));
}

// t, lent, or a copy in the memory layout of `like`.
inline Tensor laid_out_like(const Tensor& t, const Tensor& like) {
  return same_strides(t, like) ? t.lent() : copied(fresh_like(like), t);
}
Tensor laid_out_like(const Tensor&&, const Tensor&) = delete;

// Fresh images (N, C, H, W) of t's dtype, in channels-last memory or contiguous.
inline Tensor fresh_images(const Tensor& t, int64_t N, int64_t C, int64_t H, int64_t W, bool last) {
  if (!last) return fresh(empty_beside(t, {N, C, H, W}));
  const int64_t row = W * C, strides[] = {H * row, 1, row, C};
  return fresh(empty_strided(t, {N, C, H, W}, strides, t.scalar_type()));
}

// An output, followed in the same allocation by `bytes` of scratch for the kernel.
struct WithWorkspace {
  Tensor out;
  void* workspace;
};
inline WithWorkspace empty_with_workspace(const Tensor& like, Sizes sizes, ScalarType dtype,
                                          int64_t bytes) {
  if (bytes == 0) return {empty_beside(like, sizes, dtype), nullptr};
  int64_t n = 1;
  for (const int64_t s : sizes) n *= s;
  const int64_t size = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  const int64_t padded = (n * size + 15) / 16 * 16;
  Tensor all = empty_beside(like, {(padded + (bytes + 15) / 16 * 16) / size}, dtype);
  char* base = static_cast<char*>(all.mutable_data_ptr());
  AtenTensorHandle out = nullptr;  // a view by its address: PyTorch's by name take longer
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(all.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                     RowMajor(sizes).strides, 0, &out));
  return {Tensor(out), base + padded};
}

}  // namespace gankern
