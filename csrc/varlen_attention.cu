// The operator tinydrop_cuda::varlen_attention. It checks its arguments and launches the kernel. It uses torch's stable
// ABI and links the CUDA runtime statically, so that one library loads on every torch from 2.11 on, even without a GPU.
#include <algorithm>
#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>

#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "varlen_attention.cuh"

namespace tinydrop {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws unless `fine`, like STD_TORCH_CHECK. The message has no prefix, so it begins with the argument's name.
template <typename... Parts>
void check(bool fine, const Parts&... parts) {
  if (fine) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

void check_cuda(cudaError_t status, const char* call) {
  check(status == cudaSuccess, call, ": ", cudaGetErrorString(status));
}

// Returns torch's current stream. The symbol is looked up at run time, because a torch without CUDA does not have it.
cudaStream_t current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  check(function != nullptr, "query: is on CUDA, but torch's CUDA library is not loaded");
  void* stream = nullptr;
  check(function(device, &stream) == 0, "query: torch has no current stream on device ", device);
  return static_cast<cudaStream_t>(stream);
}

void check_device(const char* name, const Tensor& tensor, const Tensor& query) {
  check(tensor.is_cuda() == query.is_cuda() && tensor.get_device_index() == query.get_device_index(), name,
        ": is on another device than query");
}

// Checks a tensor (rows, heads, head_dim) against query's dtype, heads and head_dim. Returns the kernel's view of it.
View view(const char* name, const Tensor& tensor, const Tensor& query) {
  check_device(name, tensor, query);
  check(tensor.dim() == 3, name, ": got ", tensor.dim(), " dimensions, expected (total, heads, head_dim)");
  check(tensor.scalar_type() == query.scalar_type(), name, ": has another dtype than query");
  check(tensor.size(1) == query.size(1) && tensor.size(2) == query.size(2), name, ": got ", tensor.size(1),
        " heads of ", tensor.size(2), ", query has ", query.size(1), " of ", query.size(2));
  check(tensor.stride(2) == 1, name, ": got a last stride of ", tensor.stride(2), ", expected 1");
  for (int dim = 0; dim < 2; ++dim) {
    check(tensor.size(dim) == 1 || tensor.stride(dim) % 8 == 0, name, ": got stride ", tensor.stride(dim),
          " in dimension ", dim, ", expected multiples of 8 elements");
  }
  check(tensor.size(0) == 1 || tensor.stride(0) <= kMaxRowStride, name, ": got stride ", tensor.stride(0),
        " in dimension 0, expected up to ", kMaxRowStride);
  const void* data = tensor.const_data_ptr();
  check(reinterpret_cast<uintptr_t>(data) % 16 == 0, name, ": starts at an address that is no multiple of 16 bytes");
  return {data, tensor.stride(0), tensor.stride(1)};
}

const int* int_vector(const char* name, const Tensor& tensor, int64_t length, const Tensor& query) {
  check_device(name, tensor, query);
  check(tensor.scalar_type() == ScalarType::Int, name, ": expected int32");
  check(tensor.dim() == 1 && tensor.is_contiguous() && tensor.size(0) == length, name,
        ": expected a contiguous vector of ", length);
  return static_cast<const int*>(tensor.const_data_ptr());
}

// Checks a relative position bias and adds its table, positions and grid to the arguments.
void add_bias(AttentionArguments& a, const Tensor& table, const std::optional<Tensor>& positions, int64_t grid_rows,
              int64_t grid_columns, const Tensor& query, const Tensor& key) {
  check(positions.has_value(), "positions: got None, which a bias_table does not go without");
  check(query.size(0) == key.size(0), "key: got ", key.size(0), " rows, expected with a bias_table query's ",
        query.size(0));
  check(grid_rows > 0 && grid_rows <= 1024, "grid_rows: got ", grid_rows, ", expected 1 to 1024");
  check(grid_columns > 0 && grid_columns <= 1024, "grid_columns: got ", grid_columns, ", expected 1 to 1024");
  check_device("bias_table", table, query);
  check(table.scalar_type() == query.scalar_type(), "bias_table: has another dtype than query");
  const int64_t distances = (2 * grid_rows - 1) * (2 * grid_columns - 1);
  check(table.dim() == 2 && table.size(1) == query.size(1), "bias_table: expected (distances, ", query.size(1), ")");
  check(table.size(0) == distances || table.size(0) == distances + 3, "bias_table: got ", table.size(0),
        " distances, expected ", distances, ", or 3 more with a class token");
  a.bias_table = {table.const_data_ptr(), table.stride(0), table.stride(1)};
  a.class_token_entries = table.size(0) > distances;
  a.positions = int_vector("positions", *positions, query.size(0), query);
  a.grid_rows = static_cast<int>(grid_rows);
  a.grid_columns = static_cast<int>(grid_columns);
}

int attribute(cudaDeviceAttr which, int32_t device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

Tensor varlen_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
                        const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                        std::optional<Tensor> bias_table, std::optional<Tensor> positions, int64_t grid_rows,
                        int64_t grid_columns) {
  check(query.dim() == 3, "query: got ", query.dim(), " dimensions, expected (total, heads, head_dim)");
  const bool bfloat16 = query.scalar_type() == ScalarType::BFloat16;
  check(bfloat16 || query.scalar_type() == ScalarType::Half, "query: expected float16 or bfloat16");
  const int64_t heads = query.size(1), head_dim = query.size(2);
  check(head_dim % 8 == 0 && head_dim >= 8 && head_dim <= kMaxHeadDim, "query: got a head_dim of ", head_dim,
        ", expected multiples of 8 up to ", kMaxHeadDim);
  check(cu_seqlens_q.dim() == 1 && cu_seqlens_q.size(0) > 0, "cu_seqlens_q: expected (batch + 1,)");
  check(max_seqlen_q >= 0, "max_seqlen_q: got ", max_seqlen_q, ", expected a length");
  check(max_seqlen_k >= 0, "max_seqlen_k: got ", max_seqlen_k, ", expected a length");
  check(heads * head_dim <= kMaxRowStride, "query: got ", heads, " heads of ", head_dim, ", expected up to ",
        kMaxRowStride, " elements a row");

  const int64_t batch = cu_seqlens_q.size(0) - 1;
  AttentionArguments a{};
  a.query = view("query", query, query);
  a.key = view("key", key, query);
  a.value = view("value", value, query);
  check(value.size(0) == key.size(0), "value: got ", value.size(0), " rows, key has ", key.size(0));
  a.cu_seqlens_q = int_vector("cu_seqlens_q", cu_seqlens_q, batch + 1, query);
  a.cu_seqlens_k = int_vector("cu_seqlens_k", cu_seqlens_k, batch + 1, query);
  a.heads = static_cast<int>(heads);
  a.head_dim = static_cast<int>(head_dim);
  a.scale_log2 = static_cast<float>(scale) * kLog2e;
  check(std::isfinite(a.scale_log2) && a.scale_log2 > 0, "scale: got ", scale, ", expected a positive float32");
  a.grid_rows = a.grid_columns = 1;
  if (bias_table.has_value()) add_bias(a, *bias_table, positions, grid_rows, grid_columns, query, key);

  const int32_t device = query.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out = torch::stable::new_empty(query, {query.size(0), heads, head_dim});
  if (out.numel() == 0 || batch == 0) return out;
  a.out = out.mutable_data_ptr();

  // Limit the bounds to the number of rows, because no segment is longer; then a generous bound costs nothing.
  const AttentionLaunch launch =
      plan_attention(a, bfloat16, batch, std::min(max_seqlen_q, query.size(0)), std::min(max_seqlen_k, key.size(0)),
                     attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  const int shared_limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  check(a.plan.shared_bytes <= shared_limit, bias_table.has_value() ? "bias_table" : "query", ": needs ",
        a.plan.shared_bytes, " bytes of shared memory in a block, this device has ", shared_limit);
  check(launch.blocks <= INT32_MAX, "cu_seqlens_q: needs ", launch.blocks, " blocks, expected at most ", INT32_MAX);

  // Set the same limit in every call, because threads share it; a thread that lowered it would fail another's launch.
  const void* kernel = reinterpret_cast<const void*>(launch.kernel);
  constexpr int64_t kSharedBytesUnasked = 48 * 1024;
  if (a.plan.shared_bytes > kSharedBytesUnasked) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit),
               "cudaFuncSetAttribute");
  }
  void* parameters[] = {&a};
  check_cuda(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(launch.blocks)), dim3(launch.threads), parameters,
                              a.plan.shared_bytes, current_stream(device)),
             "cudaLaunchKernel");
  return out;
}

}  // namespace
}  // namespace tinydrop

STABLE_TORCH_LIBRARY(tinydrop_cuda, m) {
  m.def(
      "varlen_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "int max_seqlen_q, int max_seqlen_k, float scale, Tensor? bias_table, Tensor? positions, int grid_rows, "
      "int grid_columns) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tinydrop_cuda, CUDA, m) {
  m.impl("varlen_attention", TORCH_BOX(&tinydrop::varlen_attention));
}
