// Which kernels run: the widest instruction set of this processor, or the one a test asks for.
#include "instruction_set.h"

#include <atomic>

#include "layer_norm_lstm_cpu.h"
#include "lstm_cpu.h"
#include "panels_cpu.h"
#include "split_cpu.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastattn {

namespace portable { extern const Kernels table; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
#endif

namespace {

// A table, and the instructions beyond it that the processor has.
struct Entry {
  std::string name;
  const Kernels* table;
  LstmForm bf16;
  bool split = false;
  Panels panels = Panels::none;
};

#if defined(__x86_64__) && defined(__linux__)
// Linux saves the tiles of AMX for a process once that has asked for them.
bool may_use_tiles() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

bool has_amx_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tile) && may_use_tiles();
}

bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
}
#else
[[maybe_unused]] bool has_amx_bf16() { return false; }
[[maybe_unused]] bool has_avx512_bf16() { return false; }
#endif

#if defined(__x86_64__)
// Zen 4, of family 0x19, has AVX-512 over units of 256 bits; Zen 5 is family 0x1a.
Panels panels_of_amd() {
  if (!__builtin_cpu_is("amd")) return Panels::none;
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid(1, &a, &b, &c, &d);
  const unsigned family = (a >> 8 & 0xf) + (a >> 20 & 0xff);
  return family >= 0x1a ? Panels::most : Panels::large;
}
#endif

std::vector<Entry> find() {
  std::vector<Entry> entries;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (has_amx_bf16()) entries.push_back({"avx512+amx", &avx512::table, LstmForm::tiles, true});
    const Panels panels = panels_of_amd();
    if (has_avx512_bf16()) entries.push_back({"avx512+bf16", &avx512::table, LstmForm::dots, false, panels});
    entries.push_back({"avx512", &avx512::table, LstmForm::panels, false, panels});
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    entries.push_back({"avx2", &avx2::table, LstmForm::panels});
#endif
  entries.push_back({"portable", &portable::table, LstmForm::panels});
  // For tests on processors without AMX, which emulate the products of bfloat16 slowly, and on those not of AMD.
  entries.push_back({"portable+split", &portable::table, LstmForm::panels, true});
  entries.push_back({"portable+panels", &portable::table, LstmForm::panels, false, Panels::most});
  return entries;
}

const std::vector<Entry>& available() {
  static const std::vector<Entry> entries = find();
  return entries;
}

std::atomic<const Entry*>& current() {
  static std::atomic<const Entry*> entry{&available().front()};
  return entry;
}

}  // namespace

const Kernels& kernels() { return *current().load()->table; }

const LstmKernels& lstm_kernels() { return *kernels().lstm; }

const LayerNormLstmKernels& layer_norm_lstm_kernels() { return *kernels().layer_norm_lstm; }

const SplitKernels& split_kernels() { return *kernels().split; }

const PanelKernels& panel_kernels() { return *kernels().panels; }

Panels preferred_panels() { return current().load()->panels; }

Reading panel_reading(int64_t bytes) {
  switch (preferred_panels()) {
    case Panels::most: return {bytes > third_level_bytes() / 3, 12};  // not 8 MB, but 16 of 32
    case Panels::large: return {true, 1};
    default: return {true, 0};
  }
}

bool has_split_products() { return current().load()->split; }

LstmForm lstm_bf16() { return current().load()->bf16; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Entry& entry : available()) names.push_back(entry.name);
  return names;
}

bool use_instruction_set(const std::string& name) {
  for (const Entry& entry : available())
    if (name == entry.name) {
      current() = &entry;
      return true;
    }
  return false;
}

}  // namespace fastattn
