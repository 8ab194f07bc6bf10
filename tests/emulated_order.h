// What comes before what on the emulated card: every thread knows, as a vector clock, which accesses of others come before its next one. With
// -DFASTLORA_ORDER two accesses to a byte of which neither comes before the other, and one writes, end the launch as a race, whichever order they
// happened to run in (emulated_order.cpp; the compiler calls it for every access, by -fsanitize=thread, and no library of ThreadSanitizer's is linked).
// Without it all of this is empty.
//
// What orders, as the PTX ISA's memory consistency model has it: barriers of a block, __syncwarp, mbarriers, a release and the acquire that has
// seen it, __threadfence before and after a relaxed atomic, the wait for the launch before. Shuffles, votes and tensor cores order nothing. Who
// works beside the threads takes part as they do: the copies of a thread (cp.async), until it waits for them; the copy engine, until its mbarrier
// is waited for; the tensor cores for a warp (wgmma), until it waits. The last two see memory by another proxy: nothing that a thread of the same launch
// has written comes before what they do ("Mixed-proxy extensions for the NVIDIA PTX memory consistency model", Lustig, Cooksey and Giroux, ISCA 2022,
// section 5.4: a proxy fence would let it, and no kernel has one). Left out: clusters, which no kernel has, and registers that tensor cores are at work on, which
// test_machine_code.py is for.
//
// A place in the source that orders something is a Site. One of them can be changed (change): it happens as before, but orders nothing any more, or
// less. Such a mutant runs as one that is lucky: only who knows the order finds it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

#ifdef FASTLORA_ORDER
#include <utility>
#include <vector>
#endif

#ifdef FASTLORA_ORDER
#define EMULATED_UNWATCHED __attribute__((no_sanitize("thread")))
#else
#define EMULATED_UNWATCHED
#endif

namespace emulated::order {

using Site = std::source_location;

/// READ is none of them. ATOMIC: races with no other atomic. ASYNC: by the async proxy.
enum Access : int { READ = 0, WRITE = 1, ATOMIC = 2, ASYNC = 4 };
/// Who acts beside the threads of a block: the copies of each of its threads, the tensor cores for each of its warps, the copy engine for each mbarrier.
enum Helper { COPIES, TENSOR_CORES, COPY_ENGINE };

#ifdef FASTLORA_ORDER

/// Up to which time of each participant all is known.
struct Clock {
  uint32_t launches = 0;                                             // all up to this one
  std::vector<std::pair<uint32_t, std::vector<uint32_t>>> of_block;  // of the present launch

  uint32_t of(uint32_t who) const;
  void learn(uint32_t who, uint32_t time);
  void join(const Clock& other);
};

struct Knowledge {
  Clock before;    // what comes before
  Clock fenced;    // of it, what comes before a __threadfence, and so before what relaxed atomics tell
  Clock unfenced;  // what relaxed atomics have told: it comes before the next __threadfence

  void join(const Knowledge& other);
};

struct Thread {
  uint32_t who = 0;
  Knowledge knowledge;
};

inline bool quiet = true;  // the emulator runs, and not a kernel
inline uintptr_t stack = 0, stack_size = 0;  // of the thread that runs: its own business

/// As long as it lives, what runs is the emulator.
class Quiet {
  bool before;

 public:
  EMULATED_UNWATCHED Quiet() : before(quiet) { quiet = true; }
  EMULATED_UNWATCHED ~Quiet() { quiet = before; }
  Quiet(const Quiet&) = delete;
};
EMULATED_UNWATCHED inline void hear(bool on) { quiet = !on; }

/// Whether a site has its effect; notes that it was reached.
bool orders(const char* name, const Site& at);
/// Forgets all accesses: what follows has memory of its own.
void forget_all();
/// How much weaker it is than written: 0, or 1.
int weaker(const char* name, const Site& at);

void begin_launch(bool early);
void begin_block(const void* shared, size_t bytes);
void begin_thread(Thread& thread, uint32_t block, uint32_t number);
void wait_for_launch_before(Thread& thread);

/// A thread passes on what it knows, with all that it did before.
void give(Thread& from, Knowledge& to);
void take(Thread& to, const Knowledge& from);
/// The flag at this address takes what the thread knows (release), or what came before its last __threadfence; and likewise the thread, the flag's.
void tell_flag(Thread& from, const void* flag, bool release);
void hear_flag(Thread& to, const void* flag, bool acquire);
void fence(Thread& thread);

/// An access of the thread, or one that it has asked a helper for, which ends at the helper's time. Ends the launch if it races.
void touch(Thread& thread, const void* address, size_t bytes, int access);
void touch_by(Thread& thread, Helper helper, uint32_t number, uint32_t time, const void* address, size_t bytes, int access);
/// What the thread has written there is as if the async proxy had.
void publish(Thread& thread, const void* address, size_t bytes);
/// All that the helper did until then is done.
void learn(Thread& thread, Helper helper, uint32_t number, uint32_t time);

#else

struct Knowledge {};
struct Thread {};
struct Quiet {
  Quiet() {}
  ~Quiet() {}
};
inline void hear(bool) {}
inline bool orders(const char*, const Site&) { return true; }
inline int weaker(const char*, const Site&) { return 0; }
inline void begin_launch(bool) {}
inline void begin_block(const void*, size_t) {}
inline void begin_thread(Thread&, uint32_t, uint32_t) {}
inline void wait_for_launch_before(Thread&) {}
inline void give(Thread&, Knowledge&) {}
inline void take(Thread&, const Knowledge&) {}
inline void tell_flag(Thread&, const void*, bool) {}
inline void hear_flag(Thread&, const void*, bool) {}
inline void fence(Thread&) {}
inline void touch(Thread&, const void*, size_t, int) {}
inline void touch_by(Thread&, Helper, uint32_t, uint32_t, const void*, size_t, int) {}
inline void publish(Thread&, const void*, size_t) {}
inline void learn(Thread&, Helper, uint32_t, uint32_t) {}

#endif

}  // namespace emulated::order
