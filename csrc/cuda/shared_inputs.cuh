// Input channels that share centroids, a launch for each product.
#pragma once

#include "linear_host.cuh"

namespace tinycomp::cuda {

#define TINYCOMP_ONE_HOT(T) OneHot<T>
TINYCOMP_SHARED_PRODUCT(extern, TINYCOMP_ONE_HOT)

// centroids (one_hot x) + up (down x); the sums are made by a product with a one-hot matrix of the labels.
template <class T, class W>
void summed_products(const Device& device, const Tensor& x, const Rows<T>& inputs, const Storage& one_hot,
                     const Storage& down, const Storage& centroids, const Storage& up, Output<T> out) {
  const Between<T> z(device, x, inputs.rows, down.rows, false), corrections(device, x, inputs.rows, up.rows, false),
      sums(device, x, inputs.rows, one_hot.rows, false);
  product<T, W>(device, inputs.matrix(), inputs.rows, down, keep(z));
  product<T, W>(device, keep(z).next(), inputs.rows, up, keep(corrections));
  product<T, OneHot<T>>(device, inputs.matrix(), inputs.rows, one_hot, keep(sums));
  out.base = corrections.data, out.base_stride = corrections.stride;
  product<T, W>(device, keep(sums).next(), inputs.rows, centroids, out);
}

}  // namespace tinycomp::cuda
