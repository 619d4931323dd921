// Memory for large outputs and scratch, kept from call to call: what malloc gives and returns in pieces of
// this size is mapped anew each time, and the page faults of a fresh output cost more than a kernel bound by
// memory.
#pragma once

#include <cstdint>

namespace palm::cpu {

constexpr int64_t kLeastBlock = 1 << 20;  // bytes from which a block is taken from here

// A block of at least `bytes`, its contents anything, aligned to 2 MB; null where nothing is kept (the limit
// is 0, the system has no such calls) or no memory is left. give_memory takes it back, from any thread.
void* take_memory(int64_t bytes);
void give_memory(void* block);

int64_t memory_limit();  // bytes that may be kept
int64_t memory_kept();   // bytes that are, beside the blocks in use
int64_t drop_memory();   // returns them to the system, and their number

}  // namespace palm::cpu
