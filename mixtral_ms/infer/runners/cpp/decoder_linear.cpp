// Legend: n rows of activations, k their width; R weight rows and N activation rows of one block;
// M rows and V vectors of one tile.
#include "decoder_linear.hpp"

#include <algorithm>
#include <memory>

#include "decoder_pool.hpp"

namespace decoder {
namespace {

constexpr int64_t kTaskBytes = 96 << 10;  // of weights: some ten microseconds of streaming
constexpr int64_t kWideRows = 12;         // weight rows that stay in the nearest cache
constexpr int64_t kTokenBlock = 64;       // activation rows that stay in the second cache
constexpr int64_t kDepth = 512;           // deep: starting and ending a tile hardly counts
constexpr int64_t kManyRowsPerTask = 48;  // weight rows that stay in the second cache

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

// Rows of a weight, ld apart, as floats; `ld` is then theirs.
const float* widened(const float* w, int64_t, int64_t, int64_t&) { return w; }

template <class W>
const float* widened(const W* w, int64_t rows, int64_t k, int64_t& ld) {
  float* wide = thread_buffer<0>(round_up(rows * k, kLanes));
  for (int64_t r = 0; r < rows; ++r) {
    const W* from = w + r * ld;
    float* to = wide + r * k;
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) store(to + i, load(from + i));
    const Vec rest = i < k ? load_some(from + i, k - i) : Vec{};
    std::memcpy(to + i, &rest, (k - i) * sizeof(float));
  }
  ld = k;
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
      int64_t ld = k;
      dot_tokens(widened(w + r * k, some, k, ld), some, x + t * ldx, ldx, tokens, k,
                 out + t * ldo + r, ldo);
    }
  }
}

// ---- many rows ----

// c (M, 8 V) += a (M, k) b (k, 8 V), or = when `fresh`
template <int M, int V>
void tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
          int64_t ldc, bool fresh) {
  Vec sums[M][V];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[m][v] = fresh ? Vec{} : load(c + m * ldc + v * kLanes);
  for (int64_t i = 0; i < k; ++i) {
    Vec values[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) values[v] = load(b + i * ldb + v * kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const Vec factor = splat(a[m * lda + i]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[m][v] = fma(factor, values[v], sums[m][v]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(c + m * ldc + v * kLanes, sums[m][v]);
}

// The same for any number of rows: a tile's twelve sums and its operands fill the registers.
template <int V>
void tile_column(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                 float* c, int64_t ldc, bool fresh) {
  constexpr int kHeight = 12 / V;
  int64_t i = 0;
  const auto take = [&](auto rows) {
    tile<rows(), V>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, fresh);
    i += rows();
  };
  while (i + kHeight <= m) take(std::integral_constant<int, kHeight>{});
  if (i + 6 <= m) take(std::integral_constant<int, 6>{});
  switch (m - i) {
    case 5: return take(std::integral_constant<int, 5>{});
    case 4: return take(std::integral_constant<int, 4>{});
    case 3: return take(std::integral_constant<int, 3>{});
    case 2: return take(std::integral_constant<int, 2>{});
    case 1: return take(std::integral_constant<int, 1>{});
  }
}

// The weight is read where it lies, one value for a whole panel at a time.
template <class W>
void many_rows(const W* w, int64_t rows, const float* panels, int64_t n, int64_t k, float* out) {
  for (int64_t i = 0; i < k; i += kDepth) {
    const int64_t depth = std::min(kDepth, k - i);
    int64_t ld = k;
    const float* wide = widened(w + i, rows, depth, ld);
    for (int64_t t = 0; t < n; t += kPanel) {
      const float* panel = panels + t * k + i * kPanel;
      const auto column = n - t > kLanes ? tile_column<2> : tile_column<1>;
      column(rows, depth, wide, ld, panel, kPanel, out + t * rows, kPanel, i == 0);
    }
  }
}

// out (n, rows), its rows ldo apart, from panels (rows, kPanel)
void unpack(const float* panels, int64_t rows, int64_t n, float* out, int64_t ldo) {
  for (int64_t t = 0; t < n; t += kLanes) {
    const float* from = panels + t / kPanel * kPanel * rows + t % kPanel;
    const int64_t some = std::min(kLanes, n - t);
    int64_t r = 0;
    for (; r + kLanes <= rows; r += kLanes) {
      Vec block[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) block[j] = load(from + (r + j) * kPanel);
      transpose(block);
      for (int64_t j = 0; j < some; ++j) store(out + (t + j) * ldo + r, block[j]);
    }
    for (; r < rows; ++r)
      for (int64_t j = 0; j < some; ++j) out[(t + j) * ldo + r] = from[r * kPanel + j];
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

void scale_and_bias_panels(const Matrix& weight, int64_t begin, int64_t end, int64_t n,
                           float* out) {
  if (weight.scale == nullptr && weight.bias == nullptr) return;
  for (int64_t t = 0; t < n; t += kPanel)
    for (int64_t r = begin; r < end; ++r, out += kPanel) {
      const float scale = weight.scale == nullptr ? 1.0f : weight.scale[r];
      const float bias = weight.bias == nullptr ? 0.0f : weight.bias[r];
      for (int64_t j = 0; j < kPanel; ++j) out[j] = out[j] * scale + bias;
    }
}

// body(first value of the weight's row `begin`)
template <class Body>
void with_type(const Matrix& weight, int64_t begin, const Body& body) {
  const int64_t offset = begin * weight.cols;
  switch (weight.type) {
    case kFloat32: return body(static_cast<const float*>(weight.data) + offset);
    case kFloat16: return body(static_cast<const Half*>(weight.data) + offset);
    default: return body(static_cast<const int8_t*>(weight.data) + offset);
  }
}

}  // namespace

Rows prepare(const float* x, int64_t ldx, int64_t n, int64_t k, Sum sum, float* room) {
  if (sum == Sum::kFewRows) return {x, ldx, n, sum};
  run_tasks((n + kPanel - 1) / kPanel, [&](int64_t task) {
    const int64_t from = task * kPanel, some = std::min(kPanel, n - from);
    const float* rows[kPanel];
    for (int64_t r = 0; r < some; ++r) rows[r] = x + (from + r) * ldx;
    pack_panel(rows, some, k, room + from * k);
  });
  return {room, 0, n, sum};
}

void product(const Matrix& weight, int64_t begin, int64_t end, const Rows& x, float* out,
             int64_t ldo) {
  if (x.sum == Sum::kManyRows) {
    float* panels = thread_buffer<1>(round_up(x.count, kPanel) * (end - begin));
    product_panels(weight, begin, end, x, panels);
    return unpack(panels, end - begin, x.count, out, ldo);
  }
  with_type(weight, begin, [&](const auto* w) {
    few_rows(w, end - begin, x.data, x.ld, x.count, weight.cols, out, ldo);
  });
  scale_and_bias(weight, begin, end, x.count, out, ldo);
}

void product_panels(const Matrix& weight, int64_t begin, int64_t end, const Rows& x, float* out) {
  with_type(weight, begin, [&](const auto* w) {
    many_rows(w, end - begin, x.data, x.count, weight.cols, out);
  });
  scale_and_bias_panels(weight, begin, end, x.count, out);
}

int64_t rows_per_task(const Matrix& weight, Sum sum) {
  if (sum == Sum::kManyRows) return kManyRowsPerTask;
  const int64_t bytes = weight.cols * (weight.type == kFloat32 ? 4 : weight.type == kFloat16 ? 2 : 1);
  return std::max<int64_t>(1, kTaskBytes / bytes / (2 * kWideRows)) * 2 * kWideRows;
}

void multiply_add(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                  int64_t ldb, float* c, int64_t ldc) {
  for (int64_t j = 0; j < n; j += kPanel)
    tile_column<2>(m, k, a, lda, b + j, ldb, c + j, ldc, false);
}

void pack_panel(const float* const* rows, int64_t count, int64_t k, float* panel) {
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    const int64_t height = std::clamp<int64_t>(count - half, 0, kLanes);
    const float* top[kLanes] = {};
    std::copy_n(rows + half, height, top);
    int64_t i = 0;
    if (height == kLanes)
      for (; i + kLanes <= k; i += kLanes) {
        Vec block[kLanes];
#pragma GCC unroll 8
        for (int64_t r = 0; r < kLanes; ++r) block[r] = load(top[r] + i);
        transpose(block);
#pragma GCC unroll 8
        for (int64_t j = 0; j < kLanes; ++j) store(panel + (i + j) * kPanel + half, block[j]);
      }
    for (; i < k; i += kLanes) {
      const int64_t some = std::min(kLanes, k - i);
      Vec block[kLanes] = {};
      for (int64_t r = 0; r < height; ++r)
        block[r] = some == kLanes ? load(top[r] + i) : load_some(top[r] + i, some);
      transpose(block);
      for (int64_t j = 0; j < some; ++j) store(panel + (i + j) * kPanel + half, block[j]);
    }
  }
}

}  // namespace decoder
