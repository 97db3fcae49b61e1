// The scheduler of cuda_on_cpu.h: the fibres of a block, their barriers, and the block's shared memory.
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <memory>

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

bool descending = false;

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kMaxThreads = 1024, kWarp = 32;
constexpr size_t kMaxSharedBytes = 99 << 10;  // what every device of compute capability 8.0 and later grants a block

enum class State { ready, at_barrier, in_warp_operation, done };

struct Fibre {
  ucontext_t context;
  char* stack = nullptr;
  void* sanitizer_stack = nullptr;
  dim3 index;
  State state;
  size_t exchange_bytes;
  alignas(16) char slot[kSlot];  // what it brings to a warp operation
};

struct Shared {
  const void* key;
  size_t bytes;
  std::unique_ptr<char[]> memory;
};

struct Block {
  std::vector<Fibre> fibres = std::vector<Fibre>(kMaxThreads);
  std::vector<char> exchanged = std::vector<char>(kMaxThreads * kSlot);  // the last warp operation of each warp
  std::vector<Shared> shared;
  ucontext_t scheduler;
  void* sanitizer_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  unsigned current = 0, threads = 0;
  const std::function<void()>* thread = nullptr;
};
Block g;
std::vector<const void*> g_launched;

constexpr char kDynamic = 0;

void suspend(State state) {
  Fibre& fibre = g.fibres[g.current];
  fibre.state = state;
  __sanitizer_start_switch_fiber(state == State::done ? nullptr : &fibre.sanitizer_stack, g.scheduler_stack,
                                 g.scheduler_stack_bytes);
  swapcontext(&fibre.context, &g.scheduler);
  __sanitizer_finish_switch_fiber(fibre.sanitizer_stack, nullptr, nullptr);
}

void fibre_main() {
  __sanitizer_finish_switch_fiber(nullptr, &g.scheduler_stack, &g.scheduler_stack_bytes);
  (*g.thread)();
  suspend(State::done);
}

void resume(unsigned i) {
  Fibre& fibre = g.fibres[i];
  g.current = i;
  threadIdx = fibre.index;
  __sanitizer_start_switch_fiber(&g.sanitizer_stack, fibre.stack, kStackBytes);
  swapcontext(&g.scheduler, &fibre.context);
  __sanitizer_finish_switch_fiber(g.sanitizer_stack, nullptr, nullptr);
}

bool all_in(unsigned begin, unsigned end, State state) {
  return std::all_of(&g.fibres[begin], &g.fibres[begin] + (end - begin), [&](Fibre& f) { return f.state == state; });
}

// Lets go of the warps whose lanes have all reached a warp operation, and of the block when all have reached a barrier.
bool release() {
  bool progress = false;
  for (unsigned w = 0; w < g.threads; w += kWarp) {
    if (!all_in(w, w + kWarp, State::in_warp_operation)) continue;
    for (unsigned i = w; i < w + kWarp; ++i) {
      require(g.fibres[i].exchange_bytes == g.fibres[w].exchange_bytes, "lanes of a warp in different operations");
      std::memcpy(&g.exchanged[i * kSlot], g.fibres[i].slot, kSlot);
      g.fibres[i].state = State::ready;
    }
    progress = true;
  }
  if (all_in(0, g.threads, State::at_barrier)) {
    for (unsigned i = 0; i < g.threads; ++i) g.fibres[i].state = State::ready;
    progress = true;
  }
  return progress;
}

void run_block() {
  for (unsigned i = 0; i < g.threads; ++i) {
    Fibre& fibre = g.fibres[i];
    if (!fibre.stack)
      fibre.stack = static_cast<char*>(
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    fibre.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
    fibre.state = State::ready;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack;
    fibre.context.uc_stack.ss_size = kStackBytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, fibre_main, 0);
  }
  while (!all_in(0, g.threads, State::done)) {
    for (unsigned k = 0; k < g.threads; ++k) {
      const unsigned i = descending ? g.threads - 1 - k : k;
      if (g.fibres[i].state == State::ready) resume(i);
    }
    require(release() || all_in(0, g.threads, State::done), "a barrier or warp operation that some threads never reach");
  }
}

// New memory that reads as NaN in every floating type.
Shared poisoned(const void* key, size_t bytes) {
  Shared s{key, bytes, std::unique_ptr<char[]>(new char[bytes])};
  std::memset(s.memory.get(), 0xff, bytes);
  return s;
}

}  // namespace

void require(bool condition, const char* message) {
  if (condition) return;
  std::fprintf(stderr, "cuda_on_cpu: %s (block %u,%u,%u, thread %u,%u,%u)\n", message, blockIdx.x, blockIdx.y,
               blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  std::abort();
}

void* shared(const void* key, size_t bytes) {
  for (Shared& s : g.shared)
    if (s.key == key) return s.memory.get();
  g.shared.push_back(poisoned(key, bytes));
  size_t total = 0;
  for (Shared& s : g.shared) total += s.bytes;
  require(total <= kMaxSharedBytes, "more shared memory than a block may have");
  return g.shared.back().memory.get();
}
void* dynamic_shared() {
  require(!g.shared.empty() && g.shared[0].key == &kDynamic, "dynamic shared memory without any in the launch");
  return g.shared[0].memory.get();
}

void block_barrier() { suspend(State::at_barrier); }

const char* warp_exchange(const void* mine, size_t bytes) {
  require(bytes <= kSlot, "too large a value in a warp operation");
  Fibre& fibre = g.fibres[g.current];
  std::memcpy(fibre.slot, mine, bytes);
  fibre.exchange_bytes = bytes;
  suspend(State::in_warp_operation);
  return &g.exchanged[g.current / kWarp * kWarp * kSlot];
}
unsigned lane() { return g.current % kWarp; }

std::vector<const void*> launched_kernels() { return g_launched; }

void run_grid(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  if (std::find(g_launched.begin(), g_launched.end(), kernel) == g_launched.end()) g_launched.push_back(kernel);
  g.threads = block.x * block.y * block.z;
  g.thread = &thread;
  blockDim = block;
  gridDim = grid;
  require(g.threads > 0 && g.threads <= kMaxThreads && g.threads % kWarp == 0 && block.z <= 64, "block size");
  require(grid.x > 0 && grid.x <= 0x7fffffffu && grid.y > 0 && grid.y <= 65535 && grid.z > 0 && grid.z <= 65535,
          "grid size");
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t k = 0; k < blocks; ++k) {
    const uint64_t b = descending ? blocks - 1 - k : k;
    blockIdx = dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
    g.shared.clear();
    if (shared_bytes) g.shared.push_back(poisoned(&kDynamic, shared_bytes));
    run_block();
  }
  g.shared.clear();
}

}  // namespace cuda_on_cpu
