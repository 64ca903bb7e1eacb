// AdamW and the sum of squares: one pass over the memory each.
#include "common.hpp"

using namespace native;

namespace {

constexpr int64_t kBlock = 1 << 16;  // values of one task

template <typename Body>
void over_blocks(int64_t count, const Body& body) {
  parallel_for((count + kBlock - 1) / kBlock, [&](int64_t block) {
    body(block, block * kBlock, std::min(count, (block + 1) * kBlock));
  });
}

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
  over_blocks(value_count(dimensions[0], shapes[0]), [&](int64_t, int64_t begin, int64_t end) {
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

// input: any shape; output: sum of squares (1)
int sum_of_squares(int count, void** params, int* dimensions, int64_t** shapes, const char**,
                   void*, void*) {
  if (count != 2) return 1;
  auto x = static_cast<const float*>(params[0]);
  const int64_t size = value_count(dimensions[0], shapes[0]);
  std::vector<double> partial((size + kBlock - 1) / kBlock, 0.0);
  over_blocks(size, [&](int64_t block, int64_t begin, int64_t end) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += static_cast<double>(x[i]) * x[i];
    partial[block] = sum;
  });
  double total = 0.0;  // in the order of the blocks, whatever thread computed them
  for (const double sum : partial) total += sum;
  *static_cast<float*>(params[1]) = static_cast<float>(total);
  return 0;
}

}  // extern "C"
