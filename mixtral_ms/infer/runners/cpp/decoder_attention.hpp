// Attention over the paged cache of keys and values.
#pragma once
#include "decoder.hpp"

namespace decoder {

// Where a sequence's keys and values of one layer lie.
class LayerCache {
 public:
  LayerCache(const Model& model, int64_t layer)
      : block_size_(model.block_size),
        stride_(model.head_stride()),
        of_head_(stride_ * block_size_),
        of_block_(of_head_ * model.kv_heads),
        keys_(model.cache + layer * 2 * model.num_blocks * of_block_),
        values_(keys_ + model.num_blocks * of_block_) {}

  // Positions from `position` on that lie one after another.
  int64_t run(int64_t position) const { return block_size_ - position % block_size_; }
  float* key(const int32_t* table, int64_t head, int64_t position) const {
    return keys_ + offset(table, head, position);
  }
  float* value(const int32_t* table, int64_t head, int64_t position) const {
    return values_ + offset(table, head, position);
  }

 private:
  int64_t offset(const int32_t* table, int64_t head, int64_t position) const {
    return table[position / block_size_] * of_block_ + head * of_head_ +
           position % block_size_ * stride_;
  }

  const int64_t block_size_, stride_, of_head_, of_block_;
  float *const keys_, *const values_;
};

// One token of each sequence: q (N, H head_stride), rotated and scaled, becomes out (N, H d).
void attend_decode(const Model& model, const Step& step, const LayerCache& cache, const float* q,
                   float* out);

// Any number of tokens of each sequence; shapes as above with T for N.
void attend_prefill(const Model& model, const Step& step, const LayerCache& cache, const float* q,
                    float* out);

}  // namespace decoder
