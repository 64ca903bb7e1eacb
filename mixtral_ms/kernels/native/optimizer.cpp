// AdamW: one pass over the memory.
#include "common.hpp"

using namespace native;

namespace {

constexpr int64_t kBlock = 1 << 16;  // values of one task

int64_t value_count(int dimensions, const int64_t* shape) {
  int64_t count = 1;
  for (int i = 0; i < dimensions; ++i) count *= shape[i];
  return count;
}

}  // namespace

extern "C" {

// inputs: parameter, first and second moment, all updated in place; gradient, all of one shape;
//         (learning rate, beta1, beta2, eps, decay, gradient scale), the first and the fourth to
//         fifth with the bias correction in them
// output: one value without meaning: an operator must have one
int adamw(int count, void** params, int* dimensions, int64_t** shapes, const char**, void*,
          void*) {
  if (count != 6) return 1;
  auto parameter = static_cast<float*>(params[0]), first = static_cast<float*>(params[1]),
       second = static_cast<float*>(params[2]);
  auto gradient = static_cast<const float*>(params[3]), rates = static_cast<const float*>(params[4]);
  const float rate = rates[0], beta1 = rates[1], beta2 = rates[2], eps = rates[3],
              decay = rates[4], scale = rates[5];
  const int64_t values = value_count(dimensions[0], shapes[0]);
  parallel_for((values + kBlock - 1) / kBlock, [&](int64_t block) {
    const int64_t begin = block * kBlock, end = std::min(values, begin + kBlock);
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const float g = gradient[i] * scale;
      const float m = beta1 * first[i] + (1.0f - beta1) * g;
      const float v = beta2 * second[i] + (1.0f - beta2) * g * g;
      first[i] = m;
      second[i] = v;
      parameter[i] -= rate * (m / (std::sqrt(v) + eps) + decay * parameter[i]);
    }
  });
  *static_cast<float*>(params[5]) = 0.0f;
  return 0;
}

}  // extern "C"
