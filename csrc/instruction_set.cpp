// Which kernels run: the widest instruction set of this processor, or the one a test asks for.
#include "instruction_set.h"

#include <atomic>

#include "lstm_cpu.h"

namespace fastattn {

namespace portable { extern const Kernels table; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
#endif

static std::vector<const Kernels*> available() {
  std::vector<const Kernels*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    tables.push_back(&avx512::table);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&avx2::table);
#endif
  tables.push_back(&portable::table);
  return tables;
}

static std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{available().front()};
  return table;
}

const Kernels& kernels() { return *current(); }

const LstmKernels& lstm_kernels() { return *kernels().lstm; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* table : available()) names.emplace_back(table->name);
  return names;
}

bool use_instruction_set(const std::string& name) {
  for (const Kernels* table : available())
    if (name == table->name) {
      current() = table;
      return true;
    }
  return false;
}

}  // namespace fastattn
