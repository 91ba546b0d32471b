#include "core/vote.h"

#include <cstring>
#include <map>

#include "epcomm/error.h"

namespace epcomm {
namespace {

struct Ballot {
  char failure[400];
};

}  // namespace

std::vector<std::string> gather_failures(Bootstrap& bootstrap, const std::string& mine) {
  Ballot ballot{};
  std::strncpy(ballot.failure, mine.c_str(), sizeof ballot.failure - 1);
  std::vector<Ballot> all(static_cast<size_t>(bootstrap.size()));
  bootstrap.all_gather(&ballot, all.data(), sizeof ballot);
  std::vector<std::string> failures;
  for (const Ballot& b : all)
    failures.emplace_back(b.failure, ::strnlen(b.failure, sizeof b.failure));
  return failures;
}

void throw_failures(const std::string& step, const std::vector<std::string>& failures,
                    const std::string& advice) {
  std::map<std::string, std::string> ranks_of;
  for (size_t r = 0; r < failures.size(); ++r) {
    if (failures[r].empty()) continue;
    std::string& ranks = ranks_of[failures[r]];
    ranks += (ranks.empty() ? "" : ", ") + std::to_string(r);
  }
  if (ranks_of.empty()) return;
  std::string text = step + " failed";
  const char* separator = ": ";
  for (const auto& [failure, ranks] : ranks_of) {
    text += separator + ("on rank " + ranks) + ": " + failure;
    separator = "; ";
  }
  throw Error(text + "; " + advice);
}

}  // namespace epcomm
