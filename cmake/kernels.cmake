# The CPU kernels: one object library per ISA, and the dispatcher that chooses among them.
file(GLOB ISA_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/kernels/cpu/isa/*.cpp)

set(FASTNN_ISAS baseline)
set(FASTNN_FLAGS_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND FASTNN_ISAS avx2 avx512)
  set(FASTNN_FLAGS_baseline -march=x86-64)
  set(FASTNN_FLAGS_avx2 -march=x86-64-v3)
  set(FASTNN_FLAGS_avx512 -march=x86-64-v4 -mprefer-vector-width=512)
endif()

# -O2 whatever the build type: -O3 unrolls and versions loops that are already written for the registers.
# no-math-errno: lets sqrt and floor be instructions. contract=fast: a * b + c is one FMA.
set(KERNEL_FLAGS -O2 -fno-exceptions -fno-rtti -fno-math-errno -ffp-contract=fast -Wall -Wextra -Wno-psabi
    -Wno-uninitialized -Wno-maybe-uninitialized)  # gcc 12 sees the intrinsics' own _undefined_ values

foreach(isa IN LISTS FASTNN_ISAS)
  add_library(kernels_${isa} OBJECT ${ISA_SOURCES})
  target_compile_options(kernels_${isa} PRIVATE ${KERNEL_FLAGS} ${FASTNN_FLAGS_${isa}})
  target_compile_definitions(kernels_${isa} PRIVATE FASTNN_ISA_NS=isa_${isa} FASTNN_ISA_NAME="${isa}")
  add_custom_target(check_isa_symbols_${isa} ALL
    COMMAND ${CMAKE_COMMAND} "-DOBJECTS=$<TARGET_OBJECTS:kernels_${isa}>" -DNM=${CMAKE_NM} -DISA=${isa}
            -P ${PROJECT_SOURCE_DIR}/cmake/check_isa_symbols.cmake
    DEPENDS kernels_${isa} $<TARGET_OBJECTS:kernels_${isa}> VERBATIM)
endforeach()

file(GLOB CPU_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/kernels/cpu/*.cpp)
add_library(kernels STATIC ${CPU_SOURCES})
target_compile_options(kernels PRIVATE -O2 -fno-rtti -Wall -Wextra)
foreach(isa IN LISTS FASTNN_ISAS)  # baseline first
  target_sources(kernels PRIVATE $<TARGET_OBJECTS:kernels_${isa}>)
endforeach()
if(avx512 IN_LIST FASTNN_ISAS)
  target_compile_definitions(kernels PRIVATE FASTNN_HAVE_X86_ISAS)
endif()
