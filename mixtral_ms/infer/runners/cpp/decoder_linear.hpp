// Products of activations with weights, for few rows and for many.
#pragma once
#include "decoder.hpp"

namespace decoder {

// How a product is summed. `kFewRows` reads the weight once and sums each value in an order that
// does not depend on the number of rows. `kManyRows` is faster from a handful of rows on; its
// values do not depend on the number of rows either, but differ from the other's in the last bits.
enum class Sum { kFewRows, kManyRows };

// Tokens of a prompt's chunk from which it sums as many rows do, be it alone or beside others.
constexpr int64_t kManyRowsFrom = 12;

// One way for all of a step: all its chunks have kManyRowsFrom tokens, or none has.
inline Sum sum_of(const Step& step) {
  return step.starts[1] < kManyRowsFrom ? Sum::kFewRows : Sum::kManyRows;
}

constexpr int64_t kPanel = 16;  // rows of a panel: two vectors

// Activations (count, k) as products take them: row after row for few; for many as panels of
// kPanel rows, each (k, kPanel), with zeros behind the last row.
struct Rows {
  const float* data;
  int64_t ld;  // between rows that are not in panels
  int64_t count;
  Sum sum;
};

// x (n, k), its rows ldx apart, as `sum` wants it; `room` holds the panels, round_up(n, kPanel) k.
Rows prepare(const float* x, int64_t ldx, int64_t n, int64_t k, Sum sum, float* room);

// out (n, end - begin), its rows ldo apart = x times weight rows [begin, end) transposed, with
// scale and bias.
void product(const Matrix& weight, int64_t begin, int64_t end, const Rows& x, float* out,
             int64_t ldo);

// The same of many rows, as panels (end - begin, kPanel) one after another; what stands behind the
// last row means nothing.
void product_panels(const Matrix& weight, int64_t begin, int64_t end, const Rows& x, float* out);

// Rows of a weight that make a task: short enough to balance threads, long enough to stream.
int64_t rows_per_task(const Matrix& weight, Sum sum);

// C (m, n) += A (m, k) B (k, n), rows lda, ldb, ldc apart; n is a multiple of kPanel.
void multiply_add(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                  int64_t ldb, float* c, int64_t ldc);

// `count` rows of k values, at most kPanel, as a panel (k, kPanel).
void pack_panel(const float* const* rows, int64_t count, int64_t k, float* panel);

}  // namespace decoder
