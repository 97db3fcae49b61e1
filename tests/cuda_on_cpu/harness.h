// Compares a CUDA kernel run on the CPU with the CPU kernel, on buffers the address sanitizer watches.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/kernels/common.h"
#include "cuda_on_cpu.h"

namespace harness {

using fastnn::DType;
using fastnn::Status;

constexpr DType kDTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
const char* name_of(DType dtype);

// An array exactly as long as it says, starting `skip` elements past a 16-byte boundary. It remembers its first
// contents: random values, or a NaN pattern where a kernel must write every element.
class Array {
 public:
  Array() = default;
  Array(DType dtype, int64_t count, int element_bytes, bool exact, int skip);
  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(memory_.get() + skip_bytes_);
  }
  int64_t bytes() const { return int64_t(initial_.size()); }
  int64_t count() const { return bytes() / element_bytes_; }
  void set(int64_t i, double value);  // floating arrays: also becomes part of the first contents
  void keep() { std::memcpy(initial_.data(), data(), initial_.size()); }  // what it holds now is its first contents
  void reset() const { std::memcpy(data(), initial_.data(), initial_.size()); }
  double at(int64_t i) const;

  DType dtype = DType::f32;
  bool exact = false;      // compared bit by bit
  double tolerance = 8;    // else: in units of epsilon times the largest reference value

 private:
  std::shared_ptr<char[]> memory_;
  std::vector<char> initial_;
  int element_bytes_ = 1, skip_bytes_ = 0;
};

int size_of(DType dtype);
Array normal(DType dtype, int64_t count, int skip = 0);                           // standard normal values
Array uniform(DType dtype, int64_t count, double low, double high, int skip = 0);  // in [low, high)
Array output(DType dtype, int64_t count, int skip = 0);                           // NaNs
template <class T>
Array indices(int64_t count, int64_t high) {  // integers in [0, high)
  Array a(DType::f32, count, sizeof(T), true, 0);
  for (int64_t i = 0; i < count; ++i) a.data<T>()[i] = T(std::rand() % high);
  a.keep();
  return a;
}
template <class T>
Array index_output(int64_t count) {
  return Array(DType::f32, count, sizeof(T), true, 0);
}

// Runs cpu() once and cuda() in both orders of threads and blocks, and a third time where its launcher cuts problems too
// large for 32-bit indices, then into short runs; every array is reset before each. They must agree bit by bit, and with
// the CPU to each array's tolerance.
void check(const std::string& name, const std::vector<Array*>& written, const std::function<Status()>& cpu,
           const std::function<Status()>& cuda);

// A family's test: `static Test softmax("softmax", run);` at namespace scope.
struct Test {
  Test(const char* family, void (*run)());
};

}  // namespace harness
