// Legend: n rows of activations, k their width; R weight rows and N activation rows of one block.
#include "decoder_linear.hpp"

#include <algorithm>
#include <memory>

namespace decoder {
namespace {

constexpr int64_t kTaskBytes = 96 << 10;  // of weights: some ten microseconds of streaming
constexpr int64_t kWideRows = 12;         // weight rows that stay in the nearest cache
constexpr int64_t kTokenBlock = 64;       // activation rows that stay in the second cache
constexpr int64_t kPanel = 16;            // columns of the many-row kernel: two vectors
constexpr int64_t kHeight = 6;            // its rows: twelve sums of the sixteen registers
constexpr int64_t kDepth = 512;           // deep: starting and ending a tile hardly counts
constexpr int64_t kPanelsPerTask = 4;
constexpr int64_t kManyRowsFrom = 12;  // activation rows from which packing the weight pays

// Grows and never shrinks; each thread has its own.
template <int use>
float* thread_buffer(int64_t count) {
  thread_local std::unique_ptr<Buffer> buffer;
  thread_local int64_t size = 0;
  if (count > size) {
    buffer = std::make_unique<Buffer>(count);
    size = count;
  }
  return buffer->get();
}

// ---- few rows ----

// out[n * ldo + r] = x_n . w_r. Each has one vector of sums over all of k, whatever R and N are.
template <int R, int N, class W>
void dot_block(const W* w, int64_t ldw, const float* x, int64_t ldx, int64_t k, float* out,
               int64_t ldo) {
  Vec sums[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[r][n] = Vec{};
  const auto take = [&](const auto& load_at) __attribute__((always_inline)) {
    Vec weights[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      weights[r] = load_at(w + r * ldw);
      if (N > 1) keep_in_register(weights[r]);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      Vec activation = load_at(x + n * ldx);
      keep_in_register(activation);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][n] = fma(weights[r], activation, sums[r][n]);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) take([&](const auto* p) { return load(p + i); });
  if (i < k) take([&](const auto* p) { return load_some(p + i, k - i); });
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) out[n * ldo + r] = reduce(sums[r][n]);
}

template <int R, int N, class W>
void dot_rows(const W* w, int64_t rows, const float* x, int64_t ldx, int64_t k, float* out,
              int64_t ldo) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) dot_block<R, N>(w + r * k, k, x, ldx, k, out + r, ldo);
  for (; r < rows; ++r) dot_block<1, N>(w + r * k, k, x, ldx, k, out + r, ldo);
}

template <class W>
void dot_tokens(const W* w, int64_t rows, const float* x, int64_t ldx, int64_t n, int64_t k,
                float* out, int64_t ldo) {
  for (int64_t t = 0; t < n;) {
    const int64_t left = n - t, take = left == 5 ? 3 : std::min<int64_t>(left, 4);
    const float* from = x + t * ldx;
    float* to = out + t * ldo;
    switch (take) {
      case 1: dot_rows<8, 1>(w, rows, from, ldx, k, to, ldo); break;
      case 2: dot_rows<4, 2>(w, rows, from, ldx, k, to, ldo); break;
      case 3: dot_rows<3, 3>(w, rows, from, ldx, k, to, ldo); break;
      default: dot_rows<3, 4>(w, rows, from, ldx, k, to, ldo);
    }
    t += take;
  }
}

const float* widened(const float* w, int64_t) { return w; }

template <class W>
const float* widened(const W* w, int64_t count) {
  float* wide = thread_buffer<0>(round_up(count, kLanes));
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(wide + i, load(w + i));
  if (i < count) store(wide + i, load_some(w + i, count - i));
  return wide;
}

template <class W>
void few_rows(const W* w, int64_t rows, const float* x, int64_t ldx, int64_t n, int64_t k,
              float* out, int64_t ldo) {
  if (n <= 4) return dot_tokens(w, rows, x, ldx, n, k, out, ldo);
  for (int64_t t = 0; t < n; t += kTokenBlock) {
    const int64_t tokens = std::min(kTokenBlock, n - t);
    for (int64_t r = 0; r < rows; r += kWideRows) {
      const int64_t some = std::min(kWideRows, rows - r);
      dot_tokens(widened(w + r * k, some * k), some, x + t * ldx, ldx, tokens, k,
                 out + t * ldo + r, ldo);
    }
  }
}

// ---- many rows ----

// c (M, 16) += a (M, k) b (k, 16), or = when `fresh`
template <int M>
void tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
          int64_t ldc, bool fresh) {
  Vec left[M], right[M];
  for (int m = 0; m < M; ++m) {
    left[m] = fresh ? Vec{} : load(c + m * ldc);
    right[m] = fresh ? Vec{} : load(c + m * ldc + kLanes);
  }
  for (int64_t i = 0; i < k; ++i) {
    const Vec b_left = load(b + i * ldb), b_right = load(b + i * ldb + kLanes);
    for (int m = 0; m < M; ++m) {
      const Vec value = splat(a[m * lda + i]);
      left[m] = fma(value, b_left, left[m]);
      right[m] = fma(value, b_right, right[m]);
    }
  }
  for (int m = 0; m < M; ++m) {
    store(c + m * ldc, left[m]);
    store(c + m * ldc + kLanes, right[m]);
  }
}

void tile_column(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                 float* c, int64_t ldc, bool fresh) {
  int64_t i = 0;
  for (; i + kHeight <= m; i += kHeight)
    tile<kHeight>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, fresh);
  a += i * lda;
  c += i * ldc;
  switch (m - i) {
    case 5: return tile<5>(k, a, lda, b, ldb, c, ldc, fresh);
    case 4: return tile<4>(k, a, lda, b, ldb, c, ldc, fresh);
    case 3: return tile<3>(k, a, lda, b, ldb, c, ldc, fresh);
    case 2: return tile<2>(k, a, lda, b, ldb, c, ldc, fresh);
    case 1: return tile<1>(k, a, lda, b, ldb, c, ldc, fresh);
  }
}

template <class W>
void many_rows(const W* w, int64_t rows, const float* x, int64_t ldx, int64_t n, int64_t k,
               float* out, int64_t ldo) {
  float* panel = thread_buffer<1>(kPanel * kDepth);
  float* rest = thread_buffer<2>(n * kPanel);  // of a panel that is not full
  for (int64_t i = 0; i < k; i += kDepth) {
    const int64_t depth = std::min(kDepth, k - i);
    for (int64_t r = 0; r < rows; r += kPanel) {
      const int64_t some = std::min(kPanel, rows - r);
      pack_panel(w + r * k + i, k, some, depth, panel);
      if (some == kPanel) {
        tile_column(n, depth, x + i, ldx, panel, kPanel, out + r, ldo, i == 0);
        continue;
      }
      tile_column(n, depth, x + i, ldx, panel, kPanel, rest, kPanel, true);
      for (int64_t t = 0; t < n; ++t)
        for (int64_t j = 0; j < some; ++j) {
          float& to = out[t * ldo + r + j];
          to = i == 0 ? rest[t * kPanel + j] : to + rest[t * kPanel + j];
        }
    }
  }
}

void scale_and_bias(const Matrix& weight, int64_t begin, int64_t end, int64_t n, float* out,
                    int64_t ldo) {
  const float* scale = weight.scale == nullptr ? nullptr : weight.scale + begin;
  const float* bias = weight.bias == nullptr ? nullptr : weight.bias + begin;
  for (int64_t t = 0; t < n; ++t) {
    float* row = out + t * ldo;
    if (scale != nullptr)
      for (int64_t r = 0; r < end - begin; ++r) row[r] *= scale[r];
    if (bias != nullptr)
      for (int64_t r = 0; r < end - begin; ++r) row[r] += bias[r];
  }
}

template <class W>
void product_of(const Matrix& weight, int64_t begin, int64_t end, const float* x, int64_t ldx,
                int64_t n, float* out, int64_t ldo, Sum sum) {
  const W* rows = static_cast<const W*>(weight.data) + begin * weight.cols;
  const auto run = sum == Sum::kFewRows ? few_rows<W> : many_rows<W>;
  run(rows, end - begin, x, ldx, n, weight.cols, out, ldo);
}

}  // namespace

Sum sum_of(const Step& step, int64_t rows) {
  return step.decodes() || rows < kManyRowsFrom ? Sum::kFewRows : Sum::kManyRows;
}

void product(const Matrix& weight, int64_t begin, int64_t end, const float* x, int64_t ldx,
             int64_t n, float* out, int64_t ldo, Sum sum) {
  const auto run = weight.type == kFloat32   ? product_of<float>
                   : weight.type == kFloat16 ? product_of<Half>
                                             : product_of<int8_t>;
  run(weight, begin, end, x, ldx, n, out, ldo, sum);
  scale_and_bias(weight, begin, end, n, out, ldo);
}

int64_t rows_per_task(const Matrix& weight, Sum sum) {
  if (sum == Sum::kManyRows) return kPanel * kPanelsPerTask;
  const int64_t bytes = weight.cols * (weight.type == kFloat32 ? 4 : weight.type == kFloat16 ? 2 : 1);
  return std::max<int64_t>(1, kTaskBytes / bytes / (2 * kWideRows)) * 2 * kWideRows;
}

void multiply_add(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                  int64_t ldb, float* c, int64_t ldc) {
  for (int64_t j = 0; j < n; j += kPanel) tile_column(m, k, a, lda, b + j, ldb, c + j, ldc, false);
}

template <class T>
void pack_panel(const T* from, int64_t ld, int64_t rows, int64_t k, float* panel) {
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    const T* top = from + half * ld;
    const int64_t height = std::clamp<int64_t>(rows - half, 0, kLanes);
    int64_t i = 0;
    if (height == kLanes)
      for (; i + kLanes <= k; i += kLanes) {
        Vec block[kLanes];
#pragma GCC unroll 8
        for (int64_t r = 0; r < kLanes; ++r) block[r] = load(top + r * ld + i);
        transpose(block);
#pragma GCC unroll 8
        for (int64_t j = 0; j < kLanes; ++j) store(panel + (i + j) * kPanel + half, block[j]);
      }
    for (; i < k; i += kLanes) {
      const int64_t some = std::min(kLanes, k - i);
      Vec block[kLanes] = {};
      for (int64_t r = 0; r < height; ++r) {
        const T* p = top + r * ld + i;
        block[r] = some == kLanes ? load(p) : load_some(p, some);
      }
      transpose(block);
      for (int64_t j = 0; j < some; ++j) store(panel + (i + j) * kPanel + half, block[j]);
    }
  }
}

template void pack_panel(const float*, int64_t, int64_t, int64_t, float*);

}  // namespace decoder
