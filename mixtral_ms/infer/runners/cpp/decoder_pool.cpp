#include "decoder_pool.hpp"

#include <unistd.h>

#include <condition_variable>
#include <mutex>

#include "common.hpp"

namespace decoder {
namespace {

constexpr int kSpins = 20000;  // under a millisecond, but longer than what a step does serially

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  Pool() : owner_(getpid()) {
    for (int i = 1; i < native::thread_count(); ++i) std::thread([this] { work(); }).detach();
  }

  // False in a forked child: threads stay behind in the parent.
  bool alive() const { return owner_ == getpid(); }

  void run(int64_t tasks, const std::function<void(int64_t)>& body) {
    std::lock_guard<std::mutex> one_caller(caller_);
    tasks_ = tasks;
    body_ = &body;
    next_.store(0);
    open_.store(true);
    round_.fetch_add(1);
    if (asleep_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    take_tasks();
    // All tasks are taken; those inside still work on theirs. Who comes later finds it closed.
    open_.store(false);
    for (int spins = 0; inside_.load() > 0; ++spins) {
      if (spins < kSpins) pause_briefly();
      else sched_yield();
    }
  }

 private:
  void take_tasks() {
    for (int64_t i = next_++; i < tasks_; i = next_++) (*body_)(i);
  }

  void work() {
    for (uint64_t seen = 0;;) {
      seen = wait_for_change(seen);
      inside_.fetch_add(1);
      if (open_.load()) take_tasks();
      inside_.fetch_sub(1);
    }
  }

  uint64_t wait_for_change(uint64_t seen) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (round_.load() != seen) return round_.load();
      pause_briefly();
    }
    std::unique_lock<std::mutex> lock(sleep_);
    asleep_.fetch_add(1);
    wake_.wait(lock, [&] { return round_.load() != seen; });
    asleep_.fetch_sub(1);
    return round_.load();
  }

  const pid_t owner_;
  std::mutex caller_, sleep_;
  std::condition_variable wake_;
  int64_t tasks_ = 0;
  const std::function<void(int64_t)>* body_ = nullptr;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> open_{false};
  std::atomic<int> inside_{0}, asleep_{0};
  std::atomic<uint64_t> round_{0};
};

// Never destroyed: its threads may still look at it while the process ends.
Pool& pool() {
  static std::mutex guard;
  static Pool* current = nullptr;
  std::lock_guard<std::mutex> lock(guard);
  if (current == nullptr || !current->alive()) current = new Pool;
  return *current;
}

}  // namespace

void run_tasks(int64_t tasks, const std::function<void(int64_t)>& body) {
  if (tasks > 1) return pool().run(tasks, body);
  if (tasks == 1) body(0);
}

}  // namespace decoder
