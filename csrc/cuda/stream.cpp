#include <c10/cuda/CUDAStream.h>

#include "launch.h"

namespace fastattn::cuda {

void* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

}  // namespace fastattn::cuda
