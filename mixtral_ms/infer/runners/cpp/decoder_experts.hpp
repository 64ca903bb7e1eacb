// The sparse mixture of experts of a layer.
#pragma once
#include "decoder.hpp"

namespace decoder {

// x (T, D) += the experts' output for normed (T, D), its rows ldn apart.
void add_experts(const Model& model, const Layer& layer, const Step& step, const float* normed,
                 int64_t ldn, float* x);

}  // namespace decoder
