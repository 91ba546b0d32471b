# Finds NVSHMEM and builds the module _nvshmem beside _cuda. Sets EPCOMM_NVSHMEM_STATUS to one line: what is
# built, or why nothing is.

# Versions that the code is written for: docs/rdma.md.
set(_nvshmem_oldest 3.4.5)
set(_nvshmem_too_new 3.9)

# What the user named, else the pip package: a folder with include/ and lib/.
set(_nvshmem_dir "${EPCOMM_NVSHMEM_DIR}")
if(NOT _nvshmem_dir)
  epcomm_pip_package(_nvshmem_dir nvshmem)
endif()
set(_nvshmem_version "")
set(_version_header "${_nvshmem_dir}/include/non_abi/nvshmem_version.h")
if(EXISTS "${_version_header}")
  file(STRINGS "${_version_header}" _lines REGEX "define NVSHMEM_VENDOR_(MAJOR|MINOR|PATCH)_VERSION +[0-9]+")
  foreach(_part IN ITEMS MAJOR MINOR PATCH)
    string(REGEX MATCH "NVSHMEM_VENDOR_${_part}_VERSION +([0-9]+)" _ "${_lines}")
    list(APPEND _nvshmem_version ${CMAKE_MATCH_1})
  endforeach()
  list(JOIN _nvshmem_version "." _nvshmem_version)
endif()

set(_none "no NVSHMEM with libnvshmem_device.a: install nvidia-nvshmem-cu12 or -cu13 beside torch and build with \
--no-build-isolation, or set EPCOMM_NVSHMEM_DIR")
if(EPCOMM_NVSHMEM STREQUAL "OFF")
  set(EPCOMM_NVSHMEM_STATUS "not built: EPCOMM_NVSHMEM=OFF")
elseif(NOT TARGET _cuda)
  set(EPCOMM_NVSHMEM_STATUS "not built: no CUDA")
elseif(NOT EXISTS "${_nvshmem_dir}/lib/libnvshmem_device.a" OR NOT EXISTS "${_nvshmem_dir}/lib/libnvshmem_host.so.3")
  set(EPCOMM_NVSHMEM_STATUS "not built: ${_none}")
elseif(_nvshmem_version VERSION_LESS _nvshmem_oldest OR NOT _nvshmem_version VERSION_LESS _nvshmem_too_new)
  set(EPCOMM_NVSHMEM_STATUS
      "not built: NVSHMEM in ${_nvshmem_dir} is ${_nvshmem_version}, expected ${_nvshmem_oldest} or newer, below ${_nvshmem_too_new}")
else()
  # nvcc finds libcu++ by itself; g++ does not where CUDA 13 has moved it.
  set(_nvshmem_include "${_nvshmem_dir}/include")
  foreach(_folder IN LISTS CUDAToolkit_INCLUDE_DIRS)
    if(EXISTS "${_folder}/cccl/cuda/std")
      list(APPEND _nvshmem_include "${_folder}/cccl")
    endif()
  endforeach()
  # The wheel has no link without a version: the library is named in full.
  add_library(nvshmem_host SHARED IMPORTED)
  set_target_properties(nvshmem_host PROPERTIES IMPORTED_LOCATION "${_nvshmem_dir}/lib/libnvshmem_host.so.3"
                        INTERFACE_INCLUDE_DIRECTORIES "${_nvshmem_include}")
  add_library(nvshmem_device STATIC IMPORTED)
  set_target_properties(nvshmem_device PROPERTIES IMPORTED_LOCATION "${_nvshmem_dir}/lib/libnvshmem_device.a")

  set(_nvshmem_sources "")
  foreach(_file IN ITEMS kernels/link_nvshmem.cu kernels/mark.cu kernels/place.cu kernels/rail_combine_nvshmem.cu
                         kernels/rail_dispatch_nvshmem.cu kernels/rail_route.cu kernels/reduce.cu kernels/route.cu kernels/small.cu
                         transport/gpu_capture.cc transport/gpu_driver.cc transport/gpu_link_transport.cc
                         transport/gpu_mapping.cc transport/gpu_nvshmem.cc transport/gpu_nvshmem_windows.cc
                         transport/gpu_route.cc transport/gpu_small_batches.cc transport/gpu_symmetric_heap.cc
                         transport/gpu_watchdog.cc transport/gpu_window.cc transport/hierarchical_gpu.cc transport/rdma.cc
                         transport/registry_nvshmem.cc bindings/buffer_bindings.cc bindings/nvshmem_module.cc
                         bindings/py_bootstrap.cc bindings/torch_pool.cc)
    list(APPEND _nvshmem_sources ${PROJECT_SOURCE_DIR}/csrc/${_file})
  endforeach()
  pybind11_add_module(_nvshmem MODULE NO_EXTRAS ${_nvshmem_sources})
  # The Python package opens the host library by its path before it imports the module.
  set_target_properties(_nvshmem PROPERTIES CUDA_SEPARABLE_COMPILATION ON CUDA_RESOLVE_DEVICE_SYMBOLS ON
                        SKIP_BUILD_RPATH ON)
  target_link_libraries(_nvshmem PRIVATE epcomm_core nvshmem_device nvshmem_host CUDA::cudart_static)
  target_compile_options(_nvshmem PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Werror=all-warnings>)
  install(TARGETS _nvshmem DESTINATION epcomm)
  set(EPCOMM_NVSHMEM_STATUS "built: transports hierarchical, rdma, device library ${_nvshmem_version}")  # read by nvshmem.py
endif()

if(EPCOMM_NVSHMEM STREQUAL "ON" AND NOT TARGET _nvshmem)
  message(FATAL_ERROR "EPCOMM_NVSHMEM=ON, but _nvshmem is ${EPCOMM_NVSHMEM_STATUS}")
endif()
