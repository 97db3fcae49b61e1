// The comparison of harness.h, and main(): runs the families named on the command line, or all but the planted bugs.
#include "harness.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <random>

namespace harness {
namespace {

std::mt19937_64 g_random(1);
int g_cases = 0, g_cut = 0, g_failures = 0;
constexpr int64_t kLongestRun = 0x7fffffff;

std::vector<std::pair<std::string, void (*)()>>& tests() {
  static std::vector<std::pair<std::string, void (*)()>> list;
  return list;
}

double epsilon(DType dtype) {
  switch (dtype) {
    case DType::f32: return 0x1p-23;
    case DType::f64: return 0x1p-52;
    case DType::bf16: return 0x1p-7;
    case DType::f16: return 0x1p-10;
  }
  return 0;
}

template <class Distribution>
Array random(DType dtype, int64_t count, int skip, Distribution distribution) {
  Array a = output(dtype, count, skip);
  for (int64_t i = 0; i < count; ++i) a.set(i, distribution(g_random));
  return a;
}

void fail(const std::string& name, const char* what, int64_t at = -1, double ours = 0, double expected = 0) {
  ++g_failures;
  std::printf("FAILED %s: %s", name.c_str(), what);
  if (at >= 0) std::printf(" at %ld: %.9g, the CPU kernel %.9g", long(at), ours, expected);
  std::printf("\n");
}

void compare(const std::string& name, size_t which, const Array& a, const std::vector<double>& expected) {
  double largest = 1e-3;
  for (double e : expected)
    if (std::isfinite(e)) largest = std::max(largest, std::abs(e));
  const double allowed = a.exact ? 0 : a.tolerance * epsilon(a.dtype) * largest;
  for (int64_t i = 0; i < int64_t(expected.size()); ++i) {
    const double ours = a.at(i), e = expected[i];
    const bool same = ours == e || (std::isnan(ours) && std::isnan(e)) || std::abs(ours - e) <= allowed;
    if (!same) return fail(name, ("array " + std::to_string(which) + " differs").c_str(), i, ours, e);
  }
}

}  // namespace

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return "f32";
    case DType::f64: return "f64";
    case DType::bf16: return "bf16";
    case DType::f16: return "f16";
  }
  return "";
}
int size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

Array::Array(DType dtype, int64_t count, int element_bytes, bool exact, int skip)
    : dtype(dtype), exact(exact), memory_(new char[size_t((count + skip) * element_bytes)]),
      initial_(size_t(count * element_bytes), char(0xff)), element_bytes_(element_bytes),
      skip_bytes_(skip * element_bytes) {
  reset();
}

void Array::set(int64_t i, double value) {
  switch (dtype) {
    case DType::f32: data<float>()[i] = float(value); break;
    case DType::f64: data<double>()[i] = value; break;
    case DType::bf16: data<uint16_t>()[i] = cuda_on_cpu::float_to_bfloat(float(value)); break;
    case DType::f16: data<uint16_t>()[i] = cuda_on_cpu::float_to_half(float(value)); break;
  }
  std::memcpy(&initial_[size_t(i * element_bytes_)], data<char>() + i * element_bytes_, size_t(element_bytes_));
}

double Array::at(int64_t i) const {
  if (exact) {
    int64_t value = 0;
    std::memcpy(&value, data<char>() + i * element_bytes_, size_t(element_bytes_));
    return double(value);
  }
  switch (dtype) {
    case DType::f32: return data<float>()[i];
    case DType::f64: return data<double>()[i];
    case DType::bf16: return __builtin_bit_cast(float, uint32_t(data<uint16_t>()[i]) << 16);
    case DType::f16: return cuda_on_cpu::half_to_float(data<uint16_t>()[i]);
  }
  return 0;
}

Array output(DType dtype, int64_t count, int skip) { return Array(dtype, count, size_of(dtype), false, skip); }
Array normal(DType dtype, int64_t count, int skip) {
  return random(dtype, count, skip, std::normal_distribution<double>());
}
Array uniform(DType dtype, int64_t count, double low, double high, int skip) {
  return random(dtype, count, skip, std::uniform_real_distribution<double>(low, high));
}

void check(const std::string& name, const std::vector<Array*>& written, const std::function<Status()>& cpu,
           const std::function<Status()>& cuda) {
  ++g_cases;
  for (const Array* a : written) a->reset();
  if (cpu() != Status::ok) return fail(name, "the CPU kernel refused");
  std::vector<std::vector<double>> expected;
  for (const Array* a : written) {
    expected.emplace_back();
    for (int64_t i = 0; i < a->count(); ++i) expected.back().push_back(a->at(i));
  }
  std::vector<std::vector<char>> first;
  // The third time as if 2^31 were 100, or 1: a launcher that cuts large problems gives a launch few images, or one.
  enum class Pass { ascending, descending, cut };
  cuda_on_cpu::cuts = false;
  for (const Pass pass : {Pass::ascending, Pass::descending, Pass::cut}) {
    if (pass == Pass::cut && !cuda_on_cpu::cuts) continue;
    g_cut += pass == Pass::cut;
    cuda_on_cpu::longest_run = pass != Pass::cut ? kLongestRun : g_cut % 2 ? 100 : 1;
    cuda_on_cpu::descending = pass == Pass::descending;
    for (const Array* a : written) a->reset();
    if (cuda() != Status::ok) return fail(name, "the CUDA kernel refused");
    for (size_t k = 0; k < written.size(); ++k) {
      const Array& a = *written[k];
      if (pass == Pass::ascending) first.emplace_back(a.data<char>(), a.data<char>() + a.bytes());
      else if (std::memcmp(first[k].data(), a.data(), first[k].size()))
        return fail(name, pass == Pass::cut ? "cut into launches it differs" : "a race: the order matters");
    }
  }
  for (size_t k = 0; k < written.size(); ++k) compare(name, k, *written[k], expected[k]);
}

Test::Test(const char* family, void (*run)()) { tests().emplace_back(family, run); }

}  // namespace harness

extern "C" const char* __asan_default_options() { return "detect_leaks=0:detect_stack_use_after_return=0"; }

int main(int argc, char** argv) {
  std::sort(harness::tests().begin(), harness::tests().end());
  for (auto& [family, run] : harness::tests())
    if (argc == 1 ? family.rfind("planted", 0) != 0 : std::find(argv + 1, argv + argc, family) != argv + argc) run();
  for (const void* kernel : cuda_on_cpu::launched_kernels()) std::printf("kernel %p\n", kernel);
  std::printf("%d cases, %d cut, %d failed\n", harness::g_cases, harness::g_cut, harness::g_failures);
  return harness::g_failures != 0;
}
