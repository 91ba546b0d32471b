// See nvshmem_api.h.
#pragma once

struct nvshmemx_uniqueid_t {
  int version;
  char internal[124];
};
struct nvshmemx_init_attr_t {
  int rank, size;
  const nvshmemx_uniqueid_t* id;
};
#define NVSHMEMX_UNIQUEID_INITIALIZER \
  {                                   \
  }
#define NVSHMEMX_INIT_ATTR_INITIALIZER \
  {                                    \
  }
constexpr unsigned NVSHMEMX_INIT_WITH_UNIQUEID = 8;

extern "C" {
int nvshmemx_get_uniqueid(nvshmemx_uniqueid_t* id);
int nvshmemx_set_attr_uniqueid_args(int rank, int size, const nvshmemx_uniqueid_t* id,
                                    nvshmemx_init_attr_t* attributes);
int nvshmemx_init_attr(unsigned flags, nvshmemx_init_attr_t* attributes);
}
