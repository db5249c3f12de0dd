// Every thread of a block is a fiber, which runs until it has to wait for its warp or its block. A warp-wide operation
// runs once all 32 lanes have arrived at it, with the fragment layouts of the PTX ISA ("Matrix Fragments for
// mma.m16n8k16").
// Accesses to shared memory are checked in units of 16 bytes. A copy must not land where another thread may still read.
// A thread must not read another thread's copy before a barrier. The 8 rows of a matrix must not share banks.
#include "emulator.h"

#include <csetjmp>
#include <deque>
#include <memory>
#include <vector>

#include <ucontext.h>

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kUnit = 16;  // bytes of a copy, and of a row that ldmatrix reads
constexpr int kGuardBytes = 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in float16, bfloat16 and float32

enum class Wait { kNothing, kMeet, kShuffle, kLoad, kLoadTransposed, kMultiply, kMultiplyBfloat16, kBarrier, kEnd };

struct Copy {
  uint32_t shared;
  const void* global;  // null copies zeros
};

struct Thread {
  ucontext_t context;
  jmp_buf resume_point;
  bool started;
  Wait wait;
  // operands of the operation that it waits for
  float* sum;
  const uint32_t* a;
  uint32_t b[2];
  uint32_t* matrices;
  uint32_t row;
  int mask;
  std::vector<Copy> open;                // copies of the group not yet committed
  std::deque<std::vector<Copy>> groups;  // committed groups that have not landed yet
};

struct Unit {
  int writer = -1, write_phase = -1;    // thread whose copy landed here, and the number of barriers passed by then
  int reader = -1, read_phase = -1;     // last thread that read, and its phase; -2 if several read in that phase
};

struct Block {
  std::vector<Thread> threads;
  std::vector<char> stacks;
  std::vector<Unit> units;
  std::vector<uint32_t> rows;
  unsigned char* shared;
  int64_t shared_bytes;
  Schedule schedule;
  const std::function<void()>* kernel;
  int phase;  // number of barriers passed
  int current;
  jmp_buf scheduler;
  std::string error;
} block;

void suspend(Wait wait) {
  Thread& self = block.threads[block.current];
  self.wait = wait;
  if (_setjmp(self.resume_point) == 0) _longjmp(block.scheduler, 1);
}

void run_fiber() {
  (*block.kernel)();
  suspend(Wait::kEnd);
}

void resume(int index) {
  Thread& thread = block.threads[index];
  block.current = index;
  threadIdx = {static_cast<unsigned>(index), 0, 0};
  thread.wait = Wait::kNothing;
  if (_setjmp(block.scheduler) != 0) return;
  if (thread.started) _longjmp(block.threads[block.current].resume_point, 1);
  thread.started = true;
  setcontext(&thread.context);
}

void fail(const std::string& what) {
  if (block.error.empty()) {
    block.error = "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(block.current) + ": " + what;
  }
}

bool inside(uint32_t address) {
  if (address % kUnit == 0 && address + kUnit <= block.shared_bytes) return true;
  fail("shared address " + std::to_string(address) + " is unaligned or beyond " + std::to_string(block.shared_bytes));
  return false;
}

void land(const Copy& copy) {
  if (copy.global) {
    std::memcpy(block.shared + copy.shared, copy.global, kUnit);
  } else {
    std::memset(block.shared + copy.shared, 0, kUnit);
  }
  Unit& unit = block.units[copy.shared / kUnit];
  unit.writer = block.current;
  unit.write_phase = block.phase;
}

float decoded(uint16_t bits, bool bfloat16) {
  static const auto tables = [] {
    auto both = std::make_unique<std::vector<float>[]>(2);
    for (int kind = 0; kind < 2; ++kind) {
      for (uint32_t value = 0; value < 65536; ++value) {
        const uint32_t sign = (value & 0x8000) << 16, exponent = value >> 10 & 31, fraction = value & 1023;
        uint32_t single = value << 16;  // bfloat16
        if (kind == 0 && exponent == 31) single = sign | 0x7f800000 | fraction << 13;
        if (kind == 0 && exponent > 0 && exponent < 31) single = sign | (exponent + 112) << 23 | fraction << 13;
        float number;
        std::memcpy(&number, &single, 4);
        if (kind == 0 && exponent == 0) number = std::ldexp(static_cast<float>(fraction), -24) * (sign ? -1 : 1);
        both[kind].push_back(number);
      }
    }
    return both;
  }();
  return tables[bfloat16][bits];
}

void do_load(Thread* lanes, bool transposed) {
  uint16_t elements[4][8][8];
  unsigned banks[4] = {};  // for each matrix, a bit for each group of four banks that its rows lie in
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const uint32_t address = lanes[lane].row;
    if (!inside(address)) return;
    banks[lane / 8] |= 1u << address / kUnit % 8;
    Unit& unit = block.units[address / kUnit];
    const int thread = static_cast<int>(&lanes[lane] - block.threads.data());
    if (unit.writer != thread && unit.write_phase == block.phase) fail("reads another's copy before a barrier");
    unit.reader = unit.read_phase == block.phase && unit.reader != thread ? -2 : thread;
    unit.read_phase = block.phase;
    std::memcpy(elements[lane / 8][lane % 8], block.shared + address, kUnit);
  }
  for (const unsigned bits : banks) {
    if (bits != 0xff) fail("rows of a matrix share banks");
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint16_t low = transposed ? elements[matrix][column][row] : elements[matrix][row][column];
      const uint16_t high = transposed ? elements[matrix][column + 1][row] : elements[matrix][row][column + 1];
      lanes[lane].matrices[matrix] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

void do_multiply(Thread* lanes, bool bfloat16) {
  float a[16][16], b[16][8], sum[16][8];
  const auto low = [&](uint32_t pair) { return decoded(pair & 0xffff, bfloat16); };
  const auto high = [&](uint32_t pair) { return decoded(pair >> 16, bfloat16); };
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Thread& thread = lanes[lane];
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      a[g + i % 2 * 8][2 * t + i / 2 * 8] = low(thread.a[i]);
      a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = high(thread.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * t + 8 * i][g] = low(thread.b[i]);
      b[2 * t + 8 * i + 1][g] = high(thread.b[i]);
    }
    for (int i = 0; i < 4; ++i) sum[g + i / 2 * 8][2 * t + i % 2] = thread.sum[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int i = 0; i < 4; ++i) lanes[lane].sum[i] = sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

void do_shuffle(Thread* lanes) {
  float values[kWarpSize];
  for (int lane = 0; lane < kWarpSize; ++lane) values[lane] = *lanes[lane].sum;
  for (int lane = 0; lane < kWarpSize; ++lane) *lanes[lane].sum = values[lane ^ lanes[lane].mask];
}

// Runs a warp until all of its threads wait at a barrier or have ended.
void run_warp(int warp) {
  Thread* lanes = &block.threads[warp * kWarpSize];
  while (block.error.empty()) {
    for (int lane = 0; lane < kWarpSize; ++lane) resume(warp * kWarpSize + lane);
    for (int lane = 1; lane < kWarpSize; ++lane) {
      if (lanes[lane].wait != lanes[0].wait) return fail("its warp is divided at a warp-wide operation");
    }
    switch (lanes[0].wait) {
      case Wait::kShuffle: do_shuffle(lanes); break;
      case Wait::kLoad: do_load(lanes, false); break;
      case Wait::kLoadTransposed: do_load(lanes, true); break;
      case Wait::kMultiply: do_multiply(lanes, false); break;
      case Wait::kMultiplyBfloat16: do_multiply(lanes, true); break;
      case Wait::kMeet: break;
      default: return;
    }
  }
}

void run_block() {
  const int threads = static_cast<int>(block.threads.size()), warps = threads / kWarpSize;
  std::memset(block.shared, kPoison, block.shared_bytes + kGuardBytes);
  block.units.assign(block.shared_bytes / kUnit + 1, {});
  block.phase = 0;
  for (int i = 0; i < threads; ++i) {
    Thread& thread = block.threads[i];
    thread.started = false;
    thread.open.clear();
    thread.groups.clear();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = &block.stacks[i * kStackBytes];
    thread.context.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.context, run_fiber, 0);
  }
  do {
    for (int i = 0; i < warps; ++i) run_warp(block.schedule == Schedule::kEarly ? warps - 1 - i : i);
    for (const Thread& thread : block.threads) {
      if (thread.wait != block.threads[0].wait) fail("some threads wait at a barrier, others have ended");
    }
    ++block.phase;
  } while (block.error.empty() && block.threads[0].wait == Wait::kBarrier);
  for (int i = 0; i < kGuardBytes; ++i) {
    if (block.shared[block.shared_bytes + i] != kPoison) fail("wrote beyond its shared memory");
  }
}

}  // namespace

void barrier() { suspend(Wait::kBarrier); }

void meet() { suspend(Wait::kMeet); }

float shuffle_xor(float value, int mask) {
  Thread& self = block.threads[block.current];
  self.sum = &value;
  self.mask = mask;
  suspend(Wait::kShuffle);
  return value;
}

void load_matrices(uint32_t (&matrices)[4], uint32_t row, bool transposed) {
  Thread& self = block.threads[block.current];
  self.matrices = matrices;
  self.row = row;
  suspend(transposed ? Wait::kLoadTransposed : Wait::kLoad);
}

void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bfloat16) {
  Thread& self = block.threads[block.current];
  self.sum = sum;
  self.a = a;
  self.b[0] = b0;
  self.b[1] = b1;
  suspend(bfloat16 ? Wait::kMultiplyBfloat16 : Wait::kMultiply);
}

void copy_16(uint32_t shared, const void* global, bool valid) {
  if (!inside(shared)) return;
  if (reinterpret_cast<uintptr_t>(global) % kUnit != 0) fail("copies from an unaligned address");
  const Unit& unit = block.units[shared / kUnit];
  if (unit.read_phase == block.phase && unit.reader != block.current) fail("copies over what another may still read");
  const Copy copy{shared, valid ? global : nullptr};
  if (block.schedule == Schedule::kEarly) land(copy);
  block.threads[block.current].open.push_back(copy);
}

void commit_copies() {
  Thread& self = block.threads[block.current];
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

void wait_for_copies(int pending) {
  Thread& self = block.threads[block.current];
  for (; self.groups.size() > static_cast<size_t>(pending); self.groups.pop_front()) {
    for (const Copy& copy : self.groups.front()) land(copy);
  }
}

std::string launch(int64_t blocks, int threads, int64_t shared_bytes, Schedule schedule, unsigned char* shared_memory,
                   const std::function<void()>& kernel) {
  if (shared_bytes > kMaxSharedBytes) return "more shared memory than any GPU has: " + std::to_string(shared_bytes);
  block.threads.resize(threads);
  block.stacks.resize(threads * kStackBytes);
  block.shared = shared_memory;
  block.shared_bytes = shared_bytes;
  block.schedule = schedule;
  block.kernel = &kernel;
  block.error.clear();
  blockDim = dim3(threads);
  for (int64_t i = 0; i < blocks && block.error.empty(); ++i) {
    blockIdx = {static_cast<unsigned>(i), 0, 0};
    run_block();
  }
  return block.error;
}

}  // namespace emulator
