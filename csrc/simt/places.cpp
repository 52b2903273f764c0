// From addresses to source positions and names, by addr2line (binutils) and the debug information.
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <sstream>

#include "runtime.h"

namespace simt {

// addr2line's frames of a program counter, innermost first: function and file:line.
struct Frame {
  std::string function, position;
};

static std::vector<Frame> frames(const void* pc) {
  Dl_info lib;
  if (!dladdr(pc, &lib) || !lib.dli_fname) return {};
  std::ostringstream command;
  command << "env -u LD_PRELOAD addr2line -C -f -i -e '" << lib.dli_fname << "' 0x" << std::hex
          << static_cast<const char*>(pc) - static_cast<const char*>(lib.dli_fbase)
          << " 2>/dev/null";
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.str().c_str(), "r"), pclose);
  std::vector<Frame> found;
  if (!pipe) return found;
  char line[8192];
  std::string function;
  for (int i = 0; std::fgets(line, sizeof(line), pipe.get()); i++) {
    std::string text(line);
    text.erase(text.find_last_not_of("\n") + 1);
    if (i % 2 == 0) {
      function = text;
      continue;
    }
    text = text.substr(text.rfind('/') + 1);
    found.push_back({function, text.substr(0, text.find(" (discriminator"))});
  }
  return found;
}

// "void ns::(anonymous namespace)::k<float, 4>(float*)" -> "k<float, 4>".
static std::string short_name(std::string name) {
  int depth = 0;
  size_t begin = 0, end = name.size();
  if (const size_t clone = name.find(" [clone"); clone != std::string::npos)
    name.resize(end = clone);
  for (size_t i = 0; i < name.size(); i++) {
    const char c = name[i];
    if (c == '(' && depth == 0 && name.compare(i, 21, "(anonymous namespace)") == 0) {
      i += 20;
      continue;
    }
    if (c == '(' && depth == 0) {
      end = i;
      break;
    }
    depth += (c == '<') - (c == '>');
    if (depth == 0 && (c == ':' || c == ' ')) begin = i + 1;
  }
  name = name.substr(begin, end - begin);
  for (const std::string scope : {"(anonymous namespace)::", "gankern::"})  // of template arguments
    for (size_t at; (at = name.find(scope)) != std::string::npos;) name.erase(at, scope.size());
  return name;
}

std::string where(const void* pc) {
  static std::map<const void*, std::string> known;
  if (const auto it = known.find(pc); it != known.end()) return it->second;
  std::string text;
  // A return address: the call is before it.
  for (const Frame& f : frames(static_cast<const char*>(pc) - 1)) {
    const bool inside = f.position.rfind("simt", 0) == 0 || f.position.rfind("cuda_", 0) == 0;
    const std::string name = short_name(f.function);
    if (!inside && f.position[0] != '?')
      text +=
          (text.empty() ? "" : ", from ") + f.position + " in " + name.substr(0, name.find('<'));
  }
  if (text.empty()) text = "an unknown place (no debug information, or no addr2line)";
  return known[pc] = text;
}

Library library_of(const void* kernel) {
  std::pair<uintptr_t, Library> search{reinterpret_cast<uintptr_t>(kernel), {}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* p) {
        auto& [wanted, found] = *static_cast<decltype(search)*>(p);
        Range all{~uintptr_t(0), 0}, writable{~uintptr_t(0), 0}, zeros;
        for (int i = 0; i < info->dlpi_phnum; i++) {
          const auto& header = info->dlpi_phdr[i];
          if (header.p_type != PT_LOAD) continue;
          const uintptr_t begin = info->dlpi_addr + header.p_vaddr, end = begin + header.p_memsz;
          all = {std::min(all.begin, begin), std::max(all.end, end)};
          if (!(header.p_flags & PF_W)) continue;
          writable = {std::min(writable.begin, begin), std::max(writable.end, end)};
          if (header.p_memsz > header.p_filesz) zeros = {begin + header.p_filesz, end};
        }
        if (!all.has(wanted)) return 0;
        found = {all, writable.end ? writable : Range{}, zeros};
        return 1;
      },
      &search);
  return search.second;
}

std::string function_name(const void* function) {
  static std::map<const void*, std::string> known;
  if (const auto it = known.find(function); it != known.end()) return it->second;
  const std::vector<Frame> found = frames(function);
  return known[function] = found.empty() ? "unknown" : short_name(found.back().function);
}

}  // namespace simt
