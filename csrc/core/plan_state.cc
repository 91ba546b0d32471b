#include "core/plan_state.h"

#include <string>
#include <type_traits>

#include "epcomm/error.h"

namespace epcomm {
namespace {

// Visits the numbers of a plan in the order of the state. The bindings name every member, so that
// a plan that gets another one does not compile until it is said here what becomes of it.
template <class PlanType, class Visit>
void visit_numbers(PlanType& plan, Visit visit) {
  auto& [buffer_id, attached, layout, expert_alignment, num_tokens, topk, host_sync, view, result] =
      plan;
  (void)attached, (void)view;  // the memory, which is not the plan's
  auto& [epoch, num_recv_tokens, num_recv_rows, tokens_per_expert, chunk_count, deferred, topk_idx,
         index_type, unsettled] = result;
  (void)deferred, (void)topk_idx, (void)index_type,
      (void)unsettled;  // of the first dispatch only, which has filled the send block
  visit(buffer_id);
  visit(layout);
  visit(expert_alignment);
  visit(num_tokens);
  visit(topk);
  visit(host_sync);
  visit(epoch);
  visit(num_recv_tokens);
  visit(num_recv_rows);
  visit(tokens_per_expert);
  visit(chunk_count);
}

template <class T>
constexpr bool is_vector = std::is_same_v<std::remove_const_t<T>, std::vector<int32_t>>;

}  // namespace

std::vector<int64_t> Plan::state() const {
  std::vector<int64_t> state;
  visit_numbers(*this, [&state]<class T>(T& number) {
    if constexpr (is_vector<T>) {
      state.push_back(static_cast<int64_t>(number.size()));
      state.insert(state.end(), number.begin(), number.end());
    } else {
      state.push_back(static_cast<int64_t>(number));
    }
  });
  return state;
}

Plan plan_from_state(const std::vector<int64_t>& state) {
  Plan plan;
  size_t at = 0;
  auto next = [&] {
    EPCOMM_CHECK(at < state.size(), "state is not that of a plan: it ends after " +
                                        std::to_string(state.size()) + " numbers");
    return state[at++];
  };
  auto read = [&]<class T>(T& number) {
    const int64_t value = next();
    number = static_cast<T>(value);
    EPCOMM_CHECK(static_cast<int64_t>(number) == value, "state is not that of a plan: number " +
                                                            std::to_string(at - 1) + " is " +
                                                            std::to_string(value));
  };
  visit_numbers(plan, [&]<class T>(T& number) {
    if constexpr (is_vector<T>) {
      const int64_t count = next();
      EPCOMM_CHECK(count >= 0 && static_cast<uint64_t>(count) <= state.size() - at,
                   "state is not that of a plan: it has a list of " + std::to_string(count) +
                       " numbers where " + std::to_string(state.size() - at) + " are left");
      number.resize(static_cast<size_t>(count));
      for (int32_t& one : number) read(one);
    } else {
      read(number);
    }
  });
  EPCOMM_CHECK(at == state.size(), "state is not that of a plan: it has " +
                                       std::to_string(state.size()) + " numbers instead of " +
                                       std::to_string(at));
  return plan;
}

}  // namespace epcomm
