// A replacement of csrc/tensor_core.cuh with the same functions, which call the emulator.
#pragma once

#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"

namespace tinydrop {

extern unsigned char shared_memory[];

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - shared_memory);
}
template <typename T>
T* strided(T* start, int index, int stride) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(start) + int64_t{index} * stride);
}
inline void ldmatrix_x4(uint32_t (&matrices)[4], uint32_t row) { emulator::load_matrices(matrices, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&matrices)[4], uint32_t row) { emulator::load_matrices(matrices, row, true); }
template <typename T>
void mma_16816(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply(sum, a, b0, b1, std::is_same_v<T, __nv_bfloat16>);
}
inline void cp_async_16(uint32_t shared, const void* global, bool valid) { emulator::copy_16(shared, global, valid); }
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  emulator::wait_for_copies(kPending);
}
inline float exp2_approx(float x) { return std::exp2(x); }

}  // namespace tinydrop
