#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace fastmem {
namespace {

using Job = std::function<void(int piece)>;

// The first exception of a job, kept for the caller: thrown in a worker, it would end the process.
class Guard {
 public:
  void run(const Job& job, int piece) {
    try {
      job(piece);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }
  void rethrow() {
    if (std::exception_ptr error = std::exchange(error_, nullptr)) std::rethrow_exception(error);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr error_;
};

// GOMP_parallel of libgomp, which LLVM's and Intel's runtimes have too: runs work(data) on every thread of the team.
// 0 threads stands for the whole team that torch uses; another number would make libgomp start threads anew each time.
using OpenMP = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
std::atomic<OpenMP> openmp{nullptr};

void run_on(OpenMP team, int pieces, const Job& job) {
  struct Call {
    const Job& job;
    const int pieces;
    std::atomic<int> next{0};
    Guard guard;
  } call{job, pieces};
  auto work = [](void* data) {
    Call& c = *static_cast<Call*>(data);
    for (int piece; (piece = c.next.fetch_add(1, std::memory_order_relaxed)) < c.pieces;) c.guard.run(c.job, piece);
  };
  team(work, &call, 0, 0);
  call.guard.rethrow();
}

class Pool {
 public:
  void run(int pieces, const Job& job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < pieces - 1) {
        int piece = static_cast<int>(workers_.size()) + 1;
        std::atomic<uint64_t>& taken = taken_.emplace_back(0);
        workers_.emplace_back([this, piece, &taken, seen = epoch_.load()]() mutable { work(piece, taken, seen); });
      }
      job_ = &job;
      pieces_ = pieces;
      left_.store(pieces - 1);
      epoch_.fetch_add(1);
    }
    wake_.notify_all();
    guard_.run(job, 0);
    // What no worker has begun by now is done here: another library's threads, waiting busily for work of their own, may
    // keep a worker from its core for milliseconds.
    const uint64_t epoch = epoch_.load();
    for (int piece = 1; piece < pieces; ++piece)
      if (take(taken_[piece - 1], epoch)) guard_.run(job, piece), left_.fetch_sub(1, std::memory_order_release);
    for (int spin = 0; left_.load(std::memory_order_acquire) > 0; ++spin)
      if (spin > 200) std::this_thread::yield();
    guard_.rethrow();
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      epoch_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

 private:
  // Whether this piece of the epoch's job is the caller's; it is one thread's alone.
  static bool take(std::atomic<uint64_t>& taken, uint64_t epoch) {
    uint64_t last = taken.load();
    while (last < epoch)
      if (taken.compare_exchange_weak(last, epoch)) return true;
    return false;
  }

  void work(int piece, std::atomic<uint64_t>& taken, uint64_t seen) {
    for (;;) {
      // The next job often comes within microseconds, and waking takes longer than a small one. Yielding leaves the core
      // to whoever else wants it.
      for (int spin = 0; spin < 2000 && epoch_.load(std::memory_order_acquire) == seen; ++spin) {
      }
      for (int spin = 0; spin < 200 && epoch_.load(std::memory_order_acquire) == seen; ++spin)
        std::this_thread::yield();
      const Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        seen = epoch_.load();
        if (stop_) return;
        if (piece >= pieces_) continue;
        job = job_;
      }
      if (!take(taken, seen)) continue;
      guard_.run(*job, piece);
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  std::deque<std::atomic<uint64_t>> taken_;  // per worker, the last epoch whose piece was begun
  const Job* job_ = nullptr;
  int pieces_ = 0;
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int> left_{0};
  Guard guard_;
  bool stop_ = false;
};

// Leaked on purpose: worker threads must not be joined while the interpreter unloads modules.
struct Threads {
  std::mutex turn;
  Pool pool;
};
std::atomic<Threads*> shared{nullptr};

// A forked child has none of the parent's threads: it starts with a fresh pool, and OpenMP would wait for ever.
void forget_threads_at_fork() {
#if !defined(_WIN32)
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { shared.store(nullptr), openmp.store(nullptr); }); });
#endif
}

Threads& get_threads() {
  Threads* current = shared.load();
  if (current) return *current;
  forget_threads_at_fork();
  Threads* fresh = new Threads;
  if (shared.compare_exchange_strong(current, fresh)) return *fresh;
  delete fresh;
  return *current;
}

}  // namespace

void parallel_for(int64_t n, int threads, const std::function<void(int64_t, int64_t, int)>& body) {
  if (n <= 0) return;
  int pieces = static_cast<int>(threads < 1 ? 1 : (threads < n ? threads : n));
  if (pieces == 1) {
    body(0, n, 0);
    return;
  }
  const Job job = [&](int p) { body(n * p / pieces, n * (p + 1) / pieces, p); };
  Threads& own = get_threads();
  // One job at a time; a second Python thread that comes meanwhile runs its job alone, on itself.
  std::unique_lock<std::mutex> turn(own.turn, std::try_to_lock);
  if (!turn.owns_lock())
    for (int p = 0; p < pieces; ++p) job(p);
  else if (OpenMP team = openmp.load())
    run_on(team, pieces, job);
  else
    own.pool.run(pieces, job);
}

bool borrow_threads(const char* library) {
#if defined(_WIN32)
  return false;
#else
  void* loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  if (!loaded) return false;
  forget_threads_at_fork();
  openmp.store(reinterpret_cast<OpenMP>(dlsym(loaded, "GOMP_parallel")));
  return openmp.load() != nullptr;
#endif
}

}  // namespace fastmem
