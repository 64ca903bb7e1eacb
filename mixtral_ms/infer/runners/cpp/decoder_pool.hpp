// Threads that outlive a call: a step of the decoder hands them hundreds of short pieces of work.
#pragma once
#include "decoder_vec.hpp"

#include <cstdint>
#include <functional>

namespace decoder {

// Runs body(0) ... body(tasks - 1), on all threads, and returns when all are done. Which thread
// takes which task is not fixed, so a task's result must not depend on it.
void run_tasks(int64_t tasks, const std::function<void(int64_t)>& body);

}  // namespace decoder
