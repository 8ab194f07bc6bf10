// emulated_order.h's clocks, and what the compiler calls for each access of a kernel. Compiled without -fsanitize=thread, or it would watch itself.
#include <link.h>

#include <algorithm>
#include <memory>
#include <set>
#include <unordered_map>

#include "emulated_cuda.h"

namespace emulated::order {
namespace {

constexpr uint32_t MOST = 4096;  // participants of a block: its threads, their copies, tensor cores of its warps, mbarriers
constexpr uint32_t WARPS = 32;
constexpr size_t PAGE = 4096;

struct Record {
  uint32_t who, time, launch;
  uint8_t bytes;  // bit i: byte i of the four
  uint8_t access;
  const void* code;  // where a thread's own access is, if it is one
};

/// Reads by many participants of one block: when each last did.
struct Crowd {
  uint32_t block, launch;
  uint8_t bytes, access;
  std::vector<uint32_t> times;
};

/// Those accesses to four bytes that a later one may race with.
struct Cell {
  std::vector<Record> records;
  std::vector<Crowd> crowds;
};
constexpr size_t MANY = 8;  // records, beyond which reads are kept in crowds
struct Page { Cell cells[PAGE / 4]; };

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_number = 0;
Page* last_page = nullptr;
std::unordered_map<const void*, Clock> flags;
uint32_t launch = 0, seen_at_start = 0;  // this one; all up to that one have ended as it begins
uintptr_t image = 0, image_end = 0;      // of this library: variables with __shared__ lie here
std::set<std::pair<std::string, std::pair<unsigned, std::string>>> reached;
struct {
  std::string file, name;
  unsigned line = 0;
  bool weaker = false;
} change;

Page* page_of(uintptr_t address, bool make) {
  const uintptr_t number = address / PAGE;
  if (last_page && number == last_number) return last_page;
  auto found = pages.find(number);
  if (found == pages.end()) {
    if (!make) return nullptr;
    found = pages.emplace(number, std::make_unique<Page>()).first;
  }
  last_number = number;
  return last_page = found->second.get();
}

/// What was there is no more: other memory has its address.
void forget(uintptr_t address, size_t bytes) {
  for (uintptr_t at = address; at < address + bytes; at = (at / PAGE + 1) * PAGE) {
    Page* const page = page_of(at, false);
    if (!page) continue;
    const uintptr_t end = std::min(address + bytes, (at / PAGE + 1) * PAGE);
    for (uintptr_t i = at; i < end; i += 4) page->cells[i % PAGE / 4] = {};
  }
}

uint32_t threads_of_block() { return blockDim.x * blockDim.y * blockDim.z; }

uint32_t first_of(Helper helper) {
  const uint32_t threads = threads_of_block();
  return helper == COPIES ? threads : helper == TENSOR_CORES ? 2 * threads : 2 * threads + WARPS;
}

std::string name_of(uint32_t who) {
  const uint32_t number = who % MOST;
  const std::string block = " of block " + std::to_string(who / MOST);
  const auto one = [&](const char* what, Helper helper) { return what + std::to_string(number - first_of(helper)) + block; };
  if (number >= first_of(COPY_ENGINE)) return one("the copy engine for mbarrier ", COPY_ENGINE);
  if (number >= first_of(TENSOR_CORES)) return one("the tensor cores for warp ", TENSOR_CORES);
  if (number >= first_of(COPIES)) return one("the copies of thread ", COPIES);
  return "thread " + std::to_string(number) + block;
}

std::string place_of(const void* address) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address), shared = reinterpret_cast<uintptr_t>(current->block->memory.get());
  char text[64];
  if (at - image < image_end - image) return "a __shared__ variable";
  if (at - shared < current->block->bytes) {
    std::snprintf(text, sizeof(text), "shared memory at %zu", static_cast<size_t>(at - shared));
  } else {
    std::snprintf(text, sizeof(text), "memory at 0x%zx", static_cast<size_t>(at));
  }
  return text;
}

std::string in_words(const Record& record) {
  char code[32] = "";
  if (record.code) std::snprintf(code, sizeof(code), " [+0x%zx]", static_cast<size_t>(reinterpret_cast<uintptr_t>(record.code) - image));
  const std::string earlier = record.launch == launch ? name_of(record.who) : "a launch before";
  return earlier + ((record.access & WRITE) ? " wrote" : " read") + code;
}

[[noreturn]] void fail_of(const Record& other, const Record& record, uintptr_t at, bool unseen) {
  fail("race in " + place_of(reinterpret_cast<void*>(at)) + ": " + in_words(other) + ", " + in_words(record) +
       (unseen ? ", no proxy fence between" : ", neither before the other"));
}

/// Adds a read to its crowd, if there is one or is to be one.
bool joins_crowd(Cell& cell, const Record& record) {
  for (Crowd& crowd : cell.crowds) {
    const bool same = crowd.block == record.who / MOST && crowd.launch == record.launch;
    if (!same || crowd.bytes != record.bytes || crowd.access != record.access) continue;
    if (crowd.times.size() <= record.who % MOST) crowd.times.resize(record.who % MOST + 1);
    crowd.times[record.who % MOST] = record.time;
    return true;
  }
  if (cell.records.size() < MANY) return false;
  std::erase_if(cell.crowds, [&](const Crowd& crowd) { return crowd.launch != record.launch && crowd.launch <= seen_at_start; });
  cell.crowds.push_back({record.who / MOST, record.launch, record.bytes, record.access, std::vector<uint32_t>(record.who % MOST + 1)});
  cell.crowds.back().times.back() = record.time;
  return true;
}

/// A write after the reads of crowds.
void end_crowds(Cell& cell, const Record& record, const Knowledge& knowledge, uintptr_t at) {
  std::erase_if(cell.crowds, [&](const Crowd& crowd) {
    if (!(crowd.bytes & record.bytes) || (crowd.access & record.access & ATOMIC)) return false;
    for (uint32_t i = 0; i < crowd.times.size(); ++i) {
      const uint32_t who = crowd.block * MOST + i;
      const bool before = crowd.launch != launch ? crowd.launch <= knowledge.before.launches : knowledge.before.of(who) >= crowd.times[i];
      if (crowd.times[i] && !before) fail_of({who, crowd.times[i], crowd.launch, crowd.bytes, crowd.access, nullptr}, record, at, false);
    }
    return (crowd.bytes & ~record.bytes) == 0;
  });
}

void touch_as(Thread& thread, const Record& mine, const void* address, size_t bytes) {
  const Knowledge& knowledge = thread.knowledge;
  uintptr_t at = reinterpret_cast<uintptr_t>(address);
  for (const uintptr_t end = at + bytes; at < end; at = (at / 4 + 1) * 4) {
    Record record = mine;
    record.bytes = static_cast<uint8_t>(0xF << at % 4 & 0xF);
    if (end - at < 4 - at % 4) record.bytes &= static_cast<uint8_t>((1 << (at % 4 + (end - at))) - 1);
    Cell& cell = page_of(at, true)->cells[at % PAGE / 4];
    bool is_there = false;
    for (size_t i = 0; i < cell.records.size();) {
      Record& other = cell.records[i];
      const bool conflicts = (other.bytes & record.bytes) && ((other.access | record.access) & WRITE) && !(other.access & record.access & ATOMIC);
      // A thread's read comes before a write by the async proxy without a fence: nothing of it is left to be seen.
      const bool changes_proxy = conflicts && (other.access & WRITE) && !(other.access & ASYNC) && (record.access & ASYNC);
      const bool before = other.launch != launch ? other.launch <= knowledge.before.launches
                                                 : !changes_proxy && knowledge.before.of(other.who) >= other.time;
      if (conflicts && !before) {
        fail_of(other, record, at, changes_proxy && other.launch == launch && knowledge.before.of(other.who) >= other.time);
      }
      // What a later access could race with the other by, it also could by this one.
      const bool covers = (other.bytes & ~record.bytes) == 0 && other.access == record.access;
      const bool ends = (other.bytes & ~record.bytes) == 0 && (record.access & WRITE) && !(record.access & ATOMIC);
      if ((before && (covers || ends)) || (covers && other.launch == launch && other.who == record.who)) {
        if (is_there) {
          other = cell.records.back();
          cell.records.pop_back();
          continue;
        }
        other = record;
        is_there = true;
      }
      ++i;
    }
    if (record.access & WRITE) {
      end_crowds(cell, record, knowledge, at);
    } else if (!is_there) {
      is_there = joins_crowd(cell, record);
    }
    if (!is_there) cell.records.push_back(record);
  }
}

/// A thread's time goes on: what it does from now on is not known by who knows what it has done.
void go_on(Thread& thread) { thread.knowledge.before.learn(thread.who, thread.knowledge.before.of(thread.who) + 1); }

bool is(const char* name, const Site& at) {
  const std::string file = at.file_name();
  return change.line == at.line() && change.name == name && file.size() >= change.file.size() &&
         file.compare(file.size() - change.file.size(), std::string::npos, change.file) == 0;
}

int find_image(dl_phdr_info* info, size_t, void*) {
  uintptr_t end = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type == PT_LOAD) end = std::max(end, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
  }
  const uintptr_t mine = reinterpret_cast<uintptr_t>(&threadIdx);
  if (info->dlpi_addr > mine || mine >= end) return 0;
  image = info->dlpi_addr, image_end = end;
  return 1;
}

/// An access of a kernel's own code.
void hear_access(const void* address, size_t bytes, int access, const void* code) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (quiet || at - stack < stack_size) return;
  const void* const given[] = {&threadIdx, &blockIdx, &blockDim, &gridDim};
  for (const void* one : given) {
    if (at - reinterpret_cast<uintptr_t>(one) < sizeof(uint3)) return;
  }
  const Quiet no_more;
  Thread& thread = current->order;
  touch_as(thread, {thread.who, thread.knowledge.before.of(thread.who), launch, 0, static_cast<uint8_t>(access), code}, address, bytes);
}

}  // namespace

uint32_t Clock::of(uint32_t who) const {
  for (const auto& [block, times] : of_block) {
    if (block == who / MOST) return who % MOST < times.size() ? times[who % MOST] : 0;
  }
  return 0;
}

void Clock::learn(uint32_t who, uint32_t time) {
  for (auto& [block, times] : of_block) {
    if (block != who / MOST) continue;
    if (times.size() <= who % MOST) times.resize(who % MOST + 1);
    times[who % MOST] = std::max(times[who % MOST], time);
    return;
  }
  of_block.emplace_back(who / MOST, std::vector<uint32_t>(who % MOST + 1));
  of_block.back().second.back() = time;
}

void Clock::join(const Clock& other) {
  launches = std::max(launches, other.launches);
  for (const auto& [block, times] : other.of_block) {
    const auto found = std::find_if(of_block.begin(), of_block.end(), [&](const auto& mine) { return mine.first == block; });
    if (found == of_block.end()) {
      of_block.emplace_back(block, times);
      continue;
    }
    std::vector<uint32_t>& mine = found->second;
    if (mine.size() < times.size()) mine.resize(times.size());
    for (size_t i = 0; i < times.size(); ++i) mine[i] = std::max(mine[i], times[i]);
  }
}

void Knowledge::join(const Knowledge& other) {
  before.join(other.before);
  fenced.join(other.fenced);
  unfenced.join(other.unfenced);
}

bool orders(const char* name, const Site& at) {
  const std::string file = at.file_name();
  reached.insert({file.substr(file.rfind('/') + 1), {at.line(), name}});
  return change.weaker || !is(name, at);
}

int weaker(const char* name, const Site& at) { return change.weaker && is(name, at); }

void forget_all() {
  pages.clear();
  last_page = nullptr;
}

void begin_launch(bool early) {
  ++launch;
  if (!early) seen_at_start = launch - 1;
  flags.clear();
  if (!image) dl_iterate_phdr(find_image, nullptr);
}

void begin_block(const void* shared, size_t bytes) {
  forget(reinterpret_cast<uintptr_t>(shared), bytes);
  for (uintptr_t at = image; at < image_end; at += PAGE) forget(at, PAGE);  // blocks with variables in it run one after another
}

void begin_thread(Thread& thread, uint32_t block, uint32_t number) {
  thread.who = block * MOST + number;
  thread.knowledge.before.launches = seen_at_start;
  thread.knowledge.before.learn(thread.who, 1);
}

void wait_for_launch_before(Thread& thread) { thread.knowledge.before.launches = launch - 1; }

void give(Thread& from, Knowledge& to) {
  to.join(from.knowledge);
  go_on(from);
}

void take(Thread& to, const Knowledge& from) { to.knowledge.join(from); }

void tell_flag(Thread& from, const void* flag, bool release) {
  flags[flag].join(release ? from.knowledge.before : from.knowledge.fenced);
  go_on(from);
}

void hear_flag(Thread& to, const void* flag, bool acquire) {
  const auto found = flags.find(flag);
  if (found != flags.end()) (acquire ? to.knowledge.before : to.knowledge.unfenced).join(found->second);
}

void fence(Thread& thread) {
  Knowledge& knowledge = thread.knowledge;
  knowledge.before.join(knowledge.unfenced);
  knowledge.fenced = knowledge.before;
  go_on(thread);
}

void touch(Thread& thread, const void* address, size_t bytes, int access) {
  touch_as(thread, {thread.who, thread.knowledge.before.of(thread.who), launch, 0, static_cast<uint8_t>(access), nullptr}, address, bytes);
}

void publish(Thread& thread, const void* address, size_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t i = at; i < at + bytes; i += 4) {
    for (Record& record : page_of(i, true)->cells[i % PAGE / 4].records) {
      if (record.who == thread.who && record.launch == launch) record.access |= ASYNC;
    }
  }
}

void touch_by(Thread& thread, Helper helper, uint32_t number, uint32_t time, const void* address, size_t bytes, int access) {
  const uint32_t who = thread.who / MOST * MOST + first_of(helper) + number;
  touch_as(thread, {who, time, launch, 0, static_cast<uint8_t>(access), nullptr}, address, bytes);
}

void learn(Thread& thread, Helper helper, uint32_t number, uint32_t time) {
  thread.knowledge.before.learn(thread.who / MOST * MOST + first_of(helper) + number, time);
}

}  // namespace emulated::order

#pragma GCC visibility push(default)
extern "C" {
/// One site orders nothing from now on, or is one weaker than written. No name: all are as written.
void order_change(const char* file, unsigned line, const char* name, int weaker) {
  emulated::order::change.file = file, emulated::order::change.line = line;
  emulated::order::change.name = name, emulated::order::change.weaker = weaker != 0;
}

/// "file:line name", a line each: what was reached since the last call.
const char* order_reached() {
  static std::string text;
  text.clear();
  for (const auto& [file, site] : emulated::order::reached) text += file + ":" + std::to_string(site.first) + " " + site.second + "\n";
  emulated::order::reached.clear();
  return text.c_str();
}

#define FASTLORA_HEAR(bytes) \
  void __tsan_read##bytes(void* address) { emulated::order::hear_access(address, bytes, emulated::order::READ, __builtin_return_address(0)); } \
  void __tsan_write##bytes(void* address) { emulated::order::hear_access(address, bytes, emulated::order::WRITE, __builtin_return_address(0)); } \
  void __tsan_volatile_read##bytes(void* address) { \
    emulated::order::hear_access(address, bytes, emulated::order::ATOMIC, __builtin_return_address(0)); \
  } \
  void __tsan_volatile_write##bytes(void* address) { \
    emulated::order::hear_access(address, bytes, emulated::order::ATOMIC | emulated::order::WRITE, __builtin_return_address(0)); \
  }
FASTLORA_HEAR(1)
FASTLORA_HEAR(2)
FASTLORA_HEAR(4)
FASTLORA_HEAR(8)
FASTLORA_HEAR(16)
#undef FASTLORA_HEAR
void __tsan_read_range(void* address, size_t bytes) {
  emulated::order::hear_access(address, bytes, emulated::order::READ, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  emulated::order::hear_access(address, bytes, emulated::order::WRITE, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
int __tsan_atomic32_fetch_add(int* address, int value, int) { return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL); }
}
#pragma GCC visibility pop
