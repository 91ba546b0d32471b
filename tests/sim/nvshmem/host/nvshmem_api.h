// As much of NVSHMEM's host interface as gpu_nvshmem.cc calls, for nvshmem_job_test.cc, which
// implements it. Found instead of NVSHMEM's by the order of include paths.
#pragma once

#include <cstddef>

extern "C" {
int nvshmem_my_pe();
int nvshmem_n_pes();
void* nvshmem_align(size_t alignment, size_t bytes);
void* nvshmem_ptr(const void* address, int pe);
}
