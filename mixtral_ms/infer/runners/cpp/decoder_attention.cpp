// Legend: d head_dim, G query heads that share a kv head; a row is one query head of one token.
//
// Both ways take the context a piece at a time and keep, for each row, the peak of its scores, the
// sum of exp(score - peak) and the values weighted so (online softmax, arXiv 2205.14135). The
// pieces start at fixed positions, so that nothing but the sequence itself decides the sums.
#include "decoder_attention.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "decoder_linear.hpp"
#include "decoder_pool.hpp"

namespace decoder {
namespace {

constexpr int64_t kDecodePiece = 256;  // positions of a task: a long context spreads over threads
constexpr int64_t kPrefillPiece = 128;
constexpr int64_t kQueryTokens = 32;

int64_t first_visible(const Model& model, int64_t position) {
  return model.window > 0 ? std::max<int64_t>(0, position - model.window + 1) : 0;
}

// scores[0, count) becomes exp(score - peak), zeros up to a multiple of eight; returns their sum.
float exp_row(float* scores, int64_t count, float peak) {
  const Vec shift = splat(peak);
  Vec sum{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec e = exp(load(scores + i) - shift);
    store(scores + i, e);
    sum = sum + e;
  }
  if (i < count) {
    float rest[kLanes];
    store(rest, exp(load_some(scores + i, count - i) - shift));
    std::fill(rest + (count - i), rest + kLanes, 0.0f);
    store(scores + i, load(rest));
    sum = sum + load(rest);
  }
  return reduce(sum);
}

float peak_of(const float* scores, int64_t count) {
  float most = scores[0];
  int64_t i = 0;
  if (count >= kLanes) {
    Vec lanes = load(scores);
    for (i = kLanes; i + kLanes <= count; i += kLanes) lanes = at_least(load(scores + i), lanes);
    most = peak(lanes);
  }
  for (; i < count; ++i) most = std::max(most, scores[i]);
  return most;
}

// ---- decode ----

// sums[g, :] += weights[g, j] values[j, :] for `count` positions that lie one after another.
template <int G>
void add_values(const float* weights, int64_t ldw, const float* values, int64_t count,
                int64_t stride, float* sums) {
  for (int64_t i = 0; i < stride; i += 2 * kLanes) {
    Vec left[G], right[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      left[g] = load(sums + g * stride + i);
      right[g] = load(sums + g * stride + i + kLanes);
    }
    for (int64_t j = 0; j < count; ++j) {
      const Vec v_left = load(values + j * stride + i);
      const Vec v_right = load(values + j * stride + i + kLanes);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const Vec weight = splat(weights[g * ldw + j]);
        left[g] = fma(weight, v_left, left[g]);
        right[g] = fma(weight, v_right, right[g]);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      store(sums + g * stride + i, left[g]);
      store(sums + g * stride + i + kLanes, right[g]);
    }
  }
}

void add_all_values(int64_t groups, const float* weights, int64_t ldw, const float* values,
                    int64_t count, int64_t stride, float* sums) {
  int64_t g = 0;
  for (; g + 4 <= groups; g += 4)
    add_values<4>(weights + g * ldw, ldw, values, count, stride, sums + g * stride);
  for (; g < groups; ++g)
    add_values<1>(weights + g * ldw, ldw, values, count, stride, sums + g * stride);
}

// One piece of the context for the G heads of one kv head of one sequence.
struct Piece {
  int64_t sequence, kv_head, begin, end;
};

// `sums` (G, stride), `peaks` and `totals` (G) of a piece.
void attend_piece(const Model& model, const LayerCache& cache, const int32_t* table,
                  const Piece& piece, const float* q, float* sums, float* peaks, float* totals) {
  const int64_t groups = model.groups(), stride = model.head_stride();
  thread_local std::vector<float> scores;
  scores.resize(groups * kDecodePiece);
  for (int64_t p = piece.begin; p < piece.end;) {
    const int64_t count = std::min(cache.run(p), piece.end - p);
    const Matrix keys{cache.key(table, piece.kv_head, p), nullptr, nullptr, count, stride,
                      kFloat32};
    product(keys, 0, count, {q, stride, groups, Sum::kFewRows},
            scores.data() + (p - piece.begin), kDecodePiece);
    p += count;
  }
  const int64_t positions = piece.end - piece.begin;
  for (int64_t g = 0; g < groups; ++g) {
    float* row = scores.data() + g * kDecodePiece;
    peaks[g] = peak_of(row, positions);
    totals[g] = exp_row(row, positions, peaks[g]);
  }
  std::fill(sums, sums + groups * stride, 0.0f);
  for (int64_t p = piece.begin; p < piece.end;) {
    const int64_t count = std::min(cache.run(p), piece.end - p);
    add_all_values(groups, scores.data() + (p - piece.begin), kDecodePiece,
                   cache.value(table, piece.kv_head, p), count, stride, sums);
    p += count;
  }
}

std::vector<Piece> pieces_of(const Model& model, const Step& step) {
  std::vector<Piece> pieces;
  for (int64_t n = 0; n < step.sequences; ++n) {
    const int64_t end = step.positions[n] + 1, begin = first_visible(model, end - 1);
    for (int64_t head = 0; head < model.kv_heads; ++head)
      for (int64_t p = begin; p < end;) {
        const int64_t next = std::min(end, (p / kDecodePiece + 1) * kDecodePiece);
        pieces.push_back({n, head, p, next});
        p = next;
      }
  }
  return pieces;
}

// out (d) of a row from its pieces first, first + step, ... before last, in that order.
void join_pieces(int64_t first, int64_t last, int64_t step, int64_t d, int64_t stride,
                 const float* sums, const float* peaks, const float* totals, float* out) {
  float most = peaks[first], total = 0.0f;
  for (int64_t i = first; i < last; i += step) most = std::max(most, peaks[i]);
  std::fill(out, out + d, 0.0f);
  for (int64_t i = first; i < last; i += step) {
    const float share = std::exp(peaks[i] - most);
    total += share * totals[i];
    for (int64_t k = 0; k < d; ++k) out[k] += share * sums[i * stride + k];
  }
  for (int64_t k = 0; k < d; ++k) out[k] /= total;
}

// ---- prefill ----

// Copies positions [begin, end) of one head, row after row.
template <class At>
void gather(const LayerCache& cache, int64_t begin, int64_t end, int64_t stride, const At& at,
            float* to) {
  for (int64_t p = begin; p < end;) {
    const int64_t count = std::min(cache.run(p), end - p);
    std::memcpy(to + (p - begin) * stride, at(p), count * stride * sizeof(float));
    p += count;
  }
}

// Scratch of a task of the prefill.
struct PrefillBuffers {
  std::vector<float> q, keys, values, panel, scores, sums, peaks, totals;

  void resize(int64_t rows, int64_t stride) {
    q.resize(rows * stride);
    keys.resize(kPrefillPiece * stride);
    values.resize(kPrefillPiece * stride);
    panel.resize(kPanel * stride);
    scores.resize(rows * kPrefillPiece);
    sums.assign(rows * stride, 0.0f);
    peaks.assign(rows, -INFINITY);
    totals.assign(rows, 0.0f);
  }
};

// scores (rows, kPrefillPiece) = q keys^T
void score(PrefillBuffers& own, int64_t rows, int64_t count, int64_t stride) {
  std::fill(own.scores.begin(), own.scores.end(), 0.0f);
  for (int64_t j = 0; j < count; j += kPanel) {
    const float* keys[kPanel];
    for (int64_t i = 0; i < kPanel; ++i) keys[i] = own.keys.data() + (j + i) * stride;
    pack_panel(keys, std::min(kPanel, count - j), stride, own.panel.data());
    multiply_add(rows, kPanel, stride, own.q.data(), stride, own.panel.data(), kPanel,
                 own.scores.data() + j, kPrefillPiece);
  }
}

// Takes scores[0, width) of a row, of which [low, high) are visible, into its peak and sums.
void soften(PrefillBuffers& own, int64_t r, int64_t low, int64_t high, int64_t width,
            int64_t stride) {
  float* row = own.scores.data() + r * kPrefillPiece;
  if (low >= high) return std::fill(row, row + width, 0.0f);
  const float before = own.peaks[r];
  const float now = std::max(before, peak_of(row + low, high - low));
  const float shrink = std::exp(before - now);
  std::fill(row, row + low, -INFINITY);
  std::fill(row + high, row + width, -INFINITY);
  own.totals[r] = own.totals[r] * shrink + exp_row(row, width, now);
  own.peaks[r] = now;
  float* sums = own.sums.data() + r * stride;
  for (int64_t i = 0; i < stride; ++i) sums[i] *= shrink;
}

// Tokens [from, to) of the step, all of one sequence.
struct Block {
  int64_t sequence, from, to;
};

std::vector<Block> blocks_of(const Step& step) {
  std::vector<Block> blocks;
  for (int64_t n = 0; n < step.sequences; ++n)
    for (int64_t from = step.starts[n]; from < step.starts[n + 1]; from += kQueryTokens)
      blocks.push_back({n, from, std::min<int64_t>(step.starts[n + 1], from + kQueryTokens)});
  return blocks;
}

// A block for the G heads of one kv head.
void attend_block(const Model& model, const Step& step, const LayerCache& cache, const float* q,
                  const Block& block, int64_t kv_head, float* out) {
  const auto [sequence, from, to] = block;
  const int64_t groups = model.groups(), stride = model.head_stride(), d = model.head_dim;
  const int64_t rows = (to - from) * groups;
  const int32_t* table = step.block_tables + sequence * step.table_width;
  thread_local PrefillBuffers own;
  own.resize(rows, stride);
  for (int64_t t = from; t < to; ++t)
    std::memcpy(own.q.data() + (t - from) * groups * stride,
                q + (t * model.heads + kv_head * groups) * stride,
                groups * stride * sizeof(float));
  const int64_t end = step.positions[to - 1] + 1;
  int64_t begin = first_visible(model, step.positions[from]);
  begin -= begin % kPrefillPiece;
  for (int64_t p = begin; p < end; p += kPrefillPiece) {
    const int64_t count = std::min(kPrefillPiece, end - p), width = round_up(count, kPanel);
    const auto key = [&](int64_t at) { return cache.key(table, kv_head, at); };
    const auto value = [&](int64_t at) { return cache.value(table, kv_head, at); };
    gather(cache, p, p + count, stride, key, own.keys.data());
    gather(cache, p, p + count, stride, value, own.values.data());
    score(own, rows, count, stride);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t position = step.positions[from + r / groups];
      soften(own, r, std::max<int64_t>(0, first_visible(model, position) - p),
             std::min(count, position + 1 - p), width, stride);
    }
    multiply_add(rows, stride, count, own.scores.data(), kPrefillPiece, own.values.data(), stride,
                 own.sums.data(), stride);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = from + r / groups, head = kv_head * groups + r % groups;
    for (int64_t i = 0; i < d; ++i)
      out[(token * model.heads + head) * d + i] = own.sums[r * stride + i] / own.totals[r];
  }
}

}  // namespace

void attend_decode(const Model& model, const Step& step, const LayerCache& cache, const float* q,
                   float* out) {
  const int64_t groups = model.groups(), stride = model.head_stride(), d = model.head_dim;
  const auto pieces = pieces_of(model, step);
  const int64_t count = pieces.size();
  std::vector<float> sums(count * groups * stride), peaks(count * groups), totals(count * groups);
  run_tasks(count, [&](int64_t i) {
    const Piece& piece = pieces[i];
    attend_piece(model, cache, step.block_tables + piece.sequence * step.table_width, piece,
                 q + (piece.sequence * model.heads + piece.kv_head * groups) * stride,
                 sums.data() + i * groups * stride, peaks.data() + i * groups,
                 totals.data() + i * groups);
  });
  std::vector<int64_t> firsts;  // pieces of a kv head of a sequence follow each other
  for (int64_t i = 0; i < count; ++i)
    if (i == 0 || pieces[i].sequence != pieces[i - 1].sequence ||
        pieces[i].kv_head != pieces[i - 1].kv_head)
      firsts.push_back(i);
  const int64_t rows = firsts.size();
  firsts.push_back(count);
  run_tasks(rows, [&](int64_t row) {
    const int64_t first = firsts[row], last = firsts[row + 1];
    const Piece& piece = pieces[first];
    float* to = out + (piece.sequence * model.heads + piece.kv_head * groups) * d;
    for (int64_t g = 0; g < groups; ++g)
      join_pieces(first * groups + g, last * groups + g, groups, d, stride, sums.data(),
                  peaks.data(), totals.data(), to + g * d);
  });
}

void attend_prefill(const Model& model, const Step& step, const LayerCache& cache, const float* q,
                    float* out) {
  const auto blocks = blocks_of(step);
  const int64_t count = blocks.size();
  // The last blocks see most: they come first, so that no thread ends on a long task alone.
  run_tasks(count * model.kv_heads, [&](int64_t task) {
    attend_block(model, step, cache, q, blocks[count - 1 - task / model.kv_heads],
                 task % model.kv_heads, out);
  });
}

}  // namespace decoder
