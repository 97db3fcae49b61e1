# FASTNN_WITH_CUDA: auto (CUDA when torch is a CUDA build and nvcc is found), on, off, or compile-only (the objects of
# every .cu file, linked into nothing: a check that needs no GPU and no CUDA torch).
# Sets FASTNN_LINK_CUDA when _C links the CUDA kernels, and FASTNN_CUDA_VERSION to the toolkit they were built with.
set(FASTNN_LINK_CUDA OFF)
set(FASTNN_CUDA_VERSION "")
if(NOT FASTNN_WITH_CUDA MATCHES "^(auto|on|off|compile-only)$")
  message(FATAL_ERROR "FASTNN_WITH_CUDA=${FASTNN_WITH_CUDA}: choose auto, on, off or compile-only")
endif()
if(FASTNN_WITH_CUDA STREQUAL "off")
  return()
endif()

find_program(FASTNN_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME PATH_SUFFIXES bin)
if(FASTNN_WITH_CUDA STREQUAL "auto" AND NOT (FASTNN_NVCC AND FASTNN_TORCH_CUDA))
  return()
endif()
if(FASTNN_WITH_CUDA STREQUAL "on" AND NOT FASTNN_TORCH_CUDA)
  message(FATAL_ERROR "FASTNN_WITH_CUDA=on, but the torch in ${FASTNN_TORCH_DIR} (${FASTNN_TORCH_VERSION}) is a CPU "
                      "build: install a CUDA build of torch, or build with FASTNN_WITH_CUDA=off.")
endif()
if(NOT FASTNN_NVCC)
  message(FATAL_ERROR "FASTNN_WITH_CUDA=${FASTNN_WITH_CUDA} needs nvcc, and there is none: install the CUDA toolkit "
                      "and put nvcc on PATH (or set CUDA_HOME), or build with FASTNN_WITH_CUDA=off.")
endif()

# ---- architectures: TORCH_CUDA_ARCH_LIST as torch's extensions read it, else the present device, else a release's -----

set(arch_list "$ENV{TORCH_CUDA_ARCH_LIST}")
if(NOT arch_list AND FASTNN_WITH_CUDA STREQUAL "compile-only")
  set(arch_list "8.0;9.0")
endif()
if(NOT arch_list)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE arch_list OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE rc)
  string(REPLACE "\n" ";" arch_list "${arch_list}")
  if(NOT rc EQUAL 0 OR NOT arch_list MATCHES "^[0-9.;]+$")
    set(arch_list "8.0;9.0;10.0+PTX")
  endif()
endif()
string(REGEX REPLACE "[ ,]+" ";" arch_list "${arch_list}")
list(REMOVE_DUPLICATES arch_list)
set(CMAKE_CUDA_ARCHITECTURES "")
foreach(arch IN LISTS arch_list)
  if(NOT arch MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: \"${arch}\" is not of the form 9.0 or 9.0+PTX")
  endif()
  set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
  if(number LESS 80)
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: fastnn's kernels need compute capability 8.0 or later, not ${arch}")
  endif()
  if(CMAKE_MATCH_4)
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${number})  # machine code and PTX
  else()
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${number}-real)
  endif()
endforeach()

# ---- the kernels -----------------------------------------------------------------------------------------------------

set(CMAKE_CUDA_COMPILER ${FASTNN_NVCC})
if(CCACHE AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()
enable_language(CUDA)
message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION} (${FASTNN_WITH_CUDA}) for ${CMAKE_CUDA_ARCHITECTURES}")

file(GLOB CUDA_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/../csrc/kernels/cuda/*.cu)
if(FASTNN_WITH_CUDA STREQUAL "compile-only")
  add_library(kernels_cuda OBJECT ${CUDA_SOURCES})
  set(CUDA_STRICT --Werror=all-warnings)
else()
  add_library(kernels_cuda STATIC ${CUDA_SOURCES})
  set(FASTNN_LINK_CUDA ON)
  set(FASTNN_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
endif()
# relaxed-constexpr: kernels call the constexpr helpers of kernels/common.h. A spilled register is a warning.
set_target_properties(kernels_cuda PROPERTIES CUDA_STANDARD 17)  # CMake before 3.26 knows no later one for nvcc
target_compile_options(kernels_cuda PRIVATE -O3 --expt-relaxed-constexpr -Xptxas=--warn-on-spills
                       -Xcompiler=-Wall,-Wextra,-fno-exceptions ${CUDA_STRICT})
