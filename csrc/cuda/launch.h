// Launches on the GPU: no allocation, no synchronisation, on the given device and stream. The results are cudaError_t.
#pragma once

#include "../stage.h"

namespace pydiff {

int stage_cuda(const StageArgs& args, int device, void* stream);
int normal_cuda(float* out, const int64_t* seeds, uint32_t draw, int64_t rows, int64_t elements, int device,
                void* stream);

// Loads the kernels, so that their first launch may be inside a graph capture.
int prepare_cuda(int device);

const char* cuda_error_name(int error);
const char* cuda_error_text(int error);

}  // namespace pydiff
