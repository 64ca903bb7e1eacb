// What decoder_library.py hands over: the network's sizes and weights, its cache, and one step.
//
// Legend: D hidden, H heads, K kv heads, d head_dim, E experts, F intermediate, V vocabulary,
// N sequences, T tokens of the step, M blocks of a table, R tokens with logits.
#pragma once
#include "decoder_vec.hpp"

#include <algorithm>
#include <new>

namespace decoder {

// Floats that start on a cache line, without the cost of zeroing.
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<float*>(::operator new(count * sizeof(float), kLine))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, kLine); }
  float* get() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  float* data_;
};

enum WeightType : int64_t { kFloat32 = 0, kFloat16 = 1, kInt8 = 2 };

// A weight (rows, cols), row-major, or E of them one after another. What it means is
// data * scale + bias, both one value a row, and both may be null.
struct Matrix {
  const void* data;
  const float *scale, *bias;
  int64_t rows, cols, type;

  Matrix of_expert(int64_t e) const {
    const int64_t bytes = type == kFloat32 ? 4 : type == kFloat16 ? 2 : 1;
    Matrix one = *this;
    one.data = static_cast<const char*>(data) + e * rows * cols * bytes;
    if (scale != nullptr) one.scale = scale + e * rows;
    return one;
  }
};

// Weights in the order of config/derived/parameter_table.py, here and in Model.
struct Layer {
  const float* attention_norm;  // (D)
  Matrix wq, wk, wv, wo;
  const float* ffn_norm;  // (D)
  Matrix router;          // (E, D) float32
  Matrix w1, w2, w3;      // of E experts: (F, D), (D, F), (F, D)
};

struct Model {
  int64_t hidden, heads, kv_heads, head_dim, intermediate, experts, top_k, vocabulary, layers;
  int64_t window;  // 0: none
  int64_t normalise_gates, uniform_routing;
  int64_t num_blocks, block_size;
  double theta, eps;
  Matrix embedding;         // (V, D) float32
  const float* final_norm;  // (D)
  Matrix head;              // (V, D)
  const Layer* layer;       // one each
  float* cache;             // (layers, 2, num_blocks, K, block_size, head_stride)

  int64_t head_stride() const { return round_up(head_dim, 16); }  // zeros behind head_dim
  int64_t groups() const { return heads / kv_heads; }
};

struct Step {
  int64_t sequences, tokens, table_width, logit_tokens;  // N, T, M, R
  const int32_t *token_ids, *positions;  // (T)
  const int32_t* starts;                 // (N + 1): sequence n has tokens starts[n] : starts[n + 1]
  const int32_t* block_tables;           // (N, M)
  const int32_t* with_logits;            // (R)
  float* logits;                         // (R, V)

  bool decodes() const { return tokens == sequences; }  // one token of each
  int64_t sequence_of(int64_t token) const {
    return std::upper_bound(starts, starts + sequences, token) - starts - 1;
  }
};

}  // namespace decoder
