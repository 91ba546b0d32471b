#!/usr/bin/env bash
# Formatting, linters, types and layering; `make lint` runs it with the pinned tools in PATH.
# --fix rewrites what can be rewritten and checks nothing.
set -u
cd "$(dirname "$0")/.." || exit 1

mapfile -t cpp < <(find include csrc tests/cpp tests/sim -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' | sort)

if [ "${1:-}" = --fix ]; then
  clang-format -i "${cpp[@]}" && ruff check --fix . && ruff format .
  exit
fi

failed=()
step() {
  local name=$1
  shift
  echo "== $name"
  "$@" || failed+=("$name")
}

step clang-format clang-format --dry-run -Werror "${cpp[@]}"
step 'ruff check' ruff check .
step 'ruff format' ruff format --check .
step mypy mypy
step 'layering, self-test' python tools/check_includes.py --self-test
step layering python tools/check_includes.py

if [ ${#failed[@]} -gt 0 ]; then
  printf 'lint failed: %s\n' "${failed[@]}"
  exit 1
fi
echo 'lint passed'
