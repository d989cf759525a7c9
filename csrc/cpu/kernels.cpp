// The loops themselves. setup.py compiles this file once for each instruction set, with PYDIFF_KERNELS naming the
// table it defines. Loops are plain and left to the compiler's vectoriser: with explicit fused multiply-adds and no
// reassociation, every width and every tail computes the same bits.
#include "kernels.h"
#include "philox_lanes.h"

#ifndef PYDIFF_KERNELS
#define PYDIFF_KERNELS kBaselineKernels
#define PYDIFF_ISA "baseline"
#endif

// Elements of one position never depend on those of another, even where an output overwrites an operand.
#if defined(__clang__)
#define PYDIFF_LOOP _Pragma("clang loop vectorize(assume_safety)")
#else
#define PYDIFF_LOOP _Pragma("GCC ivdep")
#endif

namespace pydiff {
namespace {

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

inline float load(const float* p) { return *p; }
inline double load(const double* p) { return *p; }
inline float load(const Bf16* p) { return from_bfloat16(p->bits); }
inline float load(const Fp16* p) { return from_float16(p->bits); }
inline void store(float* p, float v) { *p = v; }
inline void store(float* p, double v) { *p = float(v); }
inline void store(double* p, double v) { *p = v; }
inline void store(Bf16* p, double v) { p->bits = to_bfloat16(float(v)); }
inline void store(Fp16* p, double v) { p->bits = to_float16(float(v)); }
inline void store(Bf16* p, float v) { p->bits = to_bfloat16(v); }
inline void store(Fp16* p, float v) { p->bits = to_float16(v); }

// Calls body(offset, stride, done, count) for each run of equally spaced elements that makes up [first, first + n).
template <class Body>
inline void for_each_run(const View& view, int64_t first, int n, Body body) {
  int64_t inner = view.sizes[view.dims - 1], stride = view.strides[view.dims - 1];
  for (int done = 0; done < n;) {
    int64_t left = inner - (first + done) % inner;
    int count = left < n - done ? int(left) : n - done;
    body(offset_of(view, first + done), stride, done, count);
    done += count;
  }
}

template <class Source, class Scalar>
void gather(const View& view, int64_t base, int64_t first, int n, Scalar* out) {
  const Source* data = reinterpret_cast<const Source*>(view.data) + base;
  for_each_run(view, first, n, [&](int64_t offset, int64_t stride, int done, int count) {
    const Source* from = data + offset;
    Scalar* to = out + done;
    if (stride == 1) {
      PYDIFF_LOOP
      for (int i = 0; i < count; ++i) to[i] = Scalar(load(from + i));
    } else {
      for (int i = 0; i < count; ++i) to[i] = Scalar(load(from + i * stride));
    }
  });
}

template <class Scalar> constexpr int dtype_of();
template <> constexpr int dtype_of<float>() { return kFloat32; }
template <> constexpr int dtype_of<double>() { return kFloat64; }

// Elements [first, first + n) of one row as contiguous scalars: straight from memory if they lie so, else in `buffer`.
template <class Scalar>
const Scalar* fetch(const View& view, int64_t base, int64_t first, int n, Scalar* buffer) {
  int last = view.dims - 1;
  if (view.dtype == dtype_of<Scalar>() && view.strides[last] == 1 && first % view.sizes[last] + n <= view.sizes[last])
    return reinterpret_cast<const Scalar*>(view.data) + base + offset_of(view, first);
  switch (view.dtype) {
    case kFloat32: gather<float>(view, base, first, n, buffer); break;
    case kFloat64: gather<double>(view, base, first, n, buffer); break;
    case kBFloat16: gather<Bf16>(view, base, first, n, buffer); break;
    default: gather<Fp16>(view, base, first, n, buffer);
  }
  return buffer;
}

template <class Target, class Scalar>
void scatter_scaled(const View& view, int64_t base, int64_t first, int n, const Scalar* x, Scalar scale) {
  Target* data = reinterpret_cast<Target*>(view.data) + base;
  for_each_run(view, first, n, [&](int64_t offset, int64_t stride, int done, int count) {
    Target* to = data + offset;
    const Scalar* from = x + done;
    if (stride == 1) {
      PYDIFF_LOOP
      for (int i = 0; i < count; ++i) store(to + i, scale * from[i]);
    } else {
      for (int i = 0; i < count; ++i) store(to + i * stride, scale * from[i]);
    }
  });
}

template <class Scalar>
void write_scaled(const View& view, int64_t base, int64_t first, int n, const Scalar* x, Scalar scale) {
  switch (view.dtype) {
    case kFloat32: scatter_scaled<float>(view, base, first, n, x, scale); break;
    case kFloat64: scatter_scaled<double>(view, base, first, n, x, scale); break;
    case kBFloat16: scatter_scaled<Bf16>(view, base, first, n, x, scale); break;
    default: scatter_scaled<Fp16>(view, base, first, n, x, scale);
  }
}

void normals_from(const WordArrays& words, float* out) {
  PYDIFF_LOOP
  for (int i = 0; i < kBlocks; ++i) {
    Pair a = box_muller(words.r0[i], words.r1[i]), b = box_muller(words.r2[i], words.r3[i]);
    out[4 * i] = a.cosine;
    out[4 * i + 1] = a.sine;
    out[4 * i + 2] = b.cosine;
    out[4 * i + 3] = b.sine;
  }
}

// n normals of a row's draw, from the first of block `block` on.
void fill_normal(float* out, uint64_t seed, uint32_t draw, uint64_t block, int n) {
  WordArrays words;
  for (; n > 0; n -= 4 * kBlocks, out += 4 * kBlocks, block += kBlocks) {
    draw_words(words, seed, draw, block);
    if (n >= 4 * kBlocks) {
      normals_from(words, out);
    } else {
      alignas(64) float last[4 * kBlocks];
      normals_from(words, last);
      memcpy(out, last, size_t(n) * sizeof(float));
    }
  }
}

template <int K, class Scalar>
void combine_exactly(Scalar* out, const Scalar* const* operands, const Scalar* weights, int n) {
  const Scalar* v[K];
  Scalar w[K];
  for (int k = 0; k < K; ++k) v[k] = operands[k], w[k] = weights[k];
  PYDIFF_LOOP
  for (int i = 0; i < n; ++i) {
    Scalar sum = w[0] * v[0][i];
#pragma GCC unroll 12
    for (int k = 1; k < K; ++k) sum = fused(w[k], v[k][i], sum);
    out[i] = sum;
  }
}

// out = sum of weights[k] * operands[k], fused in this order. `out` may be one of the operands.
template <class Scalar>
void combine(Scalar* out, const Scalar* const* operands, const Scalar* weights, int count, int n) {
  switch (count) {
    case 0: for (int i = 0; i < n; ++i) out[i] = 0; break;
    case 1: combine_exactly<1>(out, operands, weights, n); break;
    case 2: combine_exactly<2>(out, operands, weights, n); break;
    case 3: combine_exactly<3>(out, operands, weights, n); break;
    case 4: combine_exactly<4>(out, operands, weights, n); break;
    case 5: combine_exactly<5>(out, operands, weights, n); break;
    case 6: combine_exactly<6>(out, operands, weights, n); break;
    case 7: combine_exactly<7>(out, operands, weights, n); break;
    case 8: combine_exactly<8>(out, operands, weights, n); break;
    case 9: combine_exactly<9>(out, operands, weights, n); break;
    case 10: combine_exactly<10>(out, operands, weights, n); break;
    case 11: combine_exactly<11>(out, operands, weights, n); break;
    default: combine_exactly<12>(out, operands, weights, n);
  }
}

template <class Scalar>
bool all_finite(const Scalar* v, int n) {
  int bad = 0;
  PYDIFF_LOOP
  for (int i = 0; i < n; ++i) bad |= v[i] - v[i] != 0;  // inf - inf and NaN - NaN are NaN
  return !bad;
}

template <class Scalar>
struct Buffers {
  alignas(64) Scalar m[kTile], cond[kTile], d[kTile], z[2][kTile], constant[kTile], extra[kTile];
  alignas(64) Scalar mask[kTile], known[kTile], kept[kTile], outputs[kNumOutputs][kTile];
  alignas(64) float normals[kTile];
};

inline const float* as_scalar(const float* normals, float*, int) { return normals; }
inline const double* as_scalar(const float* normals, double* buffer, int n) {
  for (int i = 0; i < n; ++i) buffer[i] = normals[i];
  return buffer;
}

// One batch row at its present stage.
template <class Scalar>
class Row {
 public:
  // False where the row has finished.
  bool begin(const StageArgs& args, int64_t row) {
    row_ = row;
    stage_ = args.cursor[row];
    if (stage_ >= args.stop[row]) return false;
    c_ = static_cast<const Scalar*>(args.coefficients) + int64_t(stage_) * kCoefficientColumns;
    index_ = args.indices + int64_t(stage_) * kIndexColumns;
    uint32_t nonzero[kNumOutputs], known = 0;
    for (int k = 0; k < kNumOutputs; ++k) {
      nonzero[k] = 0;
      for (int j = 0; j < kNumOperands; ++j) nonzero[k] |= uint32_t(c_[kNumOperands * k + j] != 0) << j;
    }
    for (int j = 0; j < 3; ++j) known |= uint32_t(c_[kKnown + j] != 0) << j;
    program_ = read_program(args, c_, index_, nonzero, known);
    writes_input_ = args.model_input.data && stage_ + 1 < args.stop[row];
    return true;
  }

  void run(const StageArgs& args, int64_t first, int n, Buffers<Scalar>& buffers) {
    const Scalar* operands[kNumOperands] = {};
    locate(args, first, n, buffers, operands);
    if (program_.uncond || program_.cond) {
      operands[kM] = guided(args, first, n, buffers);
      if (args.nonfinite && !all_finite(operands[kM], n)) report(args);
    }
    if (program_.reads >> kD & 1u) operands[kD] = convert(operands, n, buffers);

    Scalar* at[kNumOutputs];  // where each output goes for now
    for (int k = 0; k < kNumOutputs; ++k) {
      if (program_.targets[k] < 0) continue;
      bool read_later = false;
      for (int j = k + 1; j < kNumOutputs; ++j) read_later |= program_.outputs[j] >> program_.targets[k] & 1u;
      at[k] = read_later ? buffers.outputs[k] : target(args, k, first);
      sum(at[k], program_.outputs[k], c_ + kNumOperands * k, operands, n);
      if (k == 0 && program_.blend) blend(args, at[0], first, n, operands, buffers);
    }
    for (int k = 0; k < kNumOutputs; ++k)
      if (program_.targets[k] >= 0 && at[k] == buffers.outputs[k])
        memcpy(target(args, k, first), at[k], size_t(n) * sizeof(Scalar));

    if (!writes_input_) return;
    Scalar scale = c_[kCoefficientColumns + kInputScale];
    for (int copy = 0; copy < args.copies; ++copy) {
      int64_t base = (row_ + copy * args.rows) * args.model_input.row_stride;
      write_scaled(args.model_input, base, first, n, target(args, 0, first), scale);
    }
  }

 private:
  Scalar* target(const StageArgs& args, int output, int64_t first) const {
    int64_t start = (program_.targets[output] * args.rows + row_) * args.elements + first;
    return static_cast<Scalar*>(args.registers) + start;
  }

  const Scalar* fetch_row(const View& view, int64_t first, int n, Scalar* buffer) const {
    return fetch(view, row_ * view.row_stride, first, n, buffer);
  }

  void locate(const StageArgs& args, int64_t first, int n, Buffers<Scalar>& buffers, const Scalar** operands) const {
    const Scalar* registers = static_cast<const Scalar*>(args.registers);
    for (int k = 0; k <= args.slots; ++k) operands[k] = registers + (k * args.rows + row_) * args.elements + first;
    if (program_.reads >> kConstant & 1u) operands[kConstant] = fetch_row(args.constant, first, n, buffers.constant);
    if (program_.reads >> kExtra & 1u) operands[kExtra] = fetch_row(args.extra, first, n, buffers.extra);
    for (int k = 0; k < 2; ++k)
      if (program_.reads >> (kZ0 + k) & 1u) operands[kZ0 + k] = draw(args, k, first, n, buffers);
  }

  const Scalar* draw(const StageArgs& args, int k, int64_t first, int n, Buffers<Scalar>& buffers) const {
    int32_t number = index_[kDraw0 + k];
    if (args.noise.data) {
      int64_t base = number * args.draw_stride + row_ * args.noise.row_stride;
      return fetch(args.noise, base, first, n, buffers.z[k]);
    }
    constexpr bool in_place = sizeof(Scalar) == sizeof(float);
    float* out = in_place ? reinterpret_cast<float*>(buffers.z[k]) : buffers.normals;
    fill_normal(out, uint64_t(args.seeds[row_]), uint32_t(number), uint64_t(first) / 4, n);
    return as_scalar(out, buffers.z[k], n);
  }

  // m = uncond + guidance * (cond - uncond), reading one half alone where the other has no weight.
  const Scalar* guided(const StageArgs& args, int64_t first, int n, Buffers<Scalar>& buffers) const {
    int64_t half = args.copies == 2 ? args.rows : 0;
    const Scalar *u = nullptr, *v = nullptr;
    if (program_.uncond) u = fetch(args.m, row_ * args.m.row_stride, first, n, buffers.m);
    if (program_.cond) v = fetch(args.m, (row_ + half) * args.m.row_stride, first, n, buffers.cond);
    if (!u || !v) return u ? u : v;
    const Scalar scale = c_[kGuidance];
    Scalar* out = buffers.m;
    PYDIFF_LOOP
    for (int i = 0; i < n; ++i) out[i] = fused(scale, v[i] - u[i], u[i]);
    return out;
  }

  const Scalar* convert(const Scalar* const* operands, int n, Buffers<Scalar>& buffers) const {
    const Scalar low = c_[kClip], high = c_[kClip + 1];
    const bool clips = low > -HUGE_VAL || high < HUGE_VAL;
    if (!program_.d_x && program_.d_m && c_[kOutput + 1] == 1 && !clips) return operands[kM];
    const Scalar* terms[2] = {operands[kX], operands[kM]};
    const bool both = program_.d_x && program_.d_m;
    Scalar* d = buffers.d;
    if (both) combine(d, terms, c_ + kOutput, 2, n);
    else if (program_.d_x) combine(d, terms, c_ + kOutput, 1, n);
    else combine(d, terms + 1, c_ + kOutput + 1, program_.d_m ? 1 : 0, n);
    if (!clips) return d;
    PYDIFF_LOOP
    for (int i = 0; i < n; ++i) {
      Scalar v = d[i] < low ? low : d[i];
      d[i] = v > high ? high : v;
    }
    return d;
  }

  static void sum(Scalar* out, uint32_t bits, const Scalar* weights, const Scalar* const* operands, int n) {
    const Scalar* read[kNumOperands];
    Scalar w[kNumOperands];
    int count = 0;
    for (int k = 0; k < kNumOperands; ++k)
      if (bits >> k & 1u) read[count] = operands[k], w[count++] = weights[k];
    combine(out, read, w, count, n);
  }

  void blend(const StageArgs& args, Scalar* x, int64_t first, int n, const Scalar* const* operands,
             Buffers<Scalar>& buffers) const {
    const Scalar* read[3];
    Scalar w[3];
    int count = 0;
    if (program_.known_read) {
      read[count] = fetch_row(args.known, first, n, buffers.known);
      w[count++] = c_[kKnown];
    }
    for (int k = 0; k < 2; ++k)
      if (c_[kKnown + 1 + k] != 0) read[count] = operands[kZ0 + k], w[count++] = c_[kKnown + 1 + k];
    combine(buffers.kept, read, w, count, n);
    const Scalar* mask = fetch_row(args.mask, first, n, buffers.mask);
    const Scalar* kept = buffers.kept;
    PYDIFF_LOOP
    for (int i = 0; i < n; ++i) x[i] = fused(mask[i], kept[i], (1 - mask[i]) * x[i]);
  }

  // Every tile of the row that finds the fault writes the same number.
  void report(const StageArgs& args) const {
    int32_t* flag = args.nonfinite + row_;
    if (__atomic_load_n(flag, __ATOMIC_RELAXED) < 0) __atomic_store_n(flag, stage_, __ATOMIC_RELAXED);
  }

  int64_t row_;
  int32_t stage_;
  const Scalar* c_;
  const int32_t* index_;
  RowProgram program_;
  bool writes_input_;
};

template <class Scalar>
void run_tiles(const StageArgs& args, int64_t first, int64_t last) {
  Buffers<Scalar> buffers;
  Row<Scalar> row;
  const int64_t tiles = tiles_in(args.elements);
  while (first < last) {
    int64_t b = first / tiles, end = last < (b + 1) * tiles ? last : (b + 1) * tiles;
    if (row.begin(args, b)) {
      for (int64_t tile = first - b * tiles; tile < end - b * tiles; ++tile) {
        int64_t start = tile * kTile, left = args.elements - start;
        row.run(args, start, int(left < kTile ? left : kTile), buffers);
      }
    }
    first = end;
  }
}

void run_stage(const StageArgs& args, int64_t first, int64_t last) {
  if (args.scalar == kFloat64) run_tiles<double>(args, first, last);
  else run_tiles<float>(args, first, last);
}

void run_normal(float* out, const int64_t* seeds, uint32_t draw, int64_t elements, int64_t first, int64_t last) {
  const int64_t tiles = tiles_in(elements);
  for (int64_t t = first; t < last; ++t) {
    int64_t row = t / tiles, start = (t % tiles) * kTile, left = elements - start;
    fill_normal(out + row * elements + start, uint64_t(seeds[row]), draw, uint64_t(start) / 4,
                int(left < kTile ? left : kTile));
  }
}

}  // namespace

const CpuKernels PYDIFF_KERNELS = {PYDIFF_ISA, run_stage, run_normal};

}  // namespace pydiff
