// A thread pool of our own. torch's wheel carries a private OpenMP runtime; a second one in the process would
// spin against it. Workers here sleep on a condition variable after a short spin.
#pragma once
#include <cstdint>
#include <functional>

namespace fastmem {

// Calls body(begin, end, thread) so that [0, n) is covered once, in at most `threads` contiguous pieces that
// run at the same time. Which piece an index falls into depends on n and threads alone.
void parallel_for(int64_t n, int threads, const std::function<void(int64_t begin, int64_t end, int thread)>& body);

}  // namespace fastmem
