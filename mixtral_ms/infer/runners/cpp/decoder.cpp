// One step of generation: embedding, layers, final norm, and the head for the tokens asked for.
//
// Legend: as decoder.hpp.
#include "decoder.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "decoder_attention.hpp"
#include "decoder_experts.hpp"
#include "decoder_linear.hpp"
#include "decoder_pool.hpp"

namespace decoder {
namespace {

constexpr int64_t kRowsPerTask = 8;  // of work that is done token by token

template <class Body>
void for_tokens(int64_t tokens, const Body& body) {
  run_tasks((tokens + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    const int64_t end = std::min(tokens, (task + 1) * kRowsPerTask);
    for (int64_t t = task * kRowsPerTask; t < end; ++t) body(t);
  });
}

// out = x / rms(x) * weight (arXiv 1910.07467)
void rms_norm(const float* x, const float* weight, int64_t count, double eps, float* out) {
  Vec squares{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  if (i < count) {
    const Vec rest = load_some(x + i, count - i);
    squares = fma(rest, rest, squares);
  }
  const float mean = reduce(squares) / static_cast<float>(count);
  const float inverse = 1.0f / std::sqrt(mean + static_cast<float>(eps));
  for (i = 0; i < count; ++i) out[i] = x[i] * inverse * weight[i];
}

// Activations of a step and of the layer at hand.
struct Activations {
  int64_t ldn;      // between rows of normed: whole cache lines
  Buffer x;         // (T, D)
  Buffer normed;    // (T, ldn)
  Buffer projected; // (T, (H + 2 K) d): q, k and v side by side
  Buffer q;         // (T, H head_stride): rotated, scaled, zeros behind head_dim
  Buffer attended;  // (T, H d)
  Buffer panels;    // of normed or attended
  Buffer cos, sin;  // (T, d / 2)

  Activations(const Model& m, int64_t tokens)
      : ldn(round_up(m.hidden, 16)),
        x(tokens * m.hidden),
        normed(tokens * ldn),
        projected(tokens * (m.heads + 2 * m.kv_heads) * m.head_dim),
        q(tokens * m.heads * m.head_stride()),
        attended(tokens * m.heads * m.head_dim),
        panels(round_up(tokens, kPanel) * std::max(m.hidden, m.heads * m.head_dim)),
        cos(tokens * m.head_dim / 2),
        sin(tokens * m.head_dim / 2) {}
};

// Angles of the rotary embedding, float32 products as kernels/elementwise.py has them.
void rotary_angles(const Model& model, const Step& step, Activations& own) {
  const int64_t half = model.head_dim / 2;
  std::vector<float> inverse(half);
  for (int64_t i = 0; i < half; ++i)
    inverse[i] = 1.0f / std::pow(static_cast<float>(model.theta),
                                 static_cast<float>(2 * i) / static_cast<float>(model.head_dim));
  for_tokens(step.tokens, [&](int64_t t) {
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(step.positions[t]) * inverse[i];
      own.cos.get()[t * half + i] = std::cos(angle);
      own.sin.get()[t * half + i] = std::sin(angle);
    }
  });
}

void rotate(const float* from, const float* cos, const float* sin, int64_t half, float scale,
            float* to) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = from[i], b = from[i + half];
    to[i] = (a * cos[i] - b * sin[i]) * scale;
    to[i + half] = (b * cos[i] + a * sin[i]) * scale;
  }
}

void project(const Model& model, const Layer& layer, const Step& step, Activations& own) {
  const int64_t width = (model.heads + 2 * model.kv_heads) * model.head_dim;
  struct Piece {
    const Matrix* weight;
    int64_t begin, column;
  };
  std::vector<Piece> pieces;
  const Rows normed = prepare(own.normed.get(), own.ldn, step.tokens, model.hidden,
                              sum_of(step), own.panels.get());
  const int64_t some = rows_per_task(layer.wq, normed.sum);
  int64_t column = 0;
  for (const Matrix* weight : {&layer.wq, &layer.wk, &layer.wv}) {
    for (int64_t r = 0; r < weight->rows; r += some) pieces.push_back({weight, r, column + r});
    column += weight->rows;
  }
  run_tasks(pieces.size(), [&](int64_t i) {
    const auto [weight, begin, to] = pieces[i];
    product(*weight, begin, std::min(weight->rows, begin + some), normed,
            own.projected.get() + to, width);
  });
}

// Rotates q and k; q is scaled by 1 / sqrt(d), k and v go into the cache.
void rotate_and_store(const Model& model, const Step& step, const LayerCache& cache,
                      Activations& own) {
  const int64_t d = model.head_dim, half = d / 2, stride = model.head_stride();
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  for_tokens(step.tokens, [&](int64_t t) {
    const float *cos = own.cos.get() + t * half, *sin = own.sin.get() + t * half;
    const float* from = own.projected.get() + t * (model.heads + 2 * model.kv_heads) * d;
    float* q = own.q.get() + t * model.heads * stride;
    for (int64_t h = 0; h < model.heads; ++h) {
      rotate(from + h * d, cos, sin, half, scale, q + h * stride);
      std::fill(q + h * stride + d, q + (h + 1) * stride, 0.0f);
    }
    const float *k = from + model.heads * d, *v = k + model.kv_heads * d;
    const int32_t* table = step.block_tables + step.sequence_of(t) * step.table_width;
    for (int64_t h = 0; h < model.kv_heads; ++h) {
      rotate(k + h * d, cos, sin, half, 1.0f, cache.key(table, h, step.positions[t]));
      std::copy_n(v + h * d, d, cache.value(table, h, step.positions[t]));
    }
  });
}

// x += attended wo^T
void add_attention(const Model& model, const Layer& layer, const Step& step, Activations& own) {
  const int64_t D = model.hidden, width = model.heads * model.head_dim;
  const Rows attended = prepare(own.attended.get(), width, step.tokens, width,
                                sum_of(step), own.panels.get());
  const int64_t some = rows_per_task(layer.wo, attended.sum);
  run_tasks((D + some - 1) / some, [&](int64_t task) {
    const int64_t begin = task * some, count = std::min(D - begin, some);
    thread_local std::vector<float> out;
    out.resize(step.tokens * count);
    product(layer.wo, begin, begin + count, attended, out.data(), count);
    for (int64_t t = 0; t < step.tokens; ++t)
      for (int64_t i = 0; i < count; ++i)
        own.x.get()[t * D + begin + i] += out[t * count + i];
  });
}

void norm_all(const Model& model, const Step& step, const float* weight, Activations& own) {
  for_tokens(step.tokens, [&](int64_t t) {
    rms_norm(own.x.get() + t * model.hidden, weight, model.hidden, model.eps,
             own.normed.get() + t * own.ldn);
  });
}

// Logits are summed in one way, however many tokens of a chunk ask for them.
void head(const Model& model, const Step& step, Activations& own) {
  for (int64_t r = 0; r < step.logit_tokens; ++r)
    rms_norm(own.x.get() + step.with_logits[r] * model.hidden, model.final_norm, model.hidden, model.eps,
             own.normed.get() + r * own.ldn);
  const Rows normed{own.normed.get(), own.ldn, step.logit_tokens, Sum::kFewRows};
  const int64_t V = model.vocabulary, some = rows_per_task(model.head, normed.sum);
  run_tasks((V + some - 1) / some, [&](int64_t task) {
    const int64_t begin = task * some;
    product(model.head, begin, std::min(V, begin + some), normed, step.logits + begin, V);
  });
}

void run_step(const Model& model, const Step& step) {
  Activations own(model, std::max(step.tokens, step.logit_tokens));
  const auto* embedding = static_cast<const float*>(model.embedding.data);
  for (int64_t t = 0; t < step.tokens; ++t)
    std::copy_n(embedding + step.token_ids[t] * model.hidden, model.hidden,
                own.x.get() + t * model.hidden);
  rotary_angles(model, step, own);
  for (int64_t l = 0; l < model.layers; ++l) {
    const Layer& layer = model.layer[l];
    const LayerCache cache(model, l);
    norm_all(model, step, layer.attention_norm, own);
    project(model, layer, step, own);
    rotate_and_store(model, step, cache, own);
    const auto attend = step.decodes() ? attend_decode : attend_prefill;
    attend(model, step, cache, own.q.get(), own.attended.get());
    add_attention(model, layer, step, own);
    norm_all(model, step, layer.ffn_norm, own);
    add_experts(model, layer, step, own.normed.get(), own.ldn, own.x.get());
  }
  if (step.logit_tokens > 0) head(model, step, own);
}

}  // namespace
}  // namespace decoder

extern "C" {

// Sizes of the structures, for decoder_library.py to compare with its own.
void decoder_layout(int64_t* sizes) {
  sizes[0] = sizeof(decoder::Matrix);
  sizes[1] = sizeof(decoder::Layer);
  sizes[2] = sizeof(decoder::Model);
  sizes[3] = sizeof(decoder::Step);
}

// Chunks of so many tokens may share a step; a shorter one has its own.
int64_t decoder_shared_from() { return decoder::kManyRowsFrom; }

void decoder_step(const decoder::Model* model, const decoder::Step* step) {
  decoder::run_step(*model, *step);
}

}  // extern "C"
