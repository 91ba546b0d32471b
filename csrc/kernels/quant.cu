// Quantises whole rows and turns them back.
//
// Buffers: x [rows, hidden], q [rows, row_bytes], scales where scale_strides says; one side is
// read, the other written. Launch: a warp per row, blocks for as many rows as there are, at most
// one per SM. Memory order: none between threads, each byte is written by one; what follows on the
// stream sees it. The host guarantees 16-byte alignment of x and q, and that nobody writes the side
// that is read.
#include <algorithm>

#include "epcomm/error.h"
#include "epcomm/quant.h"
#include "kernels/device.cuh"
#include "kernels/elements.cuh"
#include "kernels/launch.cuh"
#include "kernels/quant.cuh"
#include "kernels/quant.h"

namespace epcomm {
namespace {

constexpr int kThreads = 512;

template <Quant kQuant, Dtype kDtype>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const __grid_constant__ QuantizeArgs args) {
  const QuantLayout layout = make_quant_layout(kQuant, args.hidden);
  const GlobalScale global = make_global_scale(kQuant == Quant::kNvfp4 ? *args.global_scale : 1.0f);
  const int vectors = args.hidden / kPerVector<kDtype>;
  const int64_t step = int64_t{gridDim.x} * (kThreads / kWarpSize);
  for (int64_t row = int64_t{blockIdx.x} * (kThreads / kWarpSize) + warp_index();
       row < args.num_rows; row += step) {
    const char* x = static_cast<const char*>(args.x) + row * vectors * 16;
    char* q = static_cast<char*>(args.q) + row * layout.row_bytes;
    char* scales = static_cast<char*>(args.scales);
    for (int begin = 0; begin < vectors; begin += kWarpSize) {
      const int v = begin + lane_index();
      const uint4 data = v < vectors ? load_streaming(x + int64_t{v} * 16) : uint4{};
      const QuantVector out = quantize_vector<kQuant, kDtype>(data, global);
      if (v >= vectors) continue;
      store_codes<kQuant, kDtype>(q, v, out);
      if (stores_scale<kQuant, kDtype>(v))
        store_scale<kQuant>(
            scales + scale_offset(args, layout.num_groups, row, group_of<kQuant, kDtype>(v)),
            out.scale);
    }
    if (kQuant == Quant::kFp8Ue8m0) {
      // The bytes that fill up the last int32 belong to the row.
      const int group = layout.num_groups + lane_index();
      if (group < layout.scale_bytes) scales[scale_offset(args, layout.num_groups, row, group)] = 0;
    } else if (args.wire) {
      finish_scales<kQuant>(scales + row * args.scale_strides.row, layout, global.global);
    }
  }
}

template <Quant kQuant>
__device__ __forceinline__ float load_scale(const char* from) {
  if constexpr (kQuant == Quant::kFp8) return *reinterpret_cast<const float*>(from);
  const uint8_t code = *reinterpret_cast<const uint8_t*>(from);
  return kQuant == Quant::kNvfp4 ? e4m3_decode(code) : ue8m0_decode(code);
}

template <Quant kQuant, Dtype kDtype>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const __grid_constant__ QuantizeArgs args) {
  const QuantLayout layout = make_quant_layout(kQuant, args.hidden);
  const int vectors = args.hidden / kPerVector<kDtype>;
  const int64_t step = int64_t{gridDim.x} * (kThreads / kWarpSize);
  for (int64_t row = int64_t{blockIdx.x} * (kThreads / kWarpSize) + warp_index();
       row < args.num_rows; row += step) {
    char* x = static_cast<char*>(args.x) + row * vectors * 16;
    const char* q = static_cast<const char*>(args.q) + row * layout.row_bytes;
    for (int v = lane_index(); v < vectors; v += kWarpSize) {
      const int group = group_of<kQuant, kDtype>(v);
      float scale = load_scale<kQuant>(static_cast<const char*>(args.scales) +
                                       scale_offset(args, layout.num_groups, row, group));
      if constexpr (kQuant == Quant::kNvfp4)
        scale = mul_rn(scale, args.global_scale[row * args.global_stride]);
      float values[kPerVector<kDtype>];
      dequantize_vector<kQuant, kDtype>(q, v, scale, values);
      *reinterpret_cast<uint4*>(x + int64_t{v} * 16) = vector_from_float<kDtype>(values);
    }
  }
}

// *amax = the largest magnitude_bits of the finite elements; the caller has zeroed it.
template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads)
    finite_amax_kernel(const char* x, int64_t count, uint32_t* amax) {
  constexpr int n = kPerVector<kDtype>;
  uint32_t most = 0;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t v = int64_t{blockIdx.x} * kThreads + thread_index(); v < count / n; v += step) {
    float values[n];
    vector_to_float<kDtype>(load_streaming(x + v * 16), values);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const uint32_t m = magnitude_bits(values[i]);
      if (m < kFloatInfinity) most = max(most, m);
    }
  }
  most = __reduce_max_sync(kFullWarp, most);
  if (lane_index() == 0 && most != 0) atomicMax(amax, most);
}

__global__ void finish_global_scale_kernel(float* scale) {
  *scale = nvfp4_global_scale(float_bits(*scale));
}

using QuantizeKernel = void (*)(QuantizeArgs);

template <Quant kQuant>
QuantizeKernel kernel_of(Dtype dtype, bool forward) {
  constexpr Dtype kBf16 = Dtype::kBfloat16, kF16 = Dtype::kFloat16, kF32 = Dtype::kFloat32;
  if (dtype == kBf16)
    return forward ? quantize_kernel<kQuant, kBf16> : dequantize_kernel<kQuant, kBf16>;
  if (dtype == kF16)
    return forward ? quantize_kernel<kQuant, kF16> : dequantize_kernel<kQuant, kF16>;
  return forward ? quantize_kernel<kQuant, kF32> : dequantize_kernel<kQuant, kF32>;
}

void launch_rows(const QuantizeArgs& args, bool forward) {
  check_quantize_args(args);
  if (args.num_rows == 0) return;
  check_aligned(args.x, "x");
  check_aligned(args.q, "q");
  const QuantizeKernel kernel =
      args.quant == Quant::kNvfp4 ? kernel_of<Quant::kNvfp4>(args.dtype, forward)
      : args.quant == Quant::kFp8 ? kernel_of<Quant::kFp8>(args.dtype, forward)
                                  : kernel_of<Quant::kFp8Ue8m0>(args.dtype, forward);
  const int64_t needed = (args.num_rows + kThreads / kWarpSize - 1) / (kThreads / kWarpSize);
  const int blocks =
      static_cast<int>(std::min<int64_t>(needed, int64_t{4} * persistent_blocks(args.num_sms)));
  launch(forward ? "launch of quantize" : "launch of dequantize", kernel, {blocks, kThreads},
         static_cast<cudaStream_t>(args.stream), args);
}

}  // namespace

void quantize_cuda(const QuantizeArgs& args) { launch_rows(args, true); }

void dequantize_cuda(const QuantizeArgs& args) { launch_rows(args, false); }

void global_scale_cuda(Dtype dtype, const void* x, int64_t count, float* out, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  EPCOMM_CHECK(count * dtype_bytes(dtype) % 16 == 0,
               "x has " + std::to_string(count) + " elements; expected a multiple of 16 bytes");
  check_aligned(x, "x");
  EPCOMM_CUDA_TRY(cudaMemsetAsync(out, 0, sizeof(float), s));
  auto* kernel = dtype == Dtype::kBfloat16  ? finite_amax_kernel<Dtype::kBfloat16>
                 : dtype == Dtype::kFloat16 ? finite_amax_kernel<Dtype::kFloat16>
                                            : finite_amax_kernel<Dtype::kFloat32>;
  if (count > 0)
    launch("launch of finite_amax", kernel, {persistent_blocks(0), kThreads}, s,
           static_cast<const char*>(x), count, reinterpret_cast<uint32_t*>(out));
  launch("launch of finish_global_scale", finish_global_scale_kernel, {1, 1}, s, out);
}

}  // namespace epcomm
