// How a batch is cut into blocks: plain arithmetic.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include <cuda_runtime.h>

namespace tinydrop {

constexpr int kRowBlock = 16;       // query rows of a warp at a time: the height of an mma
constexpr int kKeyStep = 32;        // keys of a step of the online softmax; lengths are padded to it
constexpr int kKeyTile = 64;        // keys that are copied at a time
constexpr int kStreamedTiles = 2;   // key tiles in shared memory where not all fit: one in use, one arriving
constexpr int kMaxWarps = 8;
constexpr int kMinWarps = 2;        // also where one has all rows: the other helps to copy the keys
constexpr int kWarpsPerMultiprocessor = 16;  // as many as the registers of the kernel for head_dim 64 allow
constexpr int kMaxRowBlocks = 24;            // of a block whose keys all stay: 384 rows

// Head dimensions that kernels are compiled for; others are padded with zeros, in shared memory only.
// ViTs: 64 nearly everywhere, 72 (SO400M) and 80 (ViT-H), 88 (ViT-g), 104 (ViT-G), 32 and 16 in small ones.
constexpr int kHeadDims[] = {16, 32, 64, 80, 96, 128};
constexpr int kMaxHeadDim = 128;

inline int padded_head_dim(int head_dim) {
  return *std::find_if(std::begin(kHeadDims), std::end(kHeadDims), [=](int padded) { return padded >= head_dim; });
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of a relative-position bias on a patch grid: how many values a patch's code has (BiasCodes in varlen_attention.cuh),
// and how many floats its table takes in shared memory, even so that pairs of ints may follow.
__host__ __device__ constexpr int64_t position_codes(int64_t rows, int64_t columns) {
  return 2 * rows * columns - rows - columns + 1;
}
__host__ __device__ constexpr int64_t bias_floats(int64_t codes) { return (5 * codes + 1) / 2 * 2; }

struct LaunchPlan {
  int warps;                 // of a block
  int row_blocks_per_warp;   // one after the other, warp by warp
  int64_t query_blocks;      // blocks to cover the rows of the longest segment
  int key_capacity;          // keys that shared memory holds
  bool streams_keys;         // whether key tiles pass through shared memory instead of staying
  int64_t shared_bytes;      // dynamic shared memory of a block

  __host__ __device__ int rows_per_block() const { return warps * row_blocks_per_warp * kRowBlock; }
};

// | a segment, twice, fits a multiprocessor's shared memory | yes                     | no                      |
// |--------------------------------------------------------|-------------------------|-------------------------|
// | keys and values                                        | all stay                | pass by in tiles of 64  |
// | rows of a block                                        | the segment's, <= 384   | <= 128                  |
// | warps of a block                                       | 2 to 8                  | 2 to 8                  |
// | row blocks of a warp                                   | as many as that takes   | 1                       |
//
// Reading is what these lengths wait for, so all of a segment is requested at once where it fits, and as many blocks as
// shared memory holds should have their registers: one computes while others load. Hence few warps where segments are
// short, each with several row blocks; in a ragged batch most segments are shorter than the longest, for which the
// block is made. Warps get equal numbers of row blocks: 197 rows are 13 row blocks, two for each of 7 warps.
// By calculation; not measured on a GPU.
inline LaunchPlan plan_launch(int64_t max_seqlen_q, int64_t max_seqlen_k, int head_dim, int64_t bias_codes,
                              int64_t shared_bytes_per_multiprocessor) {
  constexpr int64_t kReservedBytes = 1024;  // what the system takes of each block's share
  constexpr int64_t kElementBytes = 2;
  const int64_t row_bytes = padded_head_dim(head_dim) * kElementBytes;
  const int64_t row_blocks = std::max<int64_t>(divide_up(max_seqlen_q, kRowBlock), 1);

  const auto shared_bytes = [&](int64_t row_blocks, int64_t keys) {
    const int64_t bias_bytes = bias_codes > 0 ? (bias_floats(bias_codes) + keys) * 4 : 0;
    return (row_blocks * kRowBlock + 2 * keys) * row_bytes + bias_bytes;
  };
  const auto blocks_that_fit = [&](int64_t bytes) {
    return shared_bytes_per_multiprocessor / (bytes + kReservedBytes);
  };
  // Cuts the rows into query_blocks of at most `most` row blocks, and these into warps.
  const auto cut = [&](bool streams_keys, int64_t keys, int64_t most, int64_t warps) {
    const int64_t query_blocks = divide_up(row_blocks, most);
    const int64_t row_blocks_per_block = divide_up(row_blocks, query_blocks);
    const int64_t per_warp = divide_up(row_blocks_per_block, warps);
    const int64_t used_warps = std::max<int64_t>(divide_up(row_blocks_per_block, per_warp), kMinWarps);
    return LaunchPlan{static_cast<int>(used_warps),
                      static_cast<int>(per_warp),
                      query_blocks,
                      static_cast<int>(std::min<int64_t>(keys, INT32_MAX)),
                      streams_keys,
                      shared_bytes(used_warps * per_warp, keys)};
  };

  const int64_t keys = std::max<int64_t>(divide_up(max_seqlen_k, kKeyStep), 1) * kKeyStep;
  const int64_t blocks = blocks_that_fit(shared_bytes(std::min<int64_t>(row_blocks, kMaxRowBlocks), keys));
  if (blocks >= 2) {
    const int64_t warps = std::clamp<int64_t>(kWarpsPerMultiprocessor / blocks, kMinWarps, kMaxWarps);
    const LaunchPlan plan = cut(false, keys, kMaxRowBlocks, warps);
    if (blocks_that_fit(plan.shared_bytes) >= 2) return plan;
  }
  return cut(true, kStreamedTiles * kKeyTile, kMaxWarps, kMaxWarps);
}

}  // namespace tinydrop
