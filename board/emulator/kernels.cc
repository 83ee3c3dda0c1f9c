#include "kernels.h"

#include <string>

#include "log.h"

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace rkemu {

extern const Kernels kPlainKernels;
#if defined(RKEMU_HAVE_AVX2)
extern const Kernels kAvx2Kernels;
#endif
#if defined(RKEMU_HAVE_AVX512)
extern const Kernels kAvx512Kernels;
#endif
#if defined(RKEMU_HAVE_NEON)
extern const Kernels kNeonKernels;
#endif
#if defined(RKEMU_HAVE_I8MM)
extern const Kernels kI8mmKernels;
#endif

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> tables{&kPlainKernels};
#if defined(RKEMU_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    tables.push_back(&kAvx2Kernels);
#endif
#if defined(RKEMU_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
    tables.push_back(&kAvx512Kernels);
  }
#endif
#if defined(RKEMU_HAVE_NEON)
  const bool dots = ::getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
  if (dots) tables.push_back(&kNeonKernels);
#if defined(RKEMU_HAVE_I8MM)
  constexpr unsigned long kI8mm = 1 << 13;  // HWCAP2_I8MM, which older headers do not name
  if (dots && ::getauxval(AT_HWCAP2) & kI8mm) tables.push_back(&kI8mmKernels);
#endif
#endif
  return tables;
}

const Kernels& choose_kernels() {
  const auto tables = available_kernels();
  const std::string wanted = env_text("RKEMU_KERNELS");
  if (wanted.empty()) return *tables.back();
  std::string names;
  for (const Kernels* table : tables) {
    if (wanted == table->name) return *table;
    names += std::string(names.empty() ? "" : ", ") + table->name;
  }
  throw failure("emulator: RKEMU_KERNELS=" + wanted + " is not one of " + names);
}

}  // namespace rkemu
