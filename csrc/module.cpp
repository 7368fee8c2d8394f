// The Python module tinycomp._C: what this build is. Importing it registers the CPU kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/amx.h"
#include "common/dot.h"
#include "common/peaks.h"
#include "common/register.h"

namespace py = pybind11;

static py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cpp_standard"] = static_cast<long>(__cplusplus);
  info["torch_target_version"] =
      py::str("{}.{}").format(int(TORCH_TARGET_VERSION >> 56 & 255), int(TORCH_TARGET_VERSION >> 48 & 255));
  info["instruction_set"] = tinycomp::instruction_set();
  return info;
}

static std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  features["avx2"] = __builtin_cpu_supports("avx2");
  features["fma"] = __builtin_cpu_supports("fma");
  features["avx512f"] = __builtin_cpu_supports("avx512f");
  features["avx512bw"] = __builtin_cpu_supports("avx512bw");
  features["avx512dq"] = __builtin_cpu_supports("avx512dq");
  features["avx512vl"] = __builtin_cpu_supports("avx512vl");
  features["avx512vnni"] = __builtin_cpu_supports("avx512vnni");
  features["avx512vbmi2"] = __builtin_cpu_supports("avx512vbmi2");
  features["avx512bf16"] = __builtin_cpu_supports("avx512bf16");
  features["amx"] = tinycomp::may_use_tiles();
#endif
  return features;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of tinycomp.ops; importing this module registers them with torch.";
  m.def("build_info", &build_info, "Compiler, C++ standard, oldest torch served, instruction set in use.");
  m.def("cpu_features", &cpu_features, "Instruction sets of this processor that the kernels ask about.");
  m.def("run_peak", &tinycomp::run_peak,
        "Operations of n rounds of fma512, fma256, bf16_512, vnni512, amx_bf16 or amx_int8; 0 if not available.");
  m.def(
      "read_words",
      [](uintptr_t address, int64_t n, int64_t rows) {
        return tinycomp::read_words(reinterpret_cast<const uint32_t*>(address), n, rows);
      },
      "The sum of n words of 32 bits at an address, `rows` of 16 KB side by side: as fast as memory gives them.");
  m.def("signatures", [] { return tinycomp::signatures(); }, "C++ signature of each registered kernel.");
}
