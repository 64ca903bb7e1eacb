// The experts' SwiGLU networks over rows grouped by expert: nothing is padded.
//
// Legend: R rows sorted by expert, D hidden, F intermediate, E experts.
#include "common.hpp"

using namespace native;

namespace {

constexpr int64_t kRowBlock = 128;     // rows of one task: its activations stay in the cache
constexpr int64_t kWeightBlock = 512;  // rows of a weight gradient per task

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

// Whether MindSpore, imported by now, has the matrix product that its operators call.
int native_ready() {
  if (sgemm == nullptr) sgemm = find_sgemm();
  return sgemm != nullptr;
}

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

}  // extern "C"
