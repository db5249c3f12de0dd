// csrc/varlen_attention.cuh, compiled for the host and run by the emulator, for ctypes to call.
#include <varlen_attention.cuh>

#include "emulator.h"

namespace tinydrop {
alignas(128) unsigned char shared_memory[emulator::kMaxSharedBytes + 1024];
}

// Returns what went wrong, or an empty string. `plan` receives the launch's plan.
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
