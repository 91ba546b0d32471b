#!/usr/bin/env bash
# Builds epcomm where GPUs are, runs the GPU tests, then the bench. Needs torch with CUDA, nvcc, cmake, ninja, pybind11,
# scikit-build-core and pytest; uses no network. Logs and results go to OUT (default build/gpu).
#   scripts/gpu.sh [build] [kernels] [tests] [nccl-modes] [sanitizer] [bench]      default: all of these
#   scripts/gpu.sh soak         tests of many calls, with their full numbers
#   scripts/gpu.sh rdma         builds softnic, then the tests of rdma over NVSHMEM's peer path and over softnic; RDMA_K selects as TEST_K
#   scripts/gpu.sh together     tests of small batches and rdma, and random calls of hierarchical, with up to 4 ranks, two on a GPU, all at the same time under MPS: minutes
#                               instead of an hour. Not those of the next two steps, nor what is of nccl alone
#   scripts/gpu.sh alone        tests that start processes of their own, count kernels, or need a GPU's memory or a GPU to each rank
#   scripts/gpu.sh lost         tests that kill and stop ranks
#   scripts/gpu.sh engines      tests/engines over nvlink, with build/engines.tar.xz of `make engines-bundle`, or with EPCOMM_TEST_ENGINES naming
#                               the folder that `make engines` filled; TEST_K selects
# TEST_K selects among the tests, as pytest -k does; EPCOMM_TEST_RANKS=5,6,7,8 the conformance tests of so many ranks.
# BENCH_K selects among the runs of the bench by name, as grep -E does: BENCH_K='bf16|small'. SMS: the sweeps' values.
# EPCOMM_TEST_RANKS_PER_GPU=4 tests with four ranks on each GPU, under MPS if it is installed; the bench still has one rank per GPU.
# LIMIT: seconds for everything; what does not fit is cut short or left out, and counts as failed.
# DeepEP is measured beside epcomm where Python finds it (PYTHONPATH).
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
STEPS=${*:-build kernels tests nccl-modes sanitizer bench}
GPUS=$(nvidia-smi --list-gpus | wc -l)
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-86400}
SMS=${SMS:-4,8,12,16,24,32}
# NVLink multicast can put GPUs that others share out of service when a process dies while using it.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 PYTHONUNBUFFERED=1
# DeepEP's wheel needs the library of the NVSHMEM wheel, which lies beside it or with the other packages.
for folder in $(tr : " " <<<"${PYTHONPATH:-}") $("$PYTHON" -c 'import site; print(*site.getsitepackages())'); do
  if [ -d "$folder/nvidia/nvshmem/lib" ]; then
    export LD_LIBRARY_PATH=$folder/nvidia/nvshmem/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  fi
done
RANKS_PER_GPU=${EPCOMM_TEST_RANKS_PER_GPU:-1}
RANKS=$((GPUS * RANKS_PER_GPU < 4 ? GPUS * RANKS_PER_GPU : 4))
# Which conformance tests the other ways between GPUs run: all ranks, one 16-bit and one quantised format.
MODES_K=${MODES_K:-"nccl-$RANKS and (bf16 or fp8)"}
failed=()

# Ranks of one GPU run side by side under MPS, each on at most its share of the SMs: kernels of ranks that wait for each other must all be
# on the GPU at once. Without MPS they take turns of milliseconds.
mps="" # folder of the daemon that this script has started
start_mps() {
  mps=$(mktemp -d)
  export CUDA_MPS_PIPE_DIRECTORY=$mps CUDA_MPS_LOG_DIRECTORY=$mps
  # Clients may have less than the daemon, not more.
  env -u CUDA_MPS_ACTIVE_THREAD_PERCENTAGE nvidia-cuda-mps-control -d
}
stop_mps() {
  [ -n "$mps" ] || return 0
  CUDA_MPS_PIPE_DIRECTORY=$mps nvidia-cuda-mps-control <<<quit
  rm -rf "$mps"
  mps=""
}
trap stop_mps EXIT
if [ "$RANKS_PER_GPU" -gt 1 ] && command -v nvidia-cuda-mps-control >/dev/null; then
  export CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=$((97 / RANKS_PER_GPU))
  start_mps
fi

# step NAME SECONDS COMMAND...: runs under a timeout, keeps the log, remembers a failure.
step() {
  local name=$1 limit=$2 start=$SECONDS left=$((LIMIT - SECONDS))
  shift 2
  if [ "$left" -lt 15 ]; then
    echo "$name: LEFT OUT, no time"
    rm -f "$OUT/$name.log"
    failed+=("$name")
    return 1
  fi
  if timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" >"$OUT/$name.log" 2>&1; then
    echo "$name: ok, $((SECONDS - start)) s"
  else
    echo "$name: FAILED ($?), $((SECONDS - start)) s"
    tail -n 40 "$OUT/$name.log"
    failed+=("$name")
    return 1
  fi
}

# tests NAME SECONDS ARGUMENTS...: pytest on the tests that need GPUs.
tests() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$PYTHON" -m pytest -q -m gpu --durations=10 "$@" && tail -n 14 "$OUT/$name.log"
}

# bench NAME ARGUMENTS...: all2all.py over all GPUs; the rows so far are kept if it is cut short.
bench() {
  local name=$1
  shift
  grep -qE -- "${BENCH_K:-.}" <<<"$name" || return 0
  step "bench-$name" "${BENCH_TIMEOUT:-120}" env CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=100 \
    "$PYTHON" -m torch.distributed.run --nproc-per-node "$GPUS" bench/all2all.py \
    --commit "${COMMIT:-$(git rev-parse --short HEAD)}" --json "$OUT/$name.jsonl" "$@"
  [ -e "$OUT/bench-$name.log" ] && grep -v '^[W*]' "$OUT/bench-$name.log" | tail -n 60
}

# All runs, those that are worth most first.
benches() {
  local large=(--transport nvlink --tokens 4096) small=(--transport nvlink --launch 'eager,graph')
  # Results for the worst case in layout expert take more than the window has by default.
  local window=$((16 << 30))
  bench large-bf16 "${large[@]}" --adapter epcomm,torch,deep_ep
  bench small-padded-fp8 "${small[@]}" --tokens 128 --layout padded --quant fp8 --adapter epcomm,deep_ep
  bench large-fp8 "${large[@]}" --dtype fp8 --adapter epcomm,torch,deep_ep
  bench large-quant-fp8 "${large[@]}" --quant fp8 --adapter epcomm --operations dispatch
  EPCOMM_WINDOW_BYTES=$window bench large-expert-fp8 "${large[@]}" --dtype fp8 --layout expert --expert-alignment 128 --adapter epcomm
  EPCOMM_WINDOW_BYTES=$window bench large-expert-bf16 "${large[@]}" --layout expert --expert-alignment 128 --adapter epcomm
  # What deep_ep's interface costs beside epcomm's calls that do the same work.
  bench compat-large "${large[@]}" --num-sms 24 --like-deep-ep --adapter epcomm,compat --cadence separate --modes fresh,replay
  bench compat-small "${small[@]}" --tokens 128 --layout padded --quant fp8 --like-deep-ep --adapter epcomm,compat --cadence separate \
    --modes replay,no-sync,graph
  bench sms-bf16 "${large[@]}" --num-sms "$SMS" --adapter epcomm,deep_ep --operations dispatch,combine --modes fresh,replay
  bench sms-fp8 "${large[@]}" --dtype fp8 --num-sms "$SMS" --adapter epcomm --operations dispatch --modes fresh,replay
  EPCOMM_WINDOW_BYTES=$window bench sms-expert-bf16 "${large[@]}" --layout expert --expert-alignment 128 --num-sms "$SMS" --adapter epcomm \
    --operations dispatch,combine --modes fresh,replay
  EPCOMM_WINDOW_BYTES=$window bench sms-expert-fp8 "${large[@]}" --dtype fp8 --layout expert --expert-alignment 128 --num-sms "$SMS" \
    --adapter epcomm --operations dispatch --modes fresh,replay
  bench small-padded-sizes "${small[@]}" --tokens 1,8,32,64,256 --layout padded --quant fp8 --adapter epcomm,deep_ep --modes fresh,no-sync,replay,graph
  bench small-token-sizes "${small[@]}" --tokens 1,8,32,64,128,256 --adapter epcomm,torch --cadence separate
  bench small-padded-nvfp4 "${small[@]}" --tokens 128 --layout padded --quant nvfp4 --adapter epcomm --operations dispatch
  bench small-sms "${small[@]}" --tokens 128 --layout padded --quant fp8 --num-sms "$SMS" --adapter epcomm --modes no-sync,graph
  bench overlap "${large[@]}" --adapter epcomm --overlap --num-sms 8,16,24 --operations dispatch,combine --modes replay --cadence separate
  bench large-quant-nvfp4 "${large[@]}" --quant nvfp4 --adapter epcomm --operations dispatch
  bench nccl --transport nccl --adapter epcomm,torch --tokens 128,4096
  bench nccl-graph --transport nccl --adapter epcomm,torch --graph --tokens 1,8,32,64,128,256 --cadence separate
  NCCL_P2P_DISABLE=1 bench nccl-p2p-off --transport nccl --adapter epcomm,torch --tokens 128,4096
  # Small batches through NCCL all the same, and by its other schedules, without and with peer access.
  local nccl_small=(--transport nccl --graph --tokens 128 --cadence separate)
  NCCL_P2P_DISABLE=1 bench nccl-graph-p2p-off "${nccl_small[@]}" --adapter epcomm,torch
  NCCL_P2P_DISABLE=1 bench nccl-graph-p2p-off-grouped "${nccl_small[@]}" --adapter epcomm --transport-option schedule=grouped
  NCCL_P2P_DISABLE=1 bench nccl-graph-p2p-off-shifted "${nccl_small[@]}" --adapter epcomm --transport-option schedule=shifted
  bench nccl-graph-small "${nccl_small[@]}" --adapter epcomm --transport-option algorithm=small
  bench nccl-graph-small-grouped "${nccl_small[@]}" --adapter epcomm --transport-option algorithm=small --transport-option schedule=grouped
}

# beside NAME ARGUMENTS...: tests in the background; all_beside waits for all of them.
running=()
beside() {
  tests "$1" "${TEST_TIMEOUT:-500}" -p no:cacheprovider "${@:2}" &
  running+=("$1:$!")
}
all_beside() {
  local one
  for one in "${running[@]}"; do wait "${one#*:}" || failed+=("${one%:*}"); done
  running=()
}

# Eleven runs with two ranks on each GPU: 22 processes share its SMs, 4 % each, so that all kernels are on the GPU at once. No test that starts
# processes: once, as one came, nothing else began on its GPU until the kernels that were running there had given up.
together() {
  local ranks=$((GPUS * 2 < 4 ? GPUS * 2 : 4)) small="tests/test_conformance.py" seed own=""
  local starts="(lost or first_buffer or processes_end)"
  local -x EPCOMM_TEST_RANKS_PER_GPU=2 CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=4
  local -x CUDA_MPS_PIPE_DIRECTORY=${CUDA_MPS_PIPE_DIRECTORY:-} CUDA_MPS_LOG_DIRECTORY=${CUDA_MPS_LOG_DIRECTORY:-}
  if [ -z "$mps" ]; then
    own=1
    start_mps
  fi
  beside nvlink-most $small -k "nvlink-$ranks or nvlink-3"
  beside nvlink-few $small tests/test_statistics.py tests/test_gpu_calls.py -k "nvlink-1 or nvlink-2 or (not lost and not nccl and not conformance)"
  EPCOMM_TEST_NVSHMEM=peer beside rdma-peer $small tests/test_rdma.py -k "rdma-$ranks or (test_rdma and not $starts)"
  EPCOMM_TEST_NVSHMEM=peer beside rdma-few $small -k "(rdma-1 or rdma-2 or rdma-3) and not rdma-$ranks"
  EPCOMM_TEST_NVSHMEM=card beside rdma-card $small tests/test_rdma.py -k "rdma-$ranks or (test_rdma and not $starts)"
  EPCOMM_TEST_NVSHMEM=peer EPCOMM_TEST_CALLS=10000 beside hierarchical-soak tests/test_hierarchical_gpu.py -k "random_calls and 2"
  for seed in 21 22 23 24; do
    EPCOMM_TEST_SEED=$seed EPCOMM_TEST_CALLS=12500 beside "small-soak-$seed" tests/test_gpu_soak.py -k calls_of_small
  done
  CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=8 beside others tests/test_nccl_window.py tests/test_gpu_soak.py tests/test_compat_gpu.py \
    -k "not nccl-1 and not calls_of and not agree and not logged and not one_gpu and not one_kernel"
  all_beside
  [ -z "$own" ] || stop_mps
}

for wanted in $STEPS; do
  case $wanted in
    build) step build 300 "$PYTHON" -m pip install -q --no-build-isolation --no-deps . ;;
    kernels)
      step kernels-build 200 nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -I. -Iinclude -Icsrc \
        tests/cpp/kernels_gpu_test.cu $(ls csrc/kernels/*.cu | grep -v nvshmem) csrc/core/{error,host_rows}.cc \
        -Xcompiler -ffp-contract=off -o build/kernels_gpu_test
      step kernels 120 build/kernels_gpu_test
      tail -n 1 "$OUT/kernels.log"
      ;;
    sanitizer)
      if [ "$RANKS_PER_GPU" -gt 1 ]; then
        echo "sanitizer: LEFT OUT, it does not go with MPS"
        continue
      fi
      step memcheck-kernels 120 compute-sanitizer --tool memcheck --error-exitcode 9 build/kernels_gpu_test 128
      step memcheck-nvlink 150 compute-sanitizer --tool memcheck --report-api-errors no --target-processes all --error-exitcode 9 \
        "$PYTHON" -m pytest -q -m gpu tests/test_gpu_calls.py -k 'inputs_of_combine'
      # Exact counts, rows of fp32, one communicator: to make one takes NCCL longer than Buffers usually wait for it.
      step memcheck-nccl 240 env EPCOMM_TEST_PATIENCE=10 \
        compute-sanitizer --tool memcheck --report-api-errors no --target-processes all --error-exitcode 9 \
        "$PYTHON" -m pytest -q -m gpu 'tests/test_nccl.py::test_chunks[2-expert]'
      tail -n 3 "$OUT/memcheck-nccl.log"
      ;;
    tests) tests tests "${TEST_TIMEOUT:-300}" --ignore=tests/engines tests -k "(${TEST_K:-test}) and not rdma" ;;
    soak)
      EPCOMM_TEST_CALLS=${EPCOMM_TEST_CALLS:-full} tests soak "${TEST_TIMEOUT:-550}" \
        tests/test_gpu_soak.py tests/test_gpu_lifetime.py -k "${TEST_K:-test}"
      ;;
    together)
      if ! command -v nvidia-cuda-mps-control >/dev/null; then
        echo "together: LEFT OUT, it needs MPS"
        failed+=(together)
        continue
      fi
      step rdma-softnic 120 make -C tests/softnic PYTHON="$PYTHON"
      together
      ;;
    alone)
      if [ "$RANKS_PER_GPU" -gt 1 ]; then
        echo "alone: LEFT OUT, it wants a GPU for each rank"
        failed+=(alone)
        continue
      fi
      tests window 90 tests/test_gpu_window.py
      tests counts 90 tests/test_compat_gpu.py tests/test_nccl_window.py -k "one_kernel or (cuda and (agree or logged or one_gpu))"
      EPCOMM_TEST_NVSHMEM=peer tests processes 90 tests/test_rdma.py -k "first_buffer or processes_end"
      EPCOMM_TEST_CALLS=${EPCOMM_TEST_CALLS:-full} tests leave-nothing 240 tests/test_gpu_lifetime.py -k "leave_nothing and (${TEST_K:-test})"
      ;;
    lost)
      tests lost 300 tests/test_gpu_calls.py tests/test_gpu_lifetime.py -k "(lost or killed) and (${TEST_K:-test})"
      EPCOMM_TEST_NVSHMEM=peer tests lost-rdma 300 tests/test_rdma.py tests/test_hierarchical_gpu.py -k "lost and (${TEST_K:-test})"
      ;;
    engines)
      if [ -z "${EPCOMM_TEST_ENGINES:-}" ] && [ -e build/engines.tar.xz ]; then
        EPCOMM_TEST_ENGINES=$(mktemp -d) && export EPCOMM_TEST_ENGINES
        step engines-unpack 60 "$PYTHON" -W ignore -m tarfile -e build/engines.tar.xz "$EPCOMM_TEST_ENGINES"
      fi
      EPCOMM_TRANSPORT=${EPCOMM_TRANSPORT:-nvlink} tests engines "${TEST_TIMEOUT:-300}" tests/engines -k "${TEST_K:-test}"
      ;;
    nccl-modes)
      # Without peer access, and as two hosts that talk over sockets.
      NCCL_P2P_DISABLE=1 tests tests-p2p-off 150 tests/test_conformance.py -k "$MODES_K"
      # Ranks of one GPU are hosts of their own anyway.
      [ "$RANKS_PER_GPU" -gt 1 ] ||
        EPCOMM_TEST_HOSTS=2 NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_NET=Socket NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 \
        tests tests-two-hosts 150 tests/test_conformance.py -k "$MODES_K"
      ;;
    rdma)
      # 16-bit, fp8 and quantised rows between all ranks; nodes; everything of tests/test_rdma.py and test_hierarchical_gpu.py.
      rdma_k=${RDMA_K:-"test_rdma or hierarchical or (rdma-$RANKS and (bf16 or fp8))"}
      rdma_tests=("${RDMA_TIMEOUT:-300}" tests/test_conformance.py tests/test_rdma.py tests/test_hierarchical_gpu.py -k "$rdma_k")
      step rdma-softnic 120 make -C tests/softnic PYTHON="$PYTHON"
      EPCOMM_TEST_NVSHMEM=peer tests rdma-peer "${rdma_tests[@]}"
      EPCOMM_TEST_NVSHMEM=card tests rdma-card "${rdma_tests[@]}"
      # Two nodes of several GPUs each; host names of its own need root.
      if [ "$RANKS" -ge 4 ] && [ "$(id -u)" = 0 ]; then
        EPCOMM_TEST_NVSHMEM=nodes tests rdma-nodes "${rdma_tests[@]}"
      fi
      # Next to the same GPUs by loads and stores.
      NVSHMEM_REMOTE_TRANSPORT=none bench rdma --transport rdma,nvlink --adapter epcomm --tokens 1,8,32,64,128,256
      # Two logical nodes, next to the same GPUs as one NVLink domain.
      NVSHMEM_REMOTE_TRANSPORT=none NVSHMEM_SYMMETRIC_SIZE=${NVSHMEM_SYMMETRIC_SIZE:-4G} \
        bench hierarchical --transport hierarchical,nvlink --ranks-per-node $(((GPUS + 1) / 2)) --adapter epcomm --tokens 4096 \
        --operations dispatch,combine --modes fresh,no-sync,replay
      ;;
    bench) benches ;;
    *) echo "unknown step $wanted"; failed+=("$wanted") ;;
  esac
done

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sort | uniq -c >"$OUT/gpus.txt"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
