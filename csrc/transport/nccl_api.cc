#include "transport/nccl_api.h"

#include <dlfcn.h>

#include <string>

#include "epcomm/error.h"

namespace epcomm {
namespace {

constexpr int kOldestVersion = 21800;

template <class F>
void load(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(::dlsym(library, name));
  if (function == nullptr)
    throw Error(std::string("libnccl has no ") + name + "; install nvidia-nccl 2.18 or later");
}

NcclApi open_library() {
  void* library = ::dlopen("libnccl.so.2", RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) library = ::dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr)
    throw Error(std::string("cannot open libnccl.so.2 (") + ::dlerror() +
                "); install epcomm[cu12] or epcomm[cu13], or a torch with CUDA");
  NcclApi api{};
  load(library, "ncclGetVersion", api.GetVersion);
  load(library, "ncclGetUniqueId", api.GetUniqueId);
  load(library, "ncclCommInitRank", api.CommInitRank);
  load(library, "ncclCommInitRankConfig", api.CommInitRankConfig);
  load(library, "ncclCommAbort", api.CommAbort);
  load(library, "ncclCommGetAsyncError", api.CommGetAsyncError);
  load(library, "ncclGetErrorString", api.GetErrorString);
  load(library, "ncclGetLastError", api.GetLastError);
  load(library, "ncclGroupStart", api.GroupStart);
  load(library, "ncclGroupEnd", api.GroupEnd);
  load(library, "ncclSend", api.Send);
  load(library, "ncclRecv", api.Recv);
  load(library, "ncclAllGather", api.AllGather);
  load(library, "ncclReduceScatter", api.ReduceScatter);
  int version = 0;
  api.GetVersion(&version);
  if (version < kOldestVersion)
    throw Error("libnccl is version " + std::to_string(version) + "; expected 2.18 (" +
                std::to_string(kOldestVersion) + ") or later");
  return api;
}

}  // namespace

const NcclApi& NcclApi::get() {
  static const NcclApi api = open_library();
  return api;
}

void check_nccl(ncclResult_t code, const char* call) {
  if (code == ncclSuccess) return;
  const NcclApi& api = NcclApi::get();
  throw Error(std::string(call) + ": " + api.GetErrorString(code) + " (" +
              api.GetLastError(nullptr) + ")");
}

}  // namespace epcomm
