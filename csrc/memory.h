// Memory that a result is about to be written to for the first time.
#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastmem {

// Asks for huge pages under a large new result: taking 4 KB pages from the system one fault at a time costs as much as
// computing what is written to them. Only advice; where it is not followed nothing changes.
inline void in_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  const uintptr_t at = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (at + kHuge - 1) & ~(kHuge - 1), last = (at + bytes) & ~(kHuge - 1);
  if (data && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastmem
