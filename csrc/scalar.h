// Scalar formulas shared by the CPU and CUDA kernels. No torch, no standard library.
#pragma once

#if defined(__CUDACC__)
#define PALM_HD __host__ __device__ __forceinline__
#else
#define PALM_HD inline __attribute__((always_inline))
#endif

namespace palm {

// silu(g) = g sigmoid(g); s is sigmoid(g). T is a scalar or a vector of them.
template <class T>
PALM_HD T silu(T g, T s) {
  return g * s;
}

// d silu(g) / dg = s (1 + g (1 - s)); one is 1 in T.
template <class T>
PALM_HD T silu_slope(T g, T s, T one) {
  return s * (one + g * (one - s));
}

// x1 of the pair (x1, x2) rotated by the angle whose cosine and sine are c and s; x2 is rotated(x2, x1, c,
// -s).
template <class T>
PALM_HD T rotated(T x1, T x2, T c, T s) {
  return x1 * c - x2 * s;
}

}  // namespace palm
