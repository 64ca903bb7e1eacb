// Legend: T tokens, D hidden, E experts, k experts a token, F intermediate, P = T k assignments.
#include "decoder_experts.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "decoder_linear.hpp"
#include "decoder_pool.hpp"

namespace decoder {
namespace {

constexpr float kGateEps = 1e-9f;      // as model/router.py
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
    product(layer.router, 0, experts, normed + from * ldn, ldn, n, logits.data(), experts,
            Sum::kFewRows);
    for (int64_t t = 0; t < n; ++t)
      choose(model, logits.data() + t * experts, step.positions[from + t], from + t,
             all.data() + (from + t) * k);
  });
  std::stable_sort(all.begin(), all.end(), [](const Assignment& a, const Assignment& b) {
    return a.expert < b.expert;
  });
  return all;
}

// Assignments [begin, begin + rows) go to one expert.
struct Group {
  int64_t expert, begin, rows;
};

std::vector<Group> groups_of(const std::vector<Assignment>& assignments) {
  std::vector<Group> groups;
  for (int64_t p = 0; p < static_cast<int64_t>(assignments.size()); ++p) {
    if (groups.empty() || groups.back().expert != assignments[p].expert)
      groups.push_back({assignments[p].expert, p, 0});
    ++groups.back().rows;
  }
  return groups;
}

// gate becomes silu(gate) * up; both have room up to a multiple of eight.
void swiglu(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec g = load(gate + i);
    store(gate + i, g / (exp(-g) + 1.0f) * load(up + i));
  }
}

// hidden (rows, F), columns [begin, end) = silu(x w1^T) * (x w3^T)
void gate_and_up(const Matrix& w1, const Matrix& w3, int64_t begin, int64_t end, const float* x,
                 int64_t ldx, int64_t rows, float* hidden, int64_t ldh, Sum sum) {
  const int64_t count = end - begin, ld = round_up(count, kLanes);
  thread_local std::vector<float> gate, up;
  gate.assign(rows * ld, 0.0f);
  up.assign(rows * ld, 0.0f);
  product(w1, begin, end, x, ldx, rows, gate.data(), ld, sum);
  product(w3, begin, end, x, ldx, rows, up.data(), ld, sum);
  swiglu(gate.data(), up.data(), rows * ld);
  for (int64_t r = 0; r < rows; ++r)
    std::copy_n(gate.data() + r * ld, count, hidden + r * ldh + begin);
}

// One piece of a weight's rows, of one expert.
struct Task {
  const Group* group;
  int64_t begin, end;
};

std::vector<Task> gate_tasks(const std::vector<Group>& groups, const Matrix& w1,
                             const Step& step) {
  std::vector<Task> tasks;
  for (const Group& group : groups) {
    const int64_t some = rows_per_task(w1, sum_of(step, group.rows));
    for (int64_t r = 0; r < w1.rows; r += some)
      tasks.push_back({&group, r, std::min(w1.rows, r + some)});
  }
  return tasks;
}

}  // namespace

void add_experts(const Model& model, const Layer& layer, const Step& step, const float* normed,
                 int64_t ldn, float* x) {
  const int64_t D = model.hidden, F = model.intermediate, ldh = round_up(F, 16);
  const auto assignments = route(model, layer, step, normed, ldn);
  const auto groups = groups_of(assignments);
  const int64_t P = assignments.size();
  const Buffer rows(P * ldn), hidden(P * ldh);
  for (int64_t p = 0; p < P; ++p)
    std::copy_n(normed + assignments[p].token * ldn, D, rows.get() + p * ldn);
  const auto tasks = gate_tasks(groups, layer.w1, step);
  run_tasks(tasks.size(), [&](int64_t i) {
    const auto [group, begin, end] = tasks[i];
    gate_and_up(layer.w1.of_expert(group->expert), layer.w3.of_expert(group->expert), begin, end,
                rows.get() + group->begin * ldn, ldn, group->rows,
                hidden.get() + group->begin * ldh, ldh, sum_of(step, group->rows));
  });
  // A task owns its columns of x and adds the experts to them in their order.
  const int64_t some = rows_per_task(layer.w2, sum_of(step, P));
  run_tasks((D + some - 1) / some, [&](int64_t task) {
    const int64_t begin = task * some, count = std::min(D - begin, some);
    thread_local std::vector<float> out;
    for (const Group& group : groups) {
      out.resize(group.rows * count);
      product(layer.w2.of_expert(group.expert), begin, begin + count,
              hidden.get() + group.begin * ldh, ldh, group.rows, out.data(), count,
              sum_of(step, group.rows));
      for (int64_t r = 0; r < group.rows; ++r) {
        const Assignment& one = assignments[group.begin + r];
        float* to = x + one.token * D + begin;
        for (int64_t i = 0; i < count; ++i) to[i] += one.gate * out[r * count + i];
      }
    }
  });
}

}  // namespace decoder
