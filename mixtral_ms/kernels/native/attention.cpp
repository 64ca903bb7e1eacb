// Causal grouped-query attention with rotary embedding; scores exist a block of rows at a time.
//
// Legend: B batch, S sequence, H heads, K kv heads, d head_dim.
// The method is FlashAttention's (arXiv 2205.14135, 2307.08691) with whole rows instead of tiles
// of keys: the forward keeps the log of each row's sum, the backward computes the rows again.
#include "common.hpp"

using namespace native;

namespace {

constexpr int64_t kQueryBlock = 64;

struct Sizes {
  int64_t B, S, H, K, d, window;
  int64_t q_width() const { return H * d; }
  int64_t k_width() const { return K * d; }
};

// The first eight inputs, the same in both directions.
struct Inputs {
  const float *q, *k, *v, *cos, *sin;
  const int32_t *positions, *segments;
  Sizes sizes;

  Inputs(void** params, int64_t** shapes)
      : q(values(params[0])),
        k(values(params[1])),
        v(values(params[2])),
        cos(values(params[3])),
        sin(values(params[4])),
        positions(static_cast<const int32_t*>(params[5])),
        segments(static_cast<const int32_t*>(params[6])) {
    const int64_t d = shapes[3][1];
    sizes = {shapes[0][0],     shapes[0][1], shapes[0][2] / d,
             shapes[1][2] / d, d,            *static_cast<const int32_t*>(params[7])};
  }

  static const float* values(const void* data) { return static_cast<const float*>(data); }
};

// Which keys a query sees: those of its own segment among the last `window` up to itself.
struct Visibility {
  const int32_t* segments;  // of one row of the batch
  int64_t window;
  int64_t first(int64_t query) const { return std::max<int64_t>(0, query - window + 1); }
  bool hides(int64_t query, int64_t key) const { return segments[query] != segments[key]; }
};

// out = x rotated by the angles of each position; backward rotates the other way.
void rotate(const float* x, float* out, const float* cos, const float* sin,
            const int32_t* positions, int64_t rows, int64_t width, int64_t d, bool backward) {
  const int64_t half = d / 2;
  parallel_for(rows, [&](int64_t r) {
    const float *c = cos + positions[r] * d, *s = sin + positions[r] * d;
    const float sign = backward ? -1.0f : 1.0f;
    for (int64_t head = 0; head < width; head += d) {
      const float* in = x + r * width + head;
      float* to = out + r * width + head;
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const float a = in[i], b = in[i + half];
        to[i] = a * c[i] - sign * b * s[i];
        to[i + half] = b * c[i + half] + sign * a * s[i + half];
      }
    }
  });
}

// Turns a row of scores (keys low ... query) into exp(score * scale - shift), 0 where hidden.
void masked_exp(float* row, int64_t query, int64_t low, int64_t end, const Visibility& sees,
                float scale, float shift) {
  const int64_t first = sees.first(query);
  std::fill(row, row + (first - low), 0.0f);
#pragma omp simd
  for (int64_t j = first; j <= query; ++j) row[j - low] = expf(row[j - low] * scale - shift);
  for (int64_t j = first; j < query; ++j)
    if (sees.hides(query, j)) row[j - low] = 0.0f;
  std::fill(row + (query + 1 - low), row + (end - low), 0.0f);
}

float row_peak(const float* row, int64_t query, int64_t low, const Visibility& sees) {
  float peak = row[query - low];
  for (int64_t j = sees.first(query); j < query; ++j)
    if (!sees.hides(query, j)) peak = std::max(peak, row[j - low]);
  return peak;
}

}  // namespace

extern "C" {

// inputs: q (B, S, H d), k, v (B, S, K d), cos, sin (P, d), positions, segments (B, S), window (1)
// outputs: out (B, S, H d), log of row sums (B, H, S), rotated q and k shaped as q and k
int attention_forward(int count, void** params, int*, int64_t** shapes, const char**, void*,
                      void*) {
  if (count != 12 || sgemm == nullptr) return 1;
  const Inputs in(params, shapes);
  const float *q = in.q, *k = in.k, *v = in.v, *cos = in.cos, *sin = in.sin;
  const int32_t *positions = in.positions, *segments = in.segments;
  const Sizes n = in.sizes;
  const int64_t d = n.d;
  auto out = static_cast<float*>(params[8]), log_sum = static_cast<float*>(params[9]),
       q_rot = static_cast<float*>(params[10]), k_rot = static_cast<float*>(params[11]);
  rotate(q, q_rot, cos, sin, positions, n.B * n.S, n.q_width(), d, false);
  rotate(k, k_rot, cos, sin, positions, n.B * n.S, n.k_width(), d, false);
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  const int64_t blocks = (n.S + kQueryBlock - 1) / kQueryBlock;
  // The last blocks see most keys: they come first, so that no thread ends on a long task alone.
  parallel_for(n.B * n.H * blocks, [&](int64_t task) {
    const int64_t b = task % n.B, h = task / n.B % n.H, block = blocks - 1 - task / n.B / n.H;
    const int64_t begin = block * kQueryBlock, end = std::min(n.S, begin + kQueryBlock);
    const Visibility sees{segments + b * n.S, n.window};
    const int64_t low = sees.first(begin), keys = end - low, rows = end - begin;
    const int64_t kv = (b * n.S + low) * n.k_width() + h / (n.H / n.K) * d;
    const int64_t at = (b * n.S + begin) * n.q_width() + h * d;
    auto scores = scratch(rows * keys);
    gemm('N', 'T', rows, keys, d, q_rot + at, n.q_width(), k_rot + kv, n.k_width(), 0.0f,
         scores.get(), keys);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = scores.get() + r * keys;
      const float peak = row_peak(row, begin + r, low, sees) * scale;
      masked_exp(row, begin + r, low, end, sees, scale, peak);
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < keys; ++j) sum += row[j];
      const float inverse = 1.0f / sum;
#pragma omp simd
      for (int64_t j = 0; j < keys; ++j) row[j] *= inverse;
      log_sum[(b * n.H + h) * n.S + begin + r] = peak + std::log(sum);
    }
    gemm('N', 'N', rows, d, keys, scores.get(), keys, v + kv, n.k_width(), 0.0f, out + at,
         n.q_width());
  });
  return 0;
}

// inputs: rotated q and k, v, cos, sin, positions, segments, window, out, log of row sums, d_out
// outputs: dq, dk, dv shaped as q, k, v
int attention_backward(int count, void** params, int*, int64_t** shapes, const char**, void*,
                       void*) {
  if (count != 14 || sgemm == nullptr) return 1;
  const Inputs in(params, shapes);
  const float *q = in.q, *k = in.k, *v = in.v, *cos = in.cos, *sin = in.sin;
  const int32_t *positions = in.positions, *segments = in.segments;
  const Sizes n = in.sizes;
  const int64_t d = n.d;
  auto out = static_cast<const float*>(params[8]), log_sum = static_cast<const float*>(params[9]),
       d_out = static_cast<const float*>(params[10]);
  auto dq = static_cast<float*>(params[11]), dk = static_cast<float*>(params[12]),
       dv = static_cast<float*>(params[13]);
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  std::fill(dk, dk + n.B * n.S * n.k_width(), 0.0f);
  std::fill(dv, dv + n.B * n.S * n.k_width(), 0.0f);
  const int64_t qw = n.q_width(), kw = n.k_width();
  // One task owns the keys of one kv head: its sums need no lock, and always come in one order.
  parallel_for(n.B * n.K, [&](int64_t task) {
    const int64_t b = task % n.B, kv_head = task / n.B, groups = n.H / n.K;
    const Visibility sees{segments + b * n.S, n.window};
    auto weights = scratch(kQueryBlock * n.S), d_scores = scratch(kQueryBlock * n.S);
    for (int64_t h = kv_head * groups; h < (kv_head + 1) * groups; ++h) {
      for (int64_t begin = 0; begin < n.S; begin += kQueryBlock) {
        const int64_t end = std::min(n.S, begin + kQueryBlock), rows = end - begin;
        const int64_t low = sees.first(begin), keys = end - low;
        const int64_t kv = (b * n.S + low) * kw + kv_head * d;
        const int64_t at = (b * n.S + begin) * qw + h * d;
        float *p = weights.get(), *ds = d_scores.get();
        gemm('N', 'T', rows, keys, d, q + at, qw, k + kv, kw, 0.0f, p, keys);
        gemm('N', 'T', rows, keys, d, d_out + at, qw, v + kv, kw, 0.0f, ds, keys);
        for (int64_t r = 0; r < rows; ++r) {
          float *row = p + r * keys, *grad = ds + r * keys;
          masked_exp(row, begin + r, low, end, sees, scale,
                     log_sum[(b * n.H + h) * n.S + begin + r]);
          const float *o = out + at + r * qw, *g = d_out + at + r * qw;
          float mean = 0.0f;  // sum over keys of weight * gradient = out . d_out
#pragma omp simd reduction(+ : mean)
          for (int64_t i = 0; i < d; ++i) mean += o[i] * g[i];
#pragma omp simd
          for (int64_t j = 0; j < keys; ++j) grad[j] = row[j] * (grad[j] - mean) * scale;
        }
        gemm('T', 'N', keys, d, rows, p, keys, d_out + at, qw, 1.0f, dv + kv, kw);
        gemm('T', 'N', keys, d, rows, ds, keys, q + at, qw, 1.0f, dk + kv, kw);
        gemm('N', 'N', rows, d, keys, ds, keys, k + kv, kw, 0.0f, dq + at, qw);
      }
    }
  });
  rotate(dq, dq, cos, sin, positions, n.B * n.S, qw, d, true);
  rotate(dk, dk, cos, sin, positions, n.B * n.S, kw, d, true);
  return 0;
}

}  // extern "C"
