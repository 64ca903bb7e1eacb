// Legend: T tokens, D hidden, E experts, k experts a token, F intermediate, P = T k assignments;
// C columns of a task.
#include "decoder_experts.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "decoder_linear.hpp"
#include "decoder_pool.hpp"

namespace decoder {
namespace {

constexpr float kGateEps = 1e-9f;      // as model/moe/router_policy.py
constexpr int64_t kRouterTokens = 16;  // of a task

struct Assignment {
  int32_t expert, token;
  float gate;
};

// The k experts of a token from its E logits, which become probabilities.
void choose(const Model& model, float* logits, int64_t position, int32_t token,
            Assignment* chosen) {
  const int64_t experts = model.experts, k = model.top_k;
  float most = logits[0], sum = 0.0f;
  for (int64_t e = 1; e < experts; ++e) most = std::max(most, logits[e]);
  for (int64_t e = 0; e < experts; ++e) sum += logits[e] = std::exp(logits[e] - most);
  for (int64_t e = 0; e < experts; ++e) logits[e] /= sum;
  float total = 0.0f;
  for (int64_t j = 0; j < k; ++j) {
    // The first of equals wins; with NaN, which is never larger, still k different experts.
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      const auto is_e = [&](const Assignment& one) { return one.expert == e; };
      if (std::none_of(chosen, chosen + j, is_e) && (best < 0 || logits[e] > logits[best]))
        best = e;
    }
    if (model.uniform_routing) best = (position * k + j) % experts;
    chosen[j] = {static_cast<int32_t>(best), token, logits[best]};
    total += logits[best];
  }
  if (model.normalise_gates)
    for (int64_t j = 0; j < k; ++j) chosen[j].gate /= total + kGateEps;
}

// All P assignments, by expert and within an expert by token.
std::vector<Assignment> route(const Model& model, const Layer& layer, const Step& step,
                              const float* normed, int64_t ldn) {
  const int64_t tokens = step.tokens, experts = model.experts, k = model.top_k;
  std::vector<Assignment> all(tokens * k);
  run_tasks((tokens + kRouterTokens - 1) / kRouterTokens, [&](int64_t task) {
    const int64_t from = task * kRouterTokens, n = std::min(kRouterTokens, tokens - from);
    std::vector<float> logits(n * experts);
    product(layer.router, 0, experts, {normed + from * ldn, ldn, n, Sum::kFewRows},
            logits.data(), experts);
    for (int64_t t = 0; t < n; ++t)
      choose(model, logits.data() + t * experts, step.positions[from + t], from + t,
             all.data() + (from + t) * k);
  });
  std::stable_sort(all.begin(), all.end(), [](const Assignment& a, const Assignment& b) {
    return a.expert < b.expert;
  });
  return all;
}

// Assignments [begin, begin + tokens) go to one expert. Its activations start at `slot` of their
// buffers and take whole panels.
struct Group {
  int64_t expert, begin, tokens, slot;
};

std::vector<Group> groups_of(const std::vector<Assignment>& assignments) {
  std::vector<Group> groups;
  for (int64_t p = 0; p < static_cast<int64_t>(assignments.size()); ++p) {
    if (groups.empty() || groups.back().expert != assignments[p].expert)
      groups.push_back({assignments[p].expert, p, 0, 0});
    ++groups.back().tokens;
  }
  int64_t slot = 0;
  for (Group& group : groups) {
    group.slot = slot;
    slot += round_up(group.tokens, kPanel);
  }
  return groups;
}

// A piece of a group's activations or of its expert's weights.
struct Piece {
  const Group* group;
  int64_t begin, end;
};

// Pieces [0, size(group)) of every group, `some` long.
template <class Size>
std::vector<Piece> cut(const std::vector<Group>& groups, int64_t some, const Size& size) {
  std::vector<Piece> pieces;
  for (const Group& group : groups)
    for (int64_t i = 0; i < size(group); i += some)
      pieces.push_back({&group, i, std::min(size(group), i + some)});
  return pieces;
}

// The rows of `normed` that each group takes, as its products want them.
void gather(const std::vector<Group>& groups, const std::vector<Assignment>& assignments,
            const float* normed, int64_t ldn, int64_t D, Sum sum, float* to) {
  const auto pieces = cut(groups, kPanel, [](const Group& one) { return one.tokens; });
  run_tasks(pieces.size(), [&](int64_t i) {
    const auto [group, begin, end] = pieces[i];
    const float* rows[kPanel];
    for (int64_t r = begin; r < end; ++r)
      rows[r - begin] = normed + assignments[group->begin + r].token * ldn;
    float* own = to + (group->slot + begin) * D;
    if (sum == Sum::kManyRows) return pack_panel(rows, end - begin, D, own);
    for (int64_t r = begin; r < end; ++r) std::copy_n(rows[r - begin], D, own + (r - begin) * D);
  });
}

// gate becomes silu(gate) * up; both have room up to a multiple of eight.
void swiglu(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec g = load(gate + i);
    store(gate + i, g / (exp(-g) + 1.0f) * load(up + i));
  }
}

// hidden (n, F), as x is, columns [begin, end) = silu(x w1^T) * (x w3^T)
void gate_and_up(const Matrix& w1, const Matrix& w3, int64_t begin, int64_t end, const Rows& x,
                 float* hidden) {
  const int64_t C = end - begin, F = w1.rows;
  const int64_t room = round_up(x.count, kPanel) * C;
  thread_local std::vector<float> gate, up;
  gate.resize(room);
  up.resize(room);
  if (x.sum == Sum::kManyRows) {
    product_panels(w1, begin, end, x, gate.data());
    product_panels(w3, begin, end, x, up.data());
    swiglu(gate.data(), up.data(), room);
    for (int64_t t = 0; t < x.count; t += kPanel)
      std::copy_n(gate.data() + t * C, kPanel * C, hidden + t * F + begin * kPanel);
    return;
  }
  product(w1, begin, end, x, gate.data(), C);
  product(w3, begin, end, x, up.data(), C);
  swiglu(gate.data(), up.data(), x.count * C);
  for (int64_t r = 0; r < x.count; ++r)
    std::copy_n(gate.data() + r * C, C, hidden + r * F + begin);
}

}  // namespace

void add_experts(const Model& model, const Layer& layer, const Step& step, const float* normed,
                 int64_t ldn, float* x) {
  const int64_t D = model.hidden, F = model.intermediate;
  const auto assignments = route(model, layer, step, normed, ldn);
  const auto groups = groups_of(assignments);
  const Sum sum = sum_of(step);
  const int64_t slots = groups.back().slot + round_up(groups.back().tokens, kPanel);
  const Buffer inputs(slots * D), hidden(slots * F);
  gather(groups, assignments, normed, ldn, D, sum, inputs.get());
  const auto pieces = cut(groups, rows_per_task(layer.w1, sum), [&](const Group&) { return F; });
  run_tasks(pieces.size(), [&](int64_t i) {
    const auto [group, begin, end] = pieces[i];
    gate_and_up(layer.w1.of_expert(group->expert), layer.w3.of_expert(group->expert), begin, end,
                {inputs.get() + group->slot * D, D, group->tokens, sum},
                hidden.get() + group->slot * F);
  });
  // A task owns its columns of x and adds the experts to them in their order.
  const int64_t some = rows_per_task(layer.w2, sum);
  run_tasks((D + some - 1) / some, [&](int64_t task) {
    const int64_t begin = task * some, C = std::min(D - begin, some);
    thread_local std::vector<float> out;
    for (const Group& group : groups) {
      out.resize(group.tokens * C);
      product(layer.w2.of_expert(group.expert), begin, begin + C,
              {hidden.get() + group.slot * F, F, group.tokens, sum}, out.data(), C);
      for (int64_t r = 0; r < group.tokens; ++r) {
        const Assignment& one = assignments[group.begin + r];
        float* to = x + one.token * D + begin;
        for (int64_t i = 0; i < C; ++i) to[i] += one.gate * out[r * C + i];
      }
    }
  });
}

}  // namespace decoder
