// RMSNorm and softmax cross entropy.
//
// Legend: T tokens, D hidden, V vocabulary.
#include "common.hpp"

using namespace native;

namespace {

// Partial sums over a fixed number of blocks give the same bits whatever the thread count.
constexpr int64_t kNormBlocks = 16;

}  // namespace

extern "C" {

// inputs: x (T, D), weight (D), eps (1)
// outputs: y (T, D), inverse root mean square (T)
int rms_norm_forward(int count, void** params, int*, int64_t** shapes, const char**, void*,
                     void*) {
  if (count != 5) return 1;
  const int64_t T = shapes[0][0], D = shapes[0][1];
  auto x = static_cast<const float*>(params[0]), weight = static_cast<const float*>(params[1]);
  const float eps = *static_cast<const float*>(params[2]);
  auto y = static_cast<float*>(params[3]), inverse = static_cast<float*>(params[4]);
  parallel_for(kNormBlocks, [&](int64_t block) {
    for (int64_t t = T * block / kNormBlocks; t < T * (block + 1) / kNormBlocks; ++t) {
      const float* row = x + t * D;
      float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < D; ++i) squares += row[i] * row[i];
      const float scale = 1.0f / std::sqrt(squares / D + eps);
      inverse[t] = scale;
#pragma omp simd
      for (int64_t i = 0; i < D; ++i) y[t * D + i] = row[i] * scale * weight[i];
    }
  });
  return 0;
}

// inputs: x (T, D), weight (D), inverse root mean square (T), dy (T, D)
// outputs: dx (T, D), d_weight (D)
int rms_norm_backward(int count, void** params, int*, int64_t** shapes, const char**, void*,
                      void*) {
  if (count != 6) return 1;
  const int64_t T = shapes[0][0], D = shapes[0][1];
  auto x = static_cast<const float*>(params[0]), weight = static_cast<const float*>(params[1]),
       inverse = static_cast<const float*>(params[2]), dy = static_cast<const float*>(params[3]);
  auto dx = static_cast<float*>(params[4]), d_weight = static_cast<float*>(params[5]);
  std::vector<float> partial(kNormBlocks * D, 0.0f);
  parallel_for(kNormBlocks, [&](int64_t block) {
    float* sum = partial.data() + block * D;
    for (int64_t t = T * block / kNormBlocks; t < T * (block + 1) / kNormBlocks; ++t) {
      const float *row = x + t * D, *grad = dy + t * D, scale = inverse[t];
      float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < D; ++i) dot += grad[i] * weight[i] * row[i];
      const float back = dot * scale * scale / D;
#pragma omp simd
      for (int64_t i = 0; i < D; ++i) {
        dx[t * D + i] = scale * (grad[i] * weight[i] - row[i] * back);
        sum[i] += grad[i] * row[i] * scale;
      }
    }
  });
  std::fill(d_weight, d_weight + D, 0.0f);
  for (int64_t block = 0; block < kNormBlocks; ++block)
    for (int64_t i = 0; i < D; ++i) d_weight[i] += partial[block * D + i];
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
