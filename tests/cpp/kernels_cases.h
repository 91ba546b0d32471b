// The cases that the routing and row kernels are tried on, and how.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <vector>

#include "tests/cpp/kernels_reference.h"
#include "tests/cpp/kernels_trial.h"

namespace epcomm::test {

// Everything in turn with everything, in one walk over the sizes.
inline std::vector<Case> make_cases(int largest) {
  std::vector<Case> cases;
  std::mt19937 rng(7);
  const int experts[] = {1, 7, 64, 256, 1000};
  unsigned i = 0;
  for (int tokens : {0, 1, 127, 128, 257, 1000, 4096})
    for (int topk : {1, 8, 32})
      for (int num_ranks : {1, 2, 3, 4, 8}) {
        ++i;
        if (tokens > largest) continue;
        auto pick = [&](std::initializer_list<int> of) { return of.begin()[rng() % of.size()]; };
        Case c{num_ranks, experts[(i + i / 5) % 5], topk, tokens};
        c.layout = static_cast<Layout>(1 + (i + i / 3) % 3);
        c.index_type = pick({0, 1}) ? IndexType::kInt64 : IndexType::kInt32;
        c.dtype = static_cast<Dtype>(pick({1, 2, 3}));
        c.chunks = pick({1, 1, 2, 3, 8});
        c.alignment = pick({1, 8, 128});
        const bool large = tokens > 257;
        c.row_bytes = large ? pick({16, 48}) : pick({16, 496, 512, 2064, 14336});
        c.scale_bytes = pick({0, 0, 1, 3, 4, 32, 52});
        c.combine_bytes = large ? pick({16, 32}) : pick({16, 112, 512, 2064, 4096});
        if (num_ranks * topk > 64) {
          c.row_bytes = std::min(c.row_bytes, 2064);
          c.combine_bytes = std::min(c.combine_bytes, 512);
        }
        c.num_sms = pick({0, 0, 1, 5, 10000});
        c.table = pick({0, 1}) != 0;
        c.weighted = pick({0, 1, 1}) != 0;
        c.bias = pick({0, 1}) != 0;
        c.exact = pick({0, 1}) != 0;
        c.bad_ids = pick({0, 0, 1}) != 0;
        c.graph = pick({0, 0, 1}) != 0;
        c.seed = i;
        // The padded layout of many experts and tokens is mostly holes.
        if (c.layout == Layout::kPadded &&
            int64_t{num_ranks} * c.num_experts * (tokens + 2) * (c.row_bytes + 64) > 100'000'000)
          c.layout = Layout::kExpert;
        c.in_place = c.layout == Layout::kToken && pick({0, 1}) != 0;
        c.by_token = !c.weighted && pick({0, 1}) != 0;
        cases.push_back(c);
      }
  Case many{40, 64, 8, 300};  // more ranks than a warp has lanes
  cases.push_back(many);
  many.layout = Layout::kExpert;
  many.chunks = 2;
  many.seed = 1;
  cases.push_back(many);
  return cases;
}

// Every kernel once, and every byte compared.
inline void run_case(Device& device, const Case& c) {
  device.reset();
  World world(c);
  Trial trial(device, world, true);
  trial.route();
  trial.check_route();
  trial.make_outputs();
  trial.pack();
  trial.check_pack();
  trial.place();
  trial.check_place("placed");
  trial.combine();
  trial.check_combine();
  trial.make_outputs();
  trial.place_gathered();
  trial.check_place("gathered");
  trial.combine_dense();
}

}  // namespace epcomm::test
