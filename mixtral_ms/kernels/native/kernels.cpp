// Float32 CPU kernels of the Mixtral step, called by MindSpore through ops.Custom (AOT).
//
// Legend: R rows sorted by expert, D hidden, F intermediate, E experts, T tokens, V vocabulary.
// The matrix products go to the oneDNN that MindSpore itself ships and has loaded, called
// sequentially from our own threads: one task is one expert's block of rows, so nothing is padded
// and the elementwise work between two products happens while the block is still in the cache.
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

namespace {

using Sgemm = int (*)(char, char, int64_t, int64_t, int64_t, float, const float*, int64_t,
                      const float*, int64_t, float, float*, int64_t, void*);

constexpr int64_t kRowBlock = 128;  // rows of one task: its activations stay in the cache
constexpr int64_t kWeightBlock = 512;  // rows of a weight gradient per task

Sgemm find_sgemm() {
  void* library = dlopen("libdnnl.so.2", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<Sgemm>(dlsym(library, "dnnl_threadpool_interop_sgemm"));
}

const Sgemm sgemm = find_sgemm();

// C (m, n) = op(A) op(B) + beta C, all row-major and dense in their leading dimension.
void gemm(char ta, char tb, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
          const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  sgemm(ta, tb, m, n, k, 1.0f, a, lda, b, ldb, beta, c, ldc, nullptr);
}

int thread_count() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

void parallel_for(int64_t tasks, const std::function<void(int64_t)>& body) {
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

struct RowTask {
  int64_t expert, begin, rows;
};

std::vector<RowTask> row_tasks(const int32_t* sizes, int64_t experts) {
  std::vector<RowTask> tasks;
  int64_t begin = 0;
  for (int64_t e = 0; e < experts; ++e) {
    // Blocks of equal size, rather than full blocks and a small rest, balance the threads.
    const int64_t blocks = (sizes[e] + kRowBlock - 1) / kRowBlock;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t from = sizes[e] * b / blocks, to = sizes[e] * (b + 1) / blocks;
      tasks.push_back({e, begin + from, to - from});
    }
    begin += sizes[e];
  }
  return tasks;
}

int64_t total_rows(const int32_t* sizes, int64_t experts) {
  int64_t total = 0;
  for (int64_t e = 0; e < experts; ++e) total += sizes[e];
  return total;
}

// A buffer without the cost of zeroing; pages are reused by malloc between calls.
std::unique_ptr<float[]> scratch(int64_t count) {
  return std::unique_ptr<float[]>(new float[count]);
}

void swiglu(const float* gate, const float* up, float* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

// In: gate, up, d_out. Out: out = silu(gate) * up, d_gate, and d_up in place of d_out.
void swiglu_backward(const float* gate, const float* up, float* d_out_then_d_up, float* d_gate,
                     float* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float sigmoid = 1.0f / (1.0f + expf(-gate[i]));
    const float silu = gate[i] * sigmoid;
    const float d_out = d_out_then_d_up[i];
    out[i] = silu * up[i];
    d_gate[i] = d_out * up[i] * (sigmoid + silu * (1.0f - sigmoid));
    d_out_then_d_up[i] = d_out * silu;
  }
}

}  // namespace

extern "C" {

int native_ready() { return sgemm != nullptr; }

// inputs: x (R, D), w1 (E, F, D), w3 (E, F, D), w2 (E, D, F), group sizes (E)
// outputs: y (R, D), gate (R, F), up (R, F); rows past the groups are zero in y
int expert_ffn_forward(int count, void** params, int*, int64_t** shapes, const char**, void*,
                       void*) {
  if (count != 8 || sgemm == nullptr) return 1;
  const int64_t R = shapes[0][0], D = shapes[0][1], E = shapes[1][0], F = shapes[1][1];
  auto x = static_cast<const float*>(params[0]), w1 = static_cast<const float*>(params[1]),
       w3 = static_cast<const float*>(params[2]), w2 = static_cast<const float*>(params[3]);
  auto sizes = static_cast<const int32_t*>(params[4]);
  auto y = static_cast<float*>(params[5]), gate = static_cast<float*>(params[6]),
       up = static_cast<float*>(params[7]);
  const auto tasks = row_tasks(sizes, E);
  parallel_for(tasks.size(), [&](int64_t i) {
    const auto [e, begin, n] = tasks[i];
    float *g = gate + begin * F, *u = up + begin * F;
    auto act = scratch(n * F);
    gemm('N', 'T', n, F, D, x + begin * D, D, w1 + e * F * D, D, 0.0f, g, F);
    gemm('N', 'T', n, F, D, x + begin * D, D, w3 + e * F * D, D, 0.0f, u, F);
    swiglu(g, u, act.get(), n * F);
    gemm('N', 'T', n, D, F, act.get(), F, w2 + e * D * F, F, 0.0f, y + begin * D, D);
  });
  const int64_t used = total_rows(sizes, E);
  std::fill(y + used * D, y + R * D, 0.0f);
  return 0;
}

// inputs: x, w1, w3, w2, group sizes, gate, up as above, dy (R, D)
// outputs: dx (R, D), dw1, dw3, dw2 shaped as the weights
int expert_ffn_backward(int count, void** params, int*, int64_t** shapes, const char**, void*,
                        void*) {
  if (count != 12 || sgemm == nullptr) return 1;
  const int64_t R = shapes[0][0], D = shapes[0][1], E = shapes[1][0], F = shapes[1][1];
  auto x = static_cast<const float*>(params[0]), w1 = static_cast<const float*>(params[1]),
       w3 = static_cast<const float*>(params[2]), w2 = static_cast<const float*>(params[3]);
  auto sizes = static_cast<const int32_t*>(params[4]);
  auto gate = static_cast<const float*>(params[5]), up = static_cast<const float*>(params[6]),
       dy = static_cast<const float*>(params[7]);
  auto dx = static_cast<float*>(params[8]), dw1 = static_cast<float*>(params[9]),
       dw3 = static_cast<float*>(params[10]), dw2 = static_cast<float*>(params[11]);
  const int64_t used = total_rows(sizes, E);
  auto act = scratch(used * F), d_gate = scratch(used * F), d_up = scratch(used * F);
  const auto tasks = row_tasks(sizes, E);
  parallel_for(tasks.size(), [&](int64_t i) {
    const auto [e, begin, n] = tasks[i];
    float *dg = d_gate.get() + begin * F, *du = d_up.get() + begin * F;
    gemm('N', 'N', n, F, D, dy + begin * D, D, w2 + e * D * F, F, 0.0f, du, F);
    swiglu_backward(gate + begin * F, up + begin * F, du, dg, act.get() + begin * F, n * F);
    gemm('N', 'N', n, D, F, dg, F, w1 + e * F * D, D, 0.0f, dx + begin * D, D);
    gemm('N', 'N', n, D, F, du, F, w3 + e * F * D, D, 1.0f, dx + begin * D, D);
  });
  std::fill(dx + used * D, dx + R * D, 0.0f);

  std::vector<int64_t> begins(E, 0);
  for (int64_t e = 1; e < E; ++e) begins[e] = begins[e - 1] + sizes[e - 1];
  const int64_t f_blocks = (F + kWeightBlock - 1) / kWeightBlock;
  // Task (e, f, which): rows f of dw1 or dw3, or columns f of dw2, of expert e.
  parallel_for(E * f_blocks * 3, [&](int64_t i) {
    const int64_t which = i % 3, f = i / 3 % f_blocks * kWeightBlock, e = i / 3 / f_blocks;
    const int64_t rows = std::min(kWeightBlock, F - f), n = sizes[e], begin = begins[e];
    float* out = (which == 0 ? dw1 : which == 1 ? dw3 : dw2) + e * F * D;
    if (which < 2) {
      if (n == 0) return std::fill(out + f * D, out + (f + rows) * D, 0.0f);
      const float* d = (which == 0 ? d_gate : d_up).get() + begin * F + f;
      gemm('T', 'N', rows, D, n, d, F, x + begin * D, D, 0.0f, out + f * D, D);
    } else {
      if (n == 0) {
        for (int64_t r = 0; r < D; ++r) std::fill(out + r * F + f, out + r * F + f + rows, 0.0f);
        return;
      }
      gemm('T', 'N', D, rows, n, dy + begin * D, D, act.get() + begin * F + f, F, 0.0f, out + f,
           F);
    }
  });
  return 0;
}

// inputs: logits (T, V), labels (T) int32, ignored where negative
// outputs: loss (T), d_logits (T, V) = softmax - one-hot, both zero where ignored
int softmax_cross_entropy(int count, void** params, int*, int64_t** shapes, const char**, void*,
                          void*) {
  if (count != 4) return 1;
  const int64_t T = shapes[0][0], V = shapes[0][1];
  auto logits = static_cast<const float*>(params[0]);
  auto labels = static_cast<const int32_t*>(params[1]);
  auto loss = static_cast<float*>(params[2]), d_logits = static_cast<float*>(params[3]);
  parallel_for(T, [&](int64_t t) {
    const float* row = logits + t * V;
    float* out = d_logits + t * V;
    const int64_t label = labels[t];
    if (label < 0 || label >= V) {
      loss[t] = 0.0f;
      std::memset(out, 0, V * sizeof(float));
      return;
    }
    float peak = row[0];
#pragma omp simd reduction(max : peak)
    for (int64_t v = 0; v < V; ++v) peak = row[v] > peak ? row[v] : peak;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < V; ++v) {
      out[v] = expf(row[v] - peak);
      sum += out[v];
    }
    const float scale = 1.0f / sum;
#pragma omp simd
    for (int64_t v = 0; v < V; ++v) out[v] *= scale;
    out[label] -= 1.0f;
    loss[t] = std::log(sum) + peak - row[label];
  });
  return 0;
}

}  // extern "C"
