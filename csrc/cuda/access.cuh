// Four consecutive elements of a row at a time: the unit of Philox, and of 16-byte memory accesses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../stage.h"

namespace pydiff {

// Views that may be read and written four elements at a time, as bits of a launch's `vectorised`.
enum ViewBit : uint32_t {
  kRegistersBit = 1, kModelBit = 2, kInputBit = 4, kMaskBit = 8, kKnownBit = 16, kConstantBit = 32, kExtraBit = 64,
  kNoiseBit = 128
};

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }

template <class Target> struct Narrow {
  static __device__ __forceinline__ Target from(double v) { return Target(v); }
};
template <> struct Narrow<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 from(float v) { return __float2bfloat16_rn(v); }
};
template <> struct Narrow<__half> {
  static __device__ __forceinline__ __half from(float v) { return __float2half_rn(v); }
};
template <> struct Narrow<float> {
  static __device__ __forceinline__ float from(float v) { return v; }
};

template <int kBytes> struct Packet;
template <> struct Packet<8> { using type = uint2; static constexpr int count = 1; };
template <> struct Packet<16> { using type = uint4; static constexpr int count = 1; };
template <> struct Packet<32> { using type = uint4; static constexpr int count = 2; };

template <class Type>
union Quad {
  __device__ Quad() {}
  using P = Packet<int(4 * sizeof(Type))>;
  typename P::type packets[P::count];
  Type values[4];
};

template <class Source, class Scalar>
__device__ __forceinline__ void load_packed(const Source* from, Scalar (&v)[4]) {
  Quad<Source> quad;
  using P = typename Quad<Source>::P;
#pragma unroll
  for (int k = 0; k < P::count; ++k) quad.packets[k] = reinterpret_cast<const typename P::type*>(from)[k];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = Scalar(widen(quad.values[i]));
}

template <class Target, class Scalar>
__device__ __forceinline__ void store_packed(Target* to, const Scalar (&v)[4]) {
  Quad<Target> quad;
  using P = typename Quad<Target>::P;
#pragma unroll
  for (int i = 0; i < 4; ++i) quad.values[i] = Narrow<Target>::from(v[i]);
#pragma unroll
  for (int k = 0; k < P::count; ++k) reinterpret_cast<typename P::type*>(to)[k] = quad.packets[k];
}

// The same as offset_of, with 32-bit divisions where the element's number allows them.
__device__ __forceinline__ int64_t offset_at(const View& view, int64_t e) {
  if (view.dims == 1) return e * view.strides[0];
  if (e >> 31) return offset_of(view, e);
  int64_t offset = 0;
  uint32_t left = uint32_t(e);
  for (int k = view.dims - 1; k > 0; --k) {
    uint32_t size = uint32_t(view.sizes[k]), rest = left / size;
    offset += int64_t(left - rest * size) * view.strides[k];
    left = rest;
  }
  return offset + int64_t(left) * view.strides[0];
}

// Where four elements of a row stand in a view, from the start of the row. Those beyond the row's end have no place.
struct Place {
  int64_t at[4];
  int count;
  bool packed;
};

template <bool kPacked>
__device__ __forceinline__ Place place_of(const View& view, int64_t e, int count, bool packed) {
  Place place = {{e, 0, 0, 0}, count, kPacked || packed};
  if (place.packed) return place;
#pragma unroll
  for (int i = 0; i < 4; ++i) place.at[i] = offset_at(view, e + i);
  return place;
}

// What lies beyond the row's end stays as it is.
template <class Source, class Scalar>
__device__ __forceinline__ void load_as(const View& view, int64_t base, const Place& place, Scalar (&v)[4]) {
  const Source* data = reinterpret_cast<const Source*>(view.data) + base;
  if (place.packed) return load_packed(data + place.at[0], v);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < place.count) v[i] = Scalar(widen(data[place.at[i]]));
}

template <class Scalar>
__device__ __forceinline__ void load_any(const View& view, int64_t base, const Place& place, Scalar (&v)[4]) {
  switch (view.dtype) {
    case kFloat32: return load_as<float>(view, base, place, v);
    case kFloat64: return load_as<double>(view, base, place, v);
    case kBFloat16: return load_as<__nv_bfloat16>(view, base, place, v);
    default: return load_as<__half>(view, base, place, v);
  }
}

template <class Target, class Scalar>
__device__ __forceinline__ void store_as(const View& view, int64_t base, const Place& place, const Scalar (&v)[4]) {
  Target* data = reinterpret_cast<Target*>(view.data) + base;
  if (place.packed) return store_packed(data + place.at[0], v);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < place.count) data[place.at[i]] = Narrow<Target>::from(v[i]);
}

template <class Scalar>
__device__ __forceinline__ void store_any(const View& view, int64_t base, const Place& place, const Scalar (&v)[4]) {
  switch (view.dtype) {
    case kFloat32: return store_as<float>(view, base, place, v);
    case kFloat64: return store_as<double>(view, base, place, v);
    case kBFloat16: return store_as<__nv_bfloat16>(view, base, place, v);
    default: return store_as<__half>(view, base, place, v);
  }
}

}  // namespace pydiff
