# Finds the torch of the target environment on disk. It is not imported (slow, and impossible when cross-building),
# and find_package(Torch) is not used: it stops when a CUDA wheel meets a machine without the CUDA toolkit.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
if(NOT FASTNN_TORCH_DIR)
  # Inside pip's isolated build, sysconfig still answers with the real environment. A virtual environment may also see
  # its base's packages; pip install --user has a folder of its own.
  execute_process(COMMAND ${Python_EXECUTABLE} -c [[
import os, site, sys, sysconfig
places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
config = os.path.join(sys.prefix, "pyvenv.cfg")
base = not os.path.exists(config)
if not base:
    lines = [line.replace(" ", "").strip().lower() for line in open(config, encoding="utf-8")]
    base = "include-system-site-packages=true" in lines
if base:
    prefixes = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    places += [site.getusersitepackages(), sysconfig.get_path("purelib", vars=prefixes)]
    places += site.getsitepackages([sys.base_prefix])
found = [p for p in places if os.path.exists(os.path.join(p, "torch", "version.py"))]
print(os.path.join((found or places)[0], "torch"))
]] OUTPUT_VARIABLE FASTNN_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT EXISTS "${FASTNN_TORCH_DIR}/version.py")
  message(FATAL_ERROR "fastnn builds against the installed torch, and there is none in ${FASTNN_TORCH_DIR}: "
                      "type `pip install torch` (2.11 or newer) first, then install fastnn again.")
endif()

file(STRINGS "${FASTNN_TORCH_DIR}/version.py" version_line REGEX "^__version__ *=")
string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+[^'\"]*" FASTNN_TORCH_VERSION "${version_line}")
string(REGEX MATCH "^[0-9]+\\.[0-9]+" torch_minor "${FASTNN_TORCH_VERSION}")
if(torch_minor VERSION_LESS 2.11)
  message(FATAL_ERROR "fastnn needs torch 2.11 or newer; ${FASTNN_TORCH_DIR} is ${FASTNN_TORCH_VERSION}: "
                      "type `pip install --upgrade torch`, then install fastnn again.")
endif()
# The CUDA version of a CUDA build of torch; empty for a CPU build.
file(STRINGS "${FASTNN_TORCH_DIR}/version.py" cuda_line REGEX "^cuda *(:[^=]*)?=")
set(FASTNN_TORCH_CUDA "")
if(cuda_line MATCHES "= *'([0-9.]+)'")
  set(FASTNN_TORCH_CUDA ${CMAKE_MATCH_1})
endif()
message(STATUS "torch ${FASTNN_TORCH_VERSION} in ${FASTNN_TORCH_DIR}")

add_library(fastnn_torch INTERFACE)
target_include_directories(fastnn_torch SYSTEM INTERFACE
  ${FASTNN_TORCH_DIR}/include ${FASTNN_TORCH_DIR}/include/torch/csrc/api/include)
target_link_directories(fastnn_torch INTERFACE ${FASTNN_TORCH_DIR}/lib)
target_link_libraries(fastnn_torch INTERFACE torch_cpu torch_python c10)
