// Agreement of all ranks on how a step of set-up went.
#pragma once

#include <exception>
#include <string>
#include <vector>

#include "epcomm/bootstrap.h"

namespace epcomm {

/// Collective. What failed on each rank, by rank, the same on all; empty = it succeeded there.
/// Texts are cut at some 400 characters.
std::vector<std::string> gather_failures(Bootstrap& bootstrap, const std::string& mine);

/// Throws Error if any rank failed: the same text on all ranks, with every rank's reason (ranks of
/// one reason together), then advice.
void throw_failures(const std::string& step, const std::vector<std::string>& failures,
                    const std::string& advice);

/// Runs body, which may throw, and gathers how it went on all ranks.
template <class Body>
std::vector<std::string> failures_of(Bootstrap& bootstrap, Body&& body) {
  std::string mine;
  try {
    body();
  } catch (const std::exception& e) {
    mine = *e.what() == 0 ? "unknown error" : e.what();
  }
  return gather_failures(bootstrap, mine);
}

}  // namespace epcomm
