# Finds a CUDA compiler and builds the module _cuda. Sets EPCOMM_CUDA_STATUS to one line: what is built,
# or why nothing is. A file and not a function: enable_language() works in file scope only.
include(cmake/pip_package.cmake)

# Sets out to the path of nvcc, or to "". Order: what the user named, PATH, the usual folder, pip.
function(epcomm_find_nvcc out)
  set(${out} "" PARENT_SCOPE)
  foreach(named "${CMAKE_CUDA_COMPILER}" "$ENV{CUDACXX}")
    if(named)
      set(${out} "${named}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  find_program(found nvcc NO_CACHE HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin PATHS /usr/local/cuda)
  if(NOT found)
    # The CUDA 13 wheels share one prefix in which nvcc runs as it is. CUDA 12 has no nvcc wheel.
    epcomm_pip_package(prefix cu13)
    if(EXISTS "${prefix}/bin/nvcc")
      set(found "${prefix}/bin/nvcc")
    endif()
  endif()
  if(found)
    set(${out} "${found}" PARENT_SCOPE)
  endif()
endfunction()

# The wheels keep libraries in lib/, where nvcc looks in lib64/, and have no libcudart.so link. Nothing
# here needs the shared runtime, but FindCUDAToolkit looks for it.
macro(epcomm_repair_pip_toolkit nvcc)
  get_filename_component(_prefix "${nvcc}/../.." ABSOLUTE)
  file(GLOB _cudart "${_prefix}/lib/libcudart.so.*")
  if(_cudart AND NOT EXISTS "${_prefix}/lib64")
    set(CUDAToolkit_ROOT "${_prefix}" CACHE PATH "" FORCE)
    set(ENV{LIBRARY_PATH} "${_prefix}/lib:$ENV{LIBRARY_PATH}")
    set(CMAKE_CUDA_FLAGS_INIT "-L${_prefix}/lib")
    list(GET _cudart 0 _cudart)
    set(CUDA_CUDART "${_cudart}" CACHE FILEPATH "" FORCE)
  endif()
endmacro()

# Sets out to the architectures of the GPUs present, or to those that the library is tuned for. "a" names
# the exact chip, which the kernels' bulk copies need from 9.0 on.
function(epcomm_cuda_archs out nvcc_version)
  set(archs "")
  find_program(nvidia_smi nvidia-smi NO_CACHE)
  if(nvidia_smi)
    execute_process(COMMAND ${nvidia_smi} --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE caps RESULT_VARIABLE failed ERROR_QUIET)
    if(failed EQUAL 0)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]" caps "${caps}")
      foreach(cap IN LISTS caps)
        string(REPLACE "." "" arch "${cap}")
        if(arch GREATER_EQUAL 90)
          string(APPEND arch "a")
        endif()
        list(APPEND archs ${arch})
      endforeach()
      list(REMOVE_DUPLICATES archs)
    endif()
  endif()
  if(NOT archs)
    set(archs 80 90a)
    if(nvcc_version VERSION_GREATER_EQUAL 12.8)
      list(APPEND archs 100a)
    endif()
  endif()
  set(${out} "${archs}" PARENT_SCOPE)
endfunction()

set(_nvcc "")
set(_nvcc_version "")
if(NOT EPCOMM_CUDA STREQUAL "OFF")
  epcomm_find_nvcc(_nvcc)
endif()
if(_nvcc)
  execute_process(COMMAND ${_nvcc} --version OUTPUT_VARIABLE _nvcc_version ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${_nvcc_version}")
  set(_nvcc_version "${CMAKE_MATCH_1}")
endif()

if(EPCOMM_CUDA STREQUAL "OFF")
  set(EPCOMM_CUDA_STATUS "not built: EPCOMM_CUDA=OFF")
elseif(NOT _nvcc)
  set(EPCOMM_CUDA_STATUS "not built: no nvcc in PATH, CUDA_HOME or the CUDA 13 wheels")
elseif(NOT EXISTS ${PROJECT_SOURCE_DIR}/csrc/bindings/cuda_module.cc)
  set(EPCOMM_CUDA_STATUS "not built: nvcc ${_nvcc_version} found, but this version has no CUDA transport")
else()
  set(CMAKE_CUDA_COMPILER "${_nvcc}")
  epcomm_repair_pip_toolkit("${_nvcc}")
  if(EPCOMM_CUDA_ARCHS)
    set(CMAKE_CUDA_ARCHITECTURES "${EPCOMM_CUDA_ARCHS}")
  else()
    epcomm_cuda_archs(CMAKE_CUDA_ARCHITECTURES "${_nvcc_version}")
  endif()
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  set(_fast "")
  if(EPCOMM_CUDA_FAST_COMPILE)
    if(_nvcc_version VERSION_GREATER_EQUAL 13.0)
      string(APPEND CMAKE_CUDA_FLAGS " --Ofast-compile=max")
      set(_fast ", compiled fast: kernels are slow")
    else()
      message(STATUS "EPCOMM_CUDA_FAST_COMPILE has no effect: nvcc ${_nvcc_version} is older than 13.0")
    endif()
  endif()
  find_package(CUDAToolkit REQUIRED)

  file(GLOB _cuda_sources CONFIGURE_DEPENDS
       ${PROJECT_SOURCE_DIR}/csrc/kernels/*.cu
       ${PROJECT_SOURCE_DIR}/csrc/transport/gpu_*.cc
       ${PROJECT_SOURCE_DIR}/csrc/transport/nccl*.cc
       ${PROJECT_SOURCE_DIR}/csrc/transport/nvlink*.cc)
  # What knows NVSHMEM goes into a module of its own: cmake/nvshmem.cmake.
  list(FILTER _cuda_sources EXCLUDE REGEX "/(link_nvshmem\\.cu|rail_.*\\.cu|gpu_nvshmem.*\\.cc|gpu_symmetric_heap\\.cc)$")
  pybind11_add_module(_cuda MODULE NO_EXTRAS
    csrc/bindings/buffer_bindings.cc
    csrc/bindings/cuda_module.cc
    csrc/bindings/layout_bindings.cc
    csrc/bindings/py_bootstrap.cc
    csrc/bindings/quant_bindings.cc
    csrc/bindings/torch_pool.cc
    csrc/transport/registry_cuda.cc
    ${_cuda_sources})
  # The static runtime opens libcuda itself, so the module imports on a machine without a driver; libnccl
  # is opened when it is used, so that the copy that torch has loaded is taken.
  target_link_libraries(_cuda PRIVATE epcomm_core CUDA::cudart_static)
  target_compile_options(_cuda PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Werror=all-warnings>)
  list(JOIN CMAKE_CUDA_ARCHITECTURES " " _archs)
  target_compile_definitions(_cuda PRIVATE EPCOMM_CUDA_ARCH_LIST="${_archs}")
  install(TARGETS _cuda DESTINATION epcomm)
  set(EPCOMM_CUDA_STATUS "built: transports nccl, nvlink, CUDA ${_nvcc_version}, architectures ${_archs}${_fast}")
endif()

if(EPCOMM_CUDA STREQUAL "ON" AND NOT TARGET _cuda)
  message(FATAL_ERROR "EPCOMM_CUDA=ON, but _cuda is ${EPCOMM_CUDA_STATUS}")
endif()
