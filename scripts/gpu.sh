#!/usr/bin/env bash
# Builds epcomm where GPUs are, runs the GPU tests, then the bench. Needs torch with CUDA, nvcc, cmake, ninja, pybind11,
# scikit-build-core and pytest; uses no network. Logs and results go to OUT (default build/gpu).
# TEST_K selects among the tests, as pytest -k does.
#   scripts/gpu.sh [build] [kernels] [tests] [nccl-modes] [sanitizer] [bench]      default: all of these
#   scripts/gpu.sh engines      tests/engines, with EPCOMM_TEST_ENGINES naming the folder that `make engines` filled
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
STEPS=${*:-build kernels tests nccl-modes sanitizer bench}
GPUS=$(nvidia-smi --list-gpus | wc -l)
PYTHON=${PYTHON:-python3}
# NVLink multicast can put GPUs that others share out of service when a process dies while using it.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 PYTHONUNBUFFERED=1
# Which conformance tests the other ways between GPUs run: all ranks, one 16-bit and one quantised format.
MODES_K=${MODES_K:-"nccl-$((GPUS < 4 ? GPUS : 4)) and (bf16 or fp8)"}
failed=()

# step NAME SECONDS COMMAND...: runs under a timeout, keeps the log, remembers a failure.
step() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  if timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1; then
    echo "$name: ok, $((SECONDS - start)) s"
  else
    echo "$name: FAILED ($?), $((SECONDS - start)) s"
    tail -n 40 "$OUT/$name.log"
    failed+=("$name")
  fi
}

bench() {
  local name=$1
  shift
  step "bench-$name" "${BENCH_TIMEOUT:-120}" "$PYTHON" -m torch.distributed.run --nproc-per-node "$GPUS" bench/all2all.py \
    --commit "${COMMIT:-$(git rev-parse --short HEAD)}" --json "$OUT/$name.jsonl" "$@"
  grep -v '^W' "$OUT/bench-$name.log" | tail -n 40
}

for wanted in $STEPS; do
  case $wanted in
    build) step build 300 "$PYTHON" -m pip install -q --no-build-isolation --no-deps . ;;
    kernels)
      step kernels-build 200 nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -I. -Iinclude -Icsrc \
        tests/cpp/kernels_gpu_test.cu csrc/kernels/*.cu csrc/core/{error,host_rows}.cc \
        -Xcompiler -ffp-contract=off -o build/kernels_gpu_test
      step kernels 120 build/kernels_gpu_test
      tail -n 1 "$OUT/kernels.log"
      ;;
    sanitizer)
      step memcheck-kernels 120 compute-sanitizer --tool memcheck --error-exitcode 9 build/kernels_gpu_test 128
      step memcheck-nvlink 150 compute-sanitizer --tool memcheck --report-api-errors no --target-processes all --error-exitcode 9 \
        "$PYTHON" -m pytest -q -m gpu tests/test_gpu_calls.py -k 'inputs_of_combine'
      step memcheck-nccl 150 compute-sanitizer --tool memcheck --report-api-errors no --target-processes all --error-exitcode 9 \
        "$PYTHON" -m pytest -q -m gpu tests/test_nccl.py -k 'test_way and static-grouped and token'
      tail -n 3 "$OUT/memcheck-nccl.log"
      ;;
    tests)
      step tests "${TEST_TIMEOUT:-300}" "$PYTHON" -m pytest -q -m gpu --ignore=tests/engines tests -k "${TEST_K:-test}" &&
        tail -n 3 "$OUT/tests.log"
      ;;
    engines) step engines 300 "$PYTHON" -m pytest -q -m gpu tests/engines && tail -n 3 "$OUT/engines.log" ;;
    nccl-modes)
      # Without peer access, and as two hosts that talk over sockets.
      NCCL_P2P_DISABLE=1 step tests-p2p-off 150 "$PYTHON" -m pytest -q -m gpu tests/test_conformance.py -k "$MODES_K"
      EPCOMM_TEST_HOSTS=2 NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_NET=Socket NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 \
        step tests-two-hosts 150 "$PYTHON" -m pytest -q -m gpu tests/test_conformance.py -k "$MODES_K"
      tail -n 1 "$OUT/tests-p2p-off.log" "$OUT/tests-two-hosts.log"
      ;;
    bench)
      bench nvlink --transport nvlink --adapter epcomm,torch,deep_ep
      bench nvlink-fp8 --transport nvlink --adapter epcomm,deep_ep --dtype fp8 --tokens 128,4096
      bench nvlink-sms --transport nvlink --adapter epcomm --tokens 4096 --num-sms 4,8,12,16,24,32
      bench nvlink-graph --transport nvlink --adapter epcomm,torch --graph --tokens 1,8,32,64,128,256
      bench nccl --transport nccl --adapter epcomm,torch,deep_ep
      bench nccl-graph --transport nccl --adapter epcomm,torch --graph --tokens 1,8,32,64,128,256
      NCCL_P2P_DISABLE=1 bench nccl-p2p-off --transport nccl --adapter epcomm,torch --tokens 128,4096
      ;;
    *) echo "unknown step $wanted"; failed+=("$wanted") ;;
  esac
done

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sort | uniq -c >"$OUT/gpus.txt"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
