// Threads: those of the OpenMP runtime that torch computes on, where it has one we can reach. They spin for milliseconds
// after an op of torch's, so workers of another pool would wait for a core just when they are needed. Elsewhere, and in a
// forked child, a pool of our own, whose workers sleep on a condition variable after a short spin.
#pragma once
#include <cstdint>
#include <functional>

namespace fastmem {

// Calls body(begin, end, thread) so that [0, n) is covered once, in at most `threads` contiguous pieces that
// run at the same time. Which piece an index falls into depends on n and threads alone.
void parallel_for(int64_t n, int threads, const std::function<void(int64_t begin, int64_t end, int thread)>& body);

// From now on takes threads from the OpenMP runtime that `library`, already loaded, is linked with. False if it has none.
bool borrow_threads(const char* library);

}  // namespace fastmem
