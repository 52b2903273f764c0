// The element types that kernels take, as the integers that launchers pass.
#pragma once

namespace gankern {
enum DType : int { kF32 = 0, kF16 = 1, kBF16 = 2, kF64 = 3 };
}
