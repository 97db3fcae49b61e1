# FASTNN_WITH_CUDA: auto (CUDA when torch is a CUDA build and nvcc is found), on, off, compile-only.
# Sets FASTNN_LINK_CUDA when _C links the CUDA kernels.
set(FASTNN_LINK_CUDA OFF)
if(NOT FASTNN_WITH_CUDA MATCHES "^(auto|on|off|compile-only)$")
  message(FATAL_ERROR "FASTNN_WITH_CUDA=${FASTNN_WITH_CUDA}: choose auto, on, off or compile-only")
endif()
if(FASTNN_WITH_CUDA STREQUAL "off")
  return()
endif()
