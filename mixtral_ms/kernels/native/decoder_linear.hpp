// Products of activations with weights, for few rows and for many.
#pragma once
#include "decoder.hpp"

namespace decoder {

// How a product is summed. `kFewRows` reads the weight once and sums each value in an order that
// does not depend on the number of rows. `kManyRows` is faster from about 16 rows on; its values
// do not depend on the number of rows either, but differ from the other's in the last bits.
enum class Sum { kFewRows, kManyRows };

// Decoding sums in one way only, whatever else is in the step; a prompt's chunk stands alone.
Sum sum_of(const Step& step, int64_t rows);

// out (n, end - begin), its rows ldo apart = x (n, cols), rows ldx apart, times weight rows
// [begin, end) transposed, with scale and bias.
void product(const Matrix& weight, int64_t begin, int64_t end, const float* x, int64_t ldx,
             int64_t n, float* out, int64_t ldo, Sum sum);

// Rows of a weight that make a task: short enough to balance threads, long enough to stream.
int64_t rows_per_task(const Matrix& weight, Sum sum);

// C (m, n) += A (m, k) B (k, n), rows lda, ldb, ldc apart; n is a multiple of 16.
void multiply_add(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                  int64_t ldb, float* c, int64_t ldc);

// The first 16 rows (or `rows`, then zeros) of a (16, k) block, rows ld apart, as (k, 16).
template <class T>
void pack_panel(const T* from, int64_t ld, int64_t rows, int64_t k, float* panel);

}  // namespace decoder
