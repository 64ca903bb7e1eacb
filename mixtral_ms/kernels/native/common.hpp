// What the float32 CPU kernels share. MindSpore calls them through ops.Custom (AOT).
//
// Matrix products go to the oneDNN that MindSpore itself ships and has loaded, called sequentially
// from our own threads: a task is a block small enough that the elementwise work between two
// products finds it in the cache.
#pragma once

#include <dlfcn.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace native {

using Sgemm = int (*)(char, char, int64_t, int64_t, int64_t, float, const float*, int64_t,
                      const float*, int64_t, float, float*, int64_t, void*);

inline Sgemm find_sgemm() {
  // MindSpore 2.10 carries version 3 of oneDNN, 2.7 version 2; this function is the same in both.
  for (const char* name : {"libdnnl.so.3", "libdnnl.so.2"}) {
    void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) continue;
    void* found = dlsym(library, "dnnl_threadpool_interop_sgemm");
    if (found != nullptr) return reinterpret_cast<Sgemm>(found);
  }
  return nullptr;
}

// Set by native_ready(): the library may be loaded before MindSpore is.
inline Sgemm sgemm = nullptr;

// C (m, n) = op(A) op(B) + beta C, all row-major with rows lda, ldb, ldc apart.
inline void gemm(char ta, char tb, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
          const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  sgemm(ta, tb, m, n, k, 1.0f, a, lda, b, ldb, beta, c, ldc, nullptr);
}

inline int thread_count() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

inline void parallel_for(int64_t tasks, const std::function<void(int64_t)>& body) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t i = next++; i < tasks; i = next++) body(i);
  };
  std::vector<std::thread> threads;
  const int64_t extra = std::min<int64_t>(thread_count(), tasks) - 1;
  for (int64_t i = 0; i < extra; ++i) threads.emplace_back(work);
  work();
  for (auto& thread : threads) thread.join();
}

// A buffer without the cost of zeroing; pages are reused by malloc between calls.
inline std::unique_ptr<float[]> scratch(int64_t count) {
  return std::unique_ptr<float[]>(new float[count]);
}

}  // namespace native
