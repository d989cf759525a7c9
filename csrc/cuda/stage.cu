// The stage operation on the GPU. A thread takes four consecutive elements of a row: one Philox block, 16 bytes of
// float32. It loads every operand the row's program reads before it uses the first, so that all of them are in flight
// together, and writes after all are read, so that an output may overwrite an operand. The program is the same for a
// whole thread block: its branches never diverge.
//
// Bytes moved: each operand read once, each output written once; the kernel is bound by them.
#include "access.cuh"
#include "device.cuh"
#include "launch.h"

namespace pydiff {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kStep = kThreads * 4;  // elements a thread block takes at a time

// Shared by a thread block: the row of the tables its batch row stands at, and what is needed of the next.
template <class Scalar>
struct TableRow {
  Scalar c[kCoefficientColumns], next_scale;
  int32_t index[kIndexColumns];
};

template <class Scalar>
__device__ void load_table_row(const StageArgs& args, int32_t stage, bool more, TableRow<Scalar>& shared) {
  const Scalar* c = static_cast<const Scalar*>(args.coefficients) + int64_t(stage) * kCoefficientColumns;
  int thread = int(threadIdx.x);
  if (thread < kCoefficientColumns) shared.c[thread] = c[thread];
  else if (thread < kCoefficientColumns + kIndexColumns)
    shared.index[thread - kCoefficientColumns] =
        args.indices[int64_t(stage) * kIndexColumns + thread - kCoefficientColumns];
  else if (thread == kCoefficientColumns + kIndexColumns)
    shared.next_scale = more ? c[kCoefficientColumns + kInputScale] : Scalar(0);
}

template <class Scalar>
__device__ RowProgram warp_program(const StageArgs& args, const TableRow<Scalar>& shared) {
  int lane = int(threadIdx.x) & 31, column = lane < kNumOperands ? lane : 0;
  uint32_t nonzero[kNumOutputs];
#pragma unroll
  for (int k = 0; k < kNumOutputs; ++k)
    nonzero[k] = __ballot_sync(~0u, lane < kNumOperands && shared.c[kNumOperands * k + column] != 0);
  uint32_t known = __ballot_sync(~0u, lane < 3 && shared.c[kKnown + (lane < 3 ? lane : 0)] != 0);
  return read_program(args, shared.c, shared.index, nonzero, known);
}

template <class Scalar>
struct Operands {
  Scalar v[kNumOperands][4], mask[4], known[4];
};

template <class Scalar>
__device__ __forceinline__ void generate(const StageArgs& args, int32_t number, int64_t row, int64_t e,
                                         Scalar (&z)[4]) {
  uint64_t block = uint64_t(e) / 4;
  Four four = normal_block(uint64_t(args.seeds[row]), uint32_t(number), uint32_t(block), uint32_t(block >> 32));
  z[0] = four.v0, z[1] = four.v1, z[2] = four.v2, z[3] = four.v3;
}

template <class Scalar>
__device__ __forceinline__ void load_given_draw(const StageArgs& args, int32_t number, int64_t row,
                                                const Place& place, Scalar (&z)[4]) {
  if (number >= 0 && number < args.draws)
    return load_as<Scalar>(args.noise, number * args.draw_stride + row * args.noise.row_stride, place, z);
  for (int i = 0; i < 4; ++i) z[i] = Scalar(NAN);  // no way to raise from here: let it be seen
}

template <class Scalar>
__device__ __forceinline__ Scalar* register_at(const StageArgs& args, int k, int64_t row, int64_t e) {
  return static_cast<Scalar*>(args.registers) + (k * args.rows + row) * args.elements + e;
}

template <class Scalar, bool kPlain>
__device__ __forceinline__ void load_operands(const StageArgs& args, uint32_t vectorised, const RowProgram& p,
                                              const TableRow<Scalar>& table, int64_t row, int64_t e, int count,
                                              Operands<Scalar>& o, Scalar (&uncond)[4], Scalar (&cond)[4]) {
  auto reads = [&](int k) { return p.reads >> k & 1u; };
#pragma unroll
  for (int k = 0; k <= kNumSlots; ++k) {
    if (!reads(k)) continue;
    const Scalar* from = register_at<Scalar>(args, k, row, e);
    if (kPlain || vectorised & kRegistersBit) load_packed(from, o.v[k]);
    else
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < count) o.v[k][i] = from[i];
  }
  if (p.uncond || p.cond) {
    Place place = place_of<kPlain>(args.m, e, count, vectorised & kModelBit);
    int64_t half = args.copies == 2 ? args.rows : 0;
    if (p.uncond) load_any(args.m, row * args.m.row_stride, place, uncond);
    if (p.cond) load_any(args.m, (row + half) * args.m.row_stride, place, cond);
  }
  if (!kPlain) {
    auto load = [&](const View& view, uint32_t bit, Scalar(&v)[4]) {
      load_as<Scalar>(view, row * view.row_stride, place_of<false>(view, e, count, vectorised & bit), v);
    };
    if (reads(kConstant)) load(args.constant, kConstantBit, o.v[kConstant]);
    if (reads(kExtra)) load(args.extra, kExtraBit, o.v[kExtra]);
    if (p.blend) load(args.mask, kMaskBit, o.mask);
    if (p.known_read) load(args.known, kKnownBit, o.known);
  }
  if (!kPlain && args.noise.data && (p.reads >> kZ0 & 3u)) {
    Place place = place_of<false>(args.noise, e, count, vectorised & kNoiseBit);
    if (reads(kZ0)) load_given_draw(args, table.index[kDraw0], row, place, o.v[kZ0]);
    if (reads(kZ1)) load_given_draw(args, table.index[kDraw1], row, place, o.v[kZ1]);
    return;
  }
  if (reads(kZ0)) generate(args, table.index[kDraw0], row, e, o.v[kZ0]);
  if (reads(kZ1)) generate(args, table.index[kDraw1], row, e, o.v[kZ1]);
}

// m and d from what was loaded. Returns whether the model output was finite.
template <class Scalar>
__device__ __forceinline__ bool convert(const RowProgram& p, const Scalar* c, int count, Operands<Scalar>& o,
                                        const Scalar (&uncond)[4], const Scalar (&cond)[4]) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Scalar m = p.uncond ? uncond[i] : cond[i];
    if (p.uncond && p.cond) m = fused(c[kGuidance], cond[i] - uncond[i], uncond[i]);
    o.v[kM][i] = m;
    if ((p.uncond || p.cond) && i < count) finite = finite && m - m == 0;
    if (!(p.reads >> kD & 1u)) continue;
    Scalar d = 0;
    if (p.d_x) d = c[kOutput] * o.v[kX][i];
    if (p.d_m) d = p.d_x ? fused(c[kOutput + 1], m, d) : c[kOutput + 1] * m;
    d = d < c[kClip] ? c[kClip] : d;
    o.v[kD][i] = d > c[kClip + 1] ? c[kClip + 1] : d;
  }
  return finite;
}

template <class Scalar>
__device__ __forceinline__ void combine(uint32_t bits, const Scalar* weights, const Operands<Scalar>& o,
                                        Scalar (&sum)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = 0;
#pragma unroll
  for (int k = 0; k < kNumOperands; ++k) {
    if (!(bits >> k & 1u)) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = fused(weights[k], o.v[k][i], sum[i]);
  }
}

template <class Scalar>
__device__ __forceinline__ void blend(const RowProgram& p, const Scalar* known, const Operands<Scalar>& o,
                                      Scalar (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Scalar kept = 0;
    if (p.known_read) kept = known[0] * o.known[i];
    if (known[1] != 0) kept = fused(known[1], o.v[kZ0][i], kept);
    if (known[2] != 0) kept = fused(known[2], o.v[kZ1][i], kept);
    x[i] = fused(o.mask[i], kept, (1 - o.mask[i]) * x[i]);
  }
}

template <class Scalar>
__device__ __forceinline__ void store_register(const StageArgs& args, bool packed, int k, int64_t row, int64_t e,
                                               int count, const Scalar (&v)[4]) {
  Scalar* to = register_at<Scalar>(args, k, row, e);
  if (packed) return store_packed(to, v);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) to[i] = v[i];
}

// Four elements of one row. Returns whether the model output was finite there.
template <class Scalar, bool kPlain>
__device__ __forceinline__ bool run_four(const StageArgs& args, uint32_t vectorised, const RowProgram& p, bool more,
                                         const TableRow<Scalar>& table, int64_t row, int64_t e) {
  int count = args.elements - e < 4 ? int(args.elements - e) : 4;
  Operands<Scalar> o = {};
  Scalar uncond[4] = {}, cond[4] = {}, sums[kNumOutputs][4];
  load_operands<Scalar, kPlain>(args, vectorised, p, table, row, e, count, o, uncond, cond);
  bool finite = convert(p, table.c, count, o, uncond, cond);
#pragma unroll
  for (int k = 0; k < kNumOutputs; ++k) combine(p.outputs[k], table.c + kNumOperands * k, o, sums[k]);
  if (!kPlain && p.blend) blend(p, table.c + kKnown, o, sums[0]);
#pragma unroll
  for (int k = 0; k < kNumOutputs; ++k)
    if (p.targets[k] >= 0) store_register(args, kPlain || vectorised & kRegistersBit, p.targets[k], row, e, count, sums[k]);
  if (!args.model_input.data || !more) return finite;
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[0][i] *= table.next_scale;
  Place place = place_of<kPlain>(args.model_input, e, count, vectorised & kInputBit);
  for (int copy = 0; copy < args.copies; ++copy)
    store_any(args.model_input, (row + copy * args.rows) * args.model_input.row_stride, place, sums[0]);
  return finite;
}

// By one thread of each thread block of a row, after its last read of the cursor: the last one advances it.
template <class Scalar>
__device__ void finish_row(const StageArgs& args, int64_t row, int32_t stage, bool more, uint32_t chunks) {
  __threadfence();
  if (atomicAdd(args.arrived + row, 1u) != chunks - 1) return;
  args.arrived[row] = 0;
  args.cursor[row] = stage + 1;
  if (!args.model_time || !more) return;
  Scalar time = static_cast<const Scalar*>(args.coefficients)[(int64_t(stage) + 1) * kCoefficientColumns + kTime];
  for (int copy = 0; copy < args.copies; ++copy) static_cast<Scalar*>(args.model_time)[copy * args.rows + row] = time;
}

// A row is cut into `chunks` pieces of `steps` steps; the thread blocks share out all pieces of all rows.
// kPlain: no optional operand is there and all memory is packed; leaving the rest out doubles the threads that fit.
template <class Scalar, bool kPlain>
__global__ void __launch_bounds__(kThreads, sizeof(Scalar) == 4 && kPlain ? 3 : 1)
    stage_kernel(const __grid_constant__ StageArgs args, uint32_t vectorised, uint32_t chunks, int32_t steps) {
  __shared__ TableRow<Scalar> table;
  for (int64_t item = blockIdx.x; item < args.rows * chunks; item += gridDim.x) {
    int64_t row = item / chunks, chunk = item - row * chunks;
    int32_t stage = args.cursor[row], stop = args.stop[row];
    if (stage < 0 || stage >= stop || stop > args.stages) continue;
    bool more = stage + 1 < stop;
    __syncthreads();  // the table row of the piece before has been read
    load_table_row(args, stage, more, table);
    __syncthreads();
    RowProgram p = warp_program(args, table);
    bool finite = true;
    for (int32_t step = 0; step < steps; ++step) {
      int64_t e = (chunk * steps + step) * kStep + int64_t(threadIdx.x) * 4;
      if (e < args.elements) finite = run_four<Scalar, kPlain>(args, vectorised, p, more, table, row, e) && finite;
    }
    bool fault = args.nonfinite && __syncthreads_or(!finite);
    if (threadIdx.x != 0) continue;
    if (fault && args.nonfinite[row] < 0) args.nonfinite[row] = stage;
    finish_row<Scalar>(args, row, stage, more, chunks);
  }
}

bool packable(const View& view, int64_t elements, int64_t other_stride = 0) {
  return view.data && is_contiguous(view) && elements % 4 == 0 && view.row_stride % 4 == 0 && other_stride % 4 == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % (item_size(view.dtype) == 2 ? 8 : 16) == 0;
}

uint32_t vectorised_views(const StageArgs& a) {
  uint32_t bits = 0;
  if (a.elements % 4 == 0 && reinterpret_cast<uintptr_t>(a.registers) % 16 == 0) bits |= kRegistersBit;
  if (packable(a.m, a.elements)) bits |= kModelBit;
  if (packable(a.model_input, a.elements)) bits |= kInputBit;
  if (packable(a.mask, a.elements)) bits |= kMaskBit;
  if (packable(a.known, a.elements)) bits |= kKnownBit;
  if (packable(a.constant, a.elements)) bits |= kConstantBit;
  if (packable(a.extra, a.elements)) bits |= kExtraBit;
  if (packable(a.noise, a.elements, a.draw_stride)) bits |= kNoiseBit;
  return bits;
}

bool is_plain(const StageArgs& a, uint32_t vectorised) {
  uint32_t needed = kRegistersBit | kModelBit | (a.model_input.data ? kInputBit : 0);
  bool optional = a.mask.data || a.known.data || a.constant.data || a.extra.data || a.noise.data;
  return !optional && (vectorised & needed) == needed;
}

using Kernel = void (*)(const StageArgs, uint32_t, uint32_t, int32_t);

Kernel kernel_for(bool wide, bool plain) {
  if (wide) return plain ? stage_kernel<double, true> : stage_kernel<double, false>;
  return plain ? stage_kernel<float, true> : stage_kernel<float, false>;
}

}  // namespace

int stage_cuda(const StageArgs& args, int device, void* stream) {
  if (args.rows == 0) return cudaSuccess;
  OnDevice on(device);
  if (on.error) return on.error;
  // Long pieces spread the cost of reading a table row; short ones fill a large GPU when there is little work.
  int64_t in_row = (args.elements + kStep - 1) / kStep;
  int64_t steps = in_row * args.rows / (int64_t(multiprocessors(device)) * 16);
  steps = steps < 1 ? 1 : steps > 16 ? 16 : steps;
  int64_t chunks = in_row > 0 ? (in_row + steps - 1) / steps : 1;
  int64_t items = args.rows * chunks;
  unsigned grid = unsigned(items < (int64_t(1) << 30) ? items : int64_t(1) << 30);
  auto on_stream = static_cast<cudaStream_t>(stream);
  uint32_t vectorised = vectorised_views(args);
  Kernel kernel = kernel_for(args.scalar == kFloat64, is_plain(args, vectorised));
  kernel<<<grid, kThreads, 0, on_stream>>>(args, vectorised, uint32_t(chunks), int32_t(steps));
  return cudaGetLastError();
}

int prepare_cuda(int device) {
  OnDevice on(device);
  cudaError_t error = on.error;
  for (int k = 0; k < 4 && !error; ++k) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, kernel_for(k & 1, k & 2));
  }
  return error;
}

}  // namespace pydiff
