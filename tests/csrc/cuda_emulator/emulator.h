// An emulator that runs CUDA kernels on the host, one block at a time, with a fiber for each thread (see emulator.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#include <cuda_runtime.h>

#define __launch_bounds__(...)

// CUDA's built-in variables of a thread. They are set whenever a fiber is resumed.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim;
using std::max;
using std::min;

namespace emulator {

constexpr int kWarpSize = 32;
constexpr int64_t kMaxSharedBytes = 227 * 1024;

// Two extreme orders of events. On a GPU the order may differ from run to run.
enum class Schedule {
  kLate,   // warps in ascending order, each as far as it can go; copies land only when they are waited for
  kEarly,  // warps in descending order; copies land as soon as they are issued
};

// Runs `kernel` as a grid of `blocks` x `threads`. Shared memory holds NaN at first. Returns the first error, or "".
std::string launch(int64_t blocks, int threads, int64_t shared_bytes, Schedule schedule, unsigned char* shared_memory,
                   const std::function<void()>& kernel);

// Operations that threads call. A warp-wide operation waits for all 32 threads of the warp, a barrier for the block's.
void barrier();
void meet();
float shuffle_xor(float value, int mask);
void load_matrices(uint32_t (&matrices)[4], uint32_t row, bool transposed);
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bfloat16);
void copy_16(uint32_t shared, const void* global, bool valid);
void commit_copies();
void wait_for_copies(int pending);

}  // namespace emulator

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp() { emulator::meet(); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __shfl_xor_sync(unsigned, float value, int mask) { return emulator::shuffle_xor(value, mask); }
