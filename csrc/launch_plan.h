// The launch plan of the attention kernel: the division of a batch into blocks and warps. Plain arithmetic only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include <cuda_runtime.h>

namespace tinydrop {

constexpr int kRowBlock = 16;       // query rows that a warp processes at a time: the height of an mma
constexpr int kKeyStep = 32;        // keys in a step of the online softmax; segment lengths are padded to it
constexpr int kKeyTile = 64;        // keys that are copied at a time
constexpr int kStreamedTiles = 2;   // key tiles in shared memory if not all fit: one in use, one arriving
constexpr int kMaxWarps = 8;
constexpr int kMinWarps = 2;        // even if one warp has all rows, because the other helps to copy the keys
constexpr int kWarpsPerMultiprocessor = 16;  // as many as the registers of the kernel for head_dim 64 allow
constexpr int kMaxRowBlocks = 24;            // limit for a block that holds all keys: 384 rows

// Head dimensions that kernels are compiled for. Other head dimensions are padded with zeros, in shared memory only.
// ViTs: 64 nearly everywhere, 72 (SO400M) and 80 (ViT-H), 88 (ViT-g), 104 (ViT-G), 32 and 16 in small ones.
constexpr int kHeadDims[] = {16, 32, 64, 80, 96, 128};
constexpr int kMaxHeadDim = 128;

inline int padded_head_dim(int head_dim) {
  return *std::find_if(std::begin(kHeadDims), std::end(kHeadDims), [=](int padded) { return padded >= head_dim; });
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes of a relative position bias on a patch grid: the number of values of a patch's code (BiasCodes in
// varlen_attention.cuh), and the floats of its table in shared memory, an even number so that pairs of ints may follow.
__host__ __device__ constexpr int64_t position_codes(int64_t rows, int64_t columns) {
  return 2 * rows * columns - rows - columns + 1;
}
__host__ __device__ constexpr int64_t bias_floats(int64_t codes) { return (5 * codes + 1) / 2 * 2; }

struct LaunchPlan {
  int warps;                 // warps in a block
  int row_blocks_per_warp;   // processed one after the other; the warps of a block take turns
  int64_t query_blocks;      // blocks that cover the rows of the longest segment
  int key_capacity;          // keys that shared memory holds
  bool streams_keys;         // whether key tiles pass through shared memory instead of staying
  int64_t shared_bytes;      // dynamic shared memory of a block

  __host__ __device__ int rows_per_block() const { return warps * row_blocks_per_warp * kRowBlock; }
};

// | two blocks with a whole segment fit a multiprocessor   | yes                     | no                      |
// |--------------------------------------------------------|-------------------------|-------------------------|
// | keys and values in shared memory                       | all of the segment      | in turn, tiles of 64    |
// | rows of a block                                        | the segment's, <= 384   | <= 128                  |
// | warps of a block                                       | 2 to 8                  | 2 to 8                  |
// | row blocks of a warp                                   | as many as needed       | 1                       |
//
// Segments of these lengths mostly wait for memory. A block therefore requests the whole segment at once if it fits.
// All blocks that shared memory holds should also have their registers, so that one block computes while others load.
// Blocks for short segments therefore have few warps with several row blocks each. A block is sized for the longest
// segment, although most segments of a ragged batch are shorter. Warps get equal numbers of row blocks. For example,
// 197 rows are 13 row blocks, two for each of 7 warps. These choices are calculated, not measured on a GPU.
inline LaunchPlan plan_launch(int64_t max_seqlen_q, int64_t max_seqlen_k, int head_dim, int64_t bias_codes,
                              int64_t shared_bytes_per_multiprocessor) {
  constexpr int64_t kReservedBytes = 1024;  // the system's share of each block's shared memory
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
  // Divides the rows into blocks of at most `most` row blocks, and each block's row blocks among its warps.
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
