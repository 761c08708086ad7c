#include "team.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fastattn {

static std::atomic<bool> in_child{false};

#if defined(__unix__) || defined(__APPLE__)
static const int registered = pthread_atfork(nullptr, nullptr, [] { in_child = true; });
#endif

bool forked() { return in_child; }

}  // namespace fastattn
