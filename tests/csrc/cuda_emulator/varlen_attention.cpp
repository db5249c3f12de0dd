// A function for ctypes that runs the kernel of csrc/varlen_attention.cuh, compiled for the host, in the emulator.
#include <varlen_attention.cuh>

#include "emulator.h"

namespace tinydrop {
alignas(128) unsigned char shared_memory[emulator::kMaxSharedBytes + 1024];
}

// Returns the first error, or an empty string. Writes the launch's plan to `arguments->plan`.
extern "C" const char* emulate_varlen_attention(tinydrop::AttentionArguments* arguments, int bfloat16, int64_t batch,
                                                int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                int64_t shared_bytes_per_multiprocessor, int early) {
  static std::string error;
  const auto launch = tinydrop::plan_attention(*arguments, bfloat16, batch, max_seqlen_q, max_seqlen_k,
                                               shared_bytes_per_multiprocessor);
  error = emulator::launch(launch.blocks, launch.threads, arguments->plan.shared_bytes,
                           early ? emulator::Schedule::kEarly : emulator::Schedule::kLate, tinydrop::shared_memory,
                           [&] { launch.kernel(*arguments); });
  return error.c_str();
}
