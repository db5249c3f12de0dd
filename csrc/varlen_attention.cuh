// The attention kernel: softmax attention within each segment of a packed batch. It is made for short segments, which
// take more time to read than to compute.
#pragma once

#include <cfloat>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch_plan.h"
#include <tensor_core.cuh>  // angle brackets, so that tests can put an emulation first on the include path

namespace tinydrop {

// A view (rows, heads, head_dim) of 16-bit elements whose last stride is 1 and whose rows are 16-byte aligned.
struct View {
  const void* data;
  int64_t row_stride, head_stride;  // in elements
};
constexpr int64_t kMaxRowStride = (int64_t{1} << 30) - 1;  // of the inputs and of out; in bytes it fits an int

struct AttentionArguments {
  View query;                // (total_q, heads, head_dim)
  View key, value;           // (total_k, heads, head_dim)
  void* out;                 // (total_q, heads, head_dim), contiguous
  const int* cu_seqlens_q;   // (batch + 1,)
  const int* cu_seqlens_k;   // (batch + 1,)
  View bias_table;           // (distances, heads), any alignment; its data is null without a bias
  const int* positions;      // (total_q,), patch numbers in raster order; a negative number is the class token
  int grid_rows, grid_columns;
  int class_token_entries;   // whether the table's last three rows are for the class token
  int heads, head_dim;
  float scale_log2;          // scale * log2(e), because the softmax uses base 2
  LaunchPlan plan;
};

constexpr float kLog2e = 1.4426950408889634f;

// Rows of kHeadDim 16-bit elements in shared memory, divided into chunks of 16 bytes. ldmatrix reads the same chunk of
// 8 consecutive rows at a time. The chunks of a row are permuted (XOR) so that these 8 chunks lie in 8 different groups
// of banks. Without the permutation the banks would repeat every 8 / kPermuted rows; kPermuted is gcd(kChunks, 8).
// Addresses are in bytes. The first row's address must be a multiple of 128.
template <int kHeadDim>
struct SharedRows {
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kRowBytes = kChunks * 16;
  static constexpr int kPermuted = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;  // chunks that swap places

  __device__ static int address(int row, int chunk) {
    return row * kRowBytes + (chunk ^ row * kPermuted / 8 % kPermuted) * 16;
  }
  // Returns the address `chunks` chunks further in the same row. `address` must be that of chunk 0, or that of chunk 1
  // if `chunks` is even.
  __device__ static uint32_t advance(uint32_t address, int chunks) {
    return (address ^ chunks % kPermuted * 16) + chunks / kPermuted * kPermuted * 16;
  }
};

// The rows of one head from `first` on, and their destination in shared memory.
struct CopiedRows {
  uint32_t shared;
  int row_bytes;
  const uint16_t* data;

  __device__ CopiedRows(uint32_t shared, const View& view, int first, int head)
      : shared(shared),
        row_bytes(2 * static_cast<int>(view.row_stride)),
        data(strided(static_cast<const uint16_t*>(view.data) + head * view.head_stride, first, row_bytes)) {}
};

// Copies this thread's share of `count` rows (a multiple of 8) of each tensor to shared memory. Elements beyond `valid`
// rows or head_dim columns become zeros. A warp copies 8 rows at a time, because the permutation repeats after 8 rows,
// and kLanes chunks of each row, because these are whole groups of permuted chunks. So a lane computes its addresses
// before the loop and adds a constant for each further group of chunks.
template <int kHeadDim, int kTensors>
__device__ __forceinline__ void load_rows(const CopiedRows (&tensors)[kTensors], int count, int valid, int head_dim) {
  using Rows = SharedRows<kHeadDim>;
  constexpr int kTogether = 8, kLanes = Rows::kPermuted == 8 ? 8 : 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int top = warp * kTogether; top < count; top += warps * kTogether) {
#pragma unroll
    for (int i = 0; i < kTogether; i += 32 / kLanes) {
      const int row = i + lane / kLanes, chunk = lane % kLanes;
#pragma unroll
      for (const CopiedRows& rows : tensors) {
        const uint32_t to = rows.shared + top * Rows::kRowBytes + Rows::address(row, chunk);
        const uint16_t* from = strided(rows.data + chunk * 8, top + row, rows.row_bytes);
#pragma unroll
        for (int group = 0; group < Rows::kChunks; group += kLanes) {
          if (Rows::kChunks % kLanes != 0 && group + chunk >= Rows::kChunks) continue;
          cp_async_16(to + group * 16, from + group * 8, top + row < valid && (group + chunk) * 8 < head_dim);
        }
      }
    }
  }
}

// Waits until at most `pending` groups of this thread's copies are pending. For more than 3 it waits for all but 3,
// because the instruction takes a constant.
__device__ __forceinline__ void wait_for_copies(int pending) {
  switch (pending) {
    case 0: return cp_async_wait<0>();
    case 1: return cp_async_wait<1>();
    case 2: return cp_async_wait<2>();
    default: return cp_async_wait<3>();
  }
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  }
  return bits;
}

// Return the maximum and the sum over the four lanes that share a row.
__device__ __forceinline__ float row_maximum(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ __forceinline__ float row_total(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// The lookup of a relative position bias. In BEiT's table the entry of query patch q and key patch k has the number
//   (q.y - k.y + rows - 1) * (2 columns - 1) + (q.x - k.x + columns - 1).
// This equals code(q) - code(k) + codes - 1 with code(p) = p.y * (2 columns - 1) + p.x. Every code is below `codes`,
// the number of the table's middle entry plus one. The last three entries are for (class query, patch key),
// (patch query, class key) and (class query, class key). In shared memory these three are repeated, so that every entry
// is found by one subtraction, query_code(q) - key_code(k):
//   [0, 2 codes - 1)           patch query, patch key
//   [2 codes - 1, 3 codes - 1) patch query, class key
//   [3 codes - 1, 4 codes - 1) class query, patch key
//   5 codes - 2                class query, class key
struct BiasCodes {
  int codes, columns;

  __device__ int key_code(int position) const {
    return position < 0 ? -codes : position + position / columns * (columns - 1);
  }
  __device__ int query_code(int position) const {
    return position < 0 ? 4 * codes - 2 : key_code(position) + codes - 1;
  }
  __device__ int entries() const { return 5 * codes - 1; }
  // Returns the row of the global table from which an entry of the shared table is copied.
  __device__ int table_row(int entry) const {
    const int distances = 2 * codes - 1;
    if (entry < distances) return entry;
    if (entry < distances + codes) return distances + 1;
    return entry < entries() - 1 ? distances : distances + 2;
  }
};

// The running softmax of a warp's 16 query rows over the keys seen so far. A lane holds parts of rows lane / 4 and
// lane / 4 + 8.
template <int kHeadDim>
struct RowBlock {
  float out[kHeadDim / 8][4] = {};          // not yet divided by the sum
  float origin[2] = {-FLT_MAX, -FLT_MAX};   // score to which probabilities are relative, in base 2; never -inf, so that
                                            // a score of -inf has probability 0 even if all scores so far are -inf
  float sum[2] = {};                        // sum of probabilities in this lane's columns
};

// Performs one step of the online softmax: 16 query rows against kKeyStep keys. Only the first `keys` (>= 1) exist.
// Steps are short for two reasons. The scores of 64 keys would take 16 more registers, so that one block less would be
// resident at head_dim 64. Also, segment lengths are padded to whole steps.
// `query`, `key`, `value` are shared addresses of the first row. `table` and `key_codes` are used only with a bias.
template <typename T, int kHeadDim, bool kBias>
__device__ __forceinline__ void attend(RowBlock<kHeadDim>& rows, uint32_t query, uint32_t key, uint32_t value, int keys,
                                       bool first, float scale_log2, const float* table, const int (&query_codes)[2],
                                       const int* key_codes) {
  using Rows = SharedRows<kHeadDim>;
  const int lane = threadIdx.x % 32;
  const int column = 2 * (lane % 4);
  // The rows and chunks whose addresses this lane passes to ldmatrix. A key is a column of the score product and a row
  // of the value product.
  query += Rows::address(lane % 16, lane / 16);
  key += Rows::address(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  value += Rows::address(lane % 16, lane / 16);

  // Scores: 8 columns per array, laid out as mma_16816's sum. Query fragments are read again in every step. This is a
  // fifth of the shared-memory reads and saves kHeadDim / 4 registers.
  float scores[kKeyStep / 8][4] = {};
#pragma unroll
  for (int chunk = 0; chunk < Rows::kChunks; chunk += 2) {
    uint32_t q[4];
    ldmatrix_x4(q, Rows::advance(query, chunk));
#pragma unroll
    for (int group = 0; group < kKeyStep / 16; ++group) {
      uint32_t k[4];
      ldmatrix_x4(k, Rows::advance(key, chunk) + group * 16 * Rows::kRowBytes);
      mma_16816<T>(scores[2 * group], q, k[0], k[1]);
      mma_16816<T>(scores[2 * group + 1], q, k[2], k[3]);
    }
  }

  if constexpr (kBias) {
#pragma unroll
    for (int i = 0; i < kKeyStep / 8; ++i) {
      const int2 codes = *reinterpret_cast<const int2*>(key_codes + 8 * i + column);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scores[i][2 * r] = fmaf(scores[i][2 * r], scale_log2, table[query_codes[r] - codes.x]);
        scores[i][2 * r + 1] = fmaf(scores[i][2 * r + 1], scale_log2, table[query_codes[r] - codes.y]);
      }
    }
  }
  if (keys < kKeyStep) {
#pragma unroll
    for (int i = 0; i < kKeyStep / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (8 * i + column + j % 2 >= keys) scores[i][j] = -INFINITY;
      }
    }
  }

  // With a bias the scores are already in base 2. Without one, the exponent's multiply-add applies the scale.
  const float scale = kBias ? 1.0f : scale_log2;
  float maximum[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    maximum[r] = scores[0][2 * r];
#pragma unroll
    for (int i = 0; i < kKeyStep / 8; ++i) {
      maximum[r] = fmaxf(maximum[r], fmaxf(scores[i][2 * r], scores[i][2 * r + 1]));
    }
    maximum[r] = row_maximum(maximum[r]) * scale;
  }
  // The origin need not be the maximum, because the division by the sum cancels it. It changes only if probabilities
  // might exceed 2^8, so most steps need no correction. float16 holds values up to 2^16, which leaves a factor of 2^8
  // for rounding errors. That is enough for an origin of up to 2^27, far above the scores of any working network.
  constexpr float kSlack = 8;
  if (maximum[0] > rows.origin[0] + kSlack || maximum[1] > rows.origin[1] + kSlack) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float origin = fmaxf(rows.origin[r], maximum[r]);
      const float correction = exp2_approx(rows.origin[r] - origin);
      rows.origin[r] = origin;
      if (first) continue;  // out and sum are still zero
      rows.sum[r] *= correction;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        rows.out[i][2 * r] *= correction;
        rows.out[i][2 * r + 1] *= correction;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kKeyStep / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      scores[i][j] = exp2_approx(fmaf(scores[i][j], scale, -rows.origin[j / 2]));
      rows.sum[j / 2] += scores[i][j];
    }
  }

  // The layout of mma_16816's sum is that of the halves of its a, so the probabilities need no rearrangement.
#pragma unroll
  for (int group = 0; group < kKeyStep / 16; ++group) {
    const float(&low)[4] = scores[2 * group], (&high)[4] = scores[2 * group + 1];
    const uint32_t p[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(high[0], high[1]),
                           pack<T>(high[2], high[3])};
#pragma unroll
    for (int chunk = 0; chunk < Rows::kChunks; chunk += 2) {
      uint32_t v[4];
      ldmatrix_x4_trans(v, Rows::advance(value, chunk) + group * 16 * Rows::kRowBytes);
      mma_16816<T>(rows.out[chunk], p, v[0], v[1]);
      mma_16816<T>(rows.out[chunk + 1], p, v[2], v[3]);
    }
  }
}

extern __shared__ __align__(128) unsigned char shared_memory[];

// Divides by the sum and writes the first `valid` of 16 rows to global memory, 16 bytes per lane. The rows pass through
// 16 rows of shared memory that only this warp uses, `staging` bytes from its start. Rows without keys become zeros.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_rows(const RowBlock<kHeadDim>& rows, uint32_t staging, T* out, int row_bytes,
                                           int valid, int head_dim) {
  using Rows = SharedRows<kHeadDim>;
  const int lane = threadIdx.x % 32;
  const uint32_t mine = staging + Rows::address(lane / 4, 0) + lane % 4 * 4;
  __syncwarp();  // wait until every lane has read the query rows that are overwritten here
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = row_total(rows.sum[r]);
    const float inverse = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      const uint32_t pair = pack<T>(rows.out[i][2 * r] * inverse, rows.out[i][2 * r + 1] * inverse);
      *reinterpret_cast<uint32_t*>(shared_memory + Rows::advance(mine, i) + 8 * r * Rows::kRowBytes) = pair;
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kRowBlock * Rows::kChunks; i += 32) {
    const int row = (i + lane) / Rows::kChunks, chunk = (i + lane) % Rows::kChunks;
    if (row < valid && chunk * 8 < head_dim) {
      *reinterpret_cast<uint4*>(strided(out + chunk * 8, row, row_bytes)) =
          *reinterpret_cast<const uint4*>(shared_memory + staging + Rows::address(row, chunk));
    }
  }
}

// One block processes one head of up to plan.rows_per_block() query rows of one segment, against all keys of that
// segment. Each warp takes 16 rows at a time. The head varies fastest in the grid, so that neighbouring blocks read
// neighbouring bytes of the projection's output.
//
// Shared memory: query rows | key_capacity keys | their values | with a bias: its table, the codes of the keys.
// Copies run in groups of one key tile, so the first tile is multiplied while the others arrive. If not all tiles fit,
// tile t lies in half t % 2, and the next tile is fetched once every warp has finished the previous one. The registers
// suffice for two resident blocks of 8 warps up to head_dim 80 (64 with a bias). Beyond that, two blocks would make the
// compiler spill.
template <typename T, int kHeadDim, bool kBias>
__global__ void __launch_bounds__(kMaxWarps * 32, kHeadDim <= (kBias ? 64 : 80) ? 2 : 1)
    varlen_attention_kernel(const AttentionArguments a) {
  const int block = blockIdx.x, query_blocks = static_cast<int>(a.plan.query_blocks);
  const int head = block % a.heads;
  const int segment = block / a.heads / query_blocks;
  const int rows_per_block = a.plan.rows_per_block();
  const int first_row = a.cu_seqlens_q[segment] + block / a.heads % query_blocks * rows_per_block;
  const int num_rows = min(a.cu_seqlens_q[segment + 1] - first_row, rows_per_block);
  if (num_rows <= 0) return;
  const int first_key = a.cu_seqlens_k[segment];
  int num_keys = a.cu_seqlens_k[segment + 1] - first_key;
  if (!a.plan.streams_keys) num_keys = min(num_keys, a.plan.key_capacity);  // in case max_seqlen_k is too small
  const int tiles = (num_keys + kKeyTile - 1) / kKeyTile;

  constexpr int kRowBytes = SharedRows<kHeadDim>::kRowBytes;
  const uint32_t query = shared_address(shared_memory);
  const uint32_t key = query + rows_per_block * kRowBytes;
  const uint32_t value = key + a.plan.key_capacity * kRowBytes;
  float* table = reinterpret_cast<float*>(shared_memory + (rows_per_block + 2 * a.plan.key_capacity) * kRowBytes);
  const BiasCodes bias{static_cast<int>(position_codes(a.grid_rows, a.grid_columns)), a.grid_columns};
  int* key_codes = reinterpret_cast<int*>(table + bias_floats(bias.codes));

  auto place = [&](int tile) { return (a.plan.streams_keys ? tile % kStreamedTiles : tile) * kKeyTile; };
  auto load_tile = [&](int tile) {
    const int keys = min(num_keys - tile * kKeyTile, kKeyTile);
    const int padded = keys <= kKeyStep ? kKeyStep : kKeyTile;
    const int from = first_key + tile * kKeyTile, to = place(tile) * kRowBytes;
    load_rows<kHeadDim>({{key + to, a.key, from, head}, {value + to, a.value, from, head}}, padded, keys, a.head_dim);
    if constexpr (kBias) {
      for (int i = threadIdx.x; i < padded; i += blockDim.x) {
        key_codes[place(tile) + i] = i < keys ? bias.key_code(a.positions[from + i]) : 0;
      }
    }
  };

  const int ahead = a.plan.streams_keys ? min(tiles, 1) : tiles;  // tiles requested at the start
  for (int tile = 0; tile < ahead; ++tile) {
    if (tile == 0) {
      const int padded = (num_rows + kRowBlock - 1) / kRowBlock * kRowBlock;
      load_rows<kHeadDim>({{query, a.query, first_row, head}}, padded, num_rows, a.head_dim);
    }
    load_tile(tile);
    cp_async_commit();
  }
  if constexpr (kBias) {
    const T* column = static_cast<const T*>(a.bias_table.data) + head * a.bias_table.head_stride;
    for (int i = threadIdx.x; i < bias.entries(); i += blockDim.x) {
      const int row = bias.table_row(i);
      const bool exists = a.class_token_entries || row < 2 * bias.codes - 1;
      table[i] = exists ? static_cast<float>(column[row * a.bias_table.row_stride]) * kLog2e : 0.0f;
    }
  }

  const int lane = threadIdx.x % 32;
  for (int round = 0; round < a.plan.row_blocks_per_warp; ++round) {
    const int row = (round * a.plan.warps + static_cast<int>(threadIdx.x) / 32) * kRowBlock;  // this warp's first row
    const bool has_rows = row < num_rows;
    int query_codes[2] = {};
    if constexpr (kBias) {
      for (int r = 0; r < 2; ++r) {
        const int mine = row + lane / 4 + 8 * r;
        query_codes[r] = bias.query_code(mine < num_rows ? a.positions[first_row + mine] : 0);
      }
    }

    RowBlock<kHeadDim> rows;
    for (int tile = 0; tile < tiles; ++tile) {
      if (round == 0) {  // later rounds exist only if all keys stay, and then every tile is there
        wait_for_copies(ahead - 1);
        __syncthreads();
        if (tile + ahead < tiles) load_tile(tile + ahead);
        cp_async_commit();  // an empty group at the end keeps `ahead - 1` the number that may be pending
      }
      if (!has_rows) continue;
      const int keys = min(num_keys - tile * kKeyTile, kKeyTile);
#pragma unroll 1
      for (int step = 0; step < keys; step += kKeyStep) {
        const int at = place(tile) + step;
        attend<T, kHeadDim, kBias>(rows, query + row * kRowBytes, key + at * kRowBytes, value + at * kRowBytes,
                                   keys - step, tile == 0 && step == 0, a.scale_log2, table, query_codes,
                                   key_codes + at);
      }
    }
    if (!has_rows) continue;
    const int row_bytes = 2 * a.heads * a.head_dim;
    T* out = strided(static_cast<T*>(a.out) + head * a.head_dim, first_row + row, row_bytes);
    store_rows(rows, row * kRowBytes, out, row_bytes, num_rows - row, a.head_dim);
  }
}

using AttentionKernel = void (*)(AttentionArguments);

template <typename T, bool kBias, int kIndex = 0>
AttentionKernel attention_kernel(int head_dim) {
  constexpr int kHeadDim = kHeadDims[kIndex];
  if constexpr (kHeadDim < kMaxHeadDim) {
    if (head_dim > kHeadDim) return attention_kernel<T, kBias, kIndex + 1>(head_dim);
  }
  return varlen_attention_kernel<T, kHeadDim, kBias>;
}

struct AttentionLaunch {
  AttentionKernel kernel;
  int64_t blocks;
  int threads;
};

// Adds the plan to the arguments and returns the kernel, blocks and threads to launch.
inline AttentionLaunch plan_attention(AttentionArguments& a, bool bfloat16, int64_t batch, int64_t max_seqlen_q,
                                      int64_t max_seqlen_k, int64_t shared_bytes_per_multiprocessor) {
  const bool bias = a.bias_table.data != nullptr;
  const int64_t codes = bias ? position_codes(a.grid_rows, a.grid_columns) : 0;
  a.plan = plan_launch(max_seqlen_q, max_seqlen_k, a.head_dim, codes, shared_bytes_per_multiprocessor);
  const auto kernel = bfloat16 ? (bias ? attention_kernel<__nv_bfloat16, true> : attention_kernel<__nv_bfloat16, false>)
                               : (bias ? attention_kernel<__half, true> : attention_kernel<__half, false>);
  return {kernel(a.head_dim), batch * a.plan.query_blocks * a.heads, a.plan.warps * 32};
}

}  // namespace tinydrop
