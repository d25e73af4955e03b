// All sums that the level metrics are made of, in one pass over the values of a site (brqat/metrics.py says what they
// are): with u = v / alpha and e = u - c the scalars in the order of its SCALARS but for `n` and `moved_by_alpha`, then
// per bin the count, sum of e and sum of e^2, then the histogram of u.

#include "lsq.h"

#include <array>

#include <ATen/Dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace brqat {
namespace {

constexpr int64_t SCALARS = 13;

struct Histogram {
  float first_edge, width;
  int64_t bins;
};

template <typename code_type>
void piece(const float* v, const code_type* codes, int64_t size, float alpha_value, const Grid& grid,
           const Histogram& histogram, double* out) {
  const Vec alpha(alpha_value), qn(static_cast<float>(grid.qn)), qp(static_cast<float>(grid.qp));
  const Vec zero(0.0f), one(1.0f), hundredth(0.01f), twentieth(0.05f);
  const int64_t levels = grid.levels();
  double *counts = out + SCALARS, *sums = counts + levels, *squares = sums + levels, *bars = squares + levels;
  float code[BLOCK], u_held[BLOCK], e_held[BLOCK];
  for (int64_t start = 0; start < size; start += BLOCK) {
    const int64_t n = std::min(BLOCK, size - start);
    for (int64_t i = 0; i < n; ++i) code[i] = static_cast<float>(codes[start + i]);
    std::array<Vec, SCALARS> total;
    total.fill(zero);
    for (int64_t i = 0; i < n; i += WIDTH) {
      const int64_t lanes = std::min(WIDTH, n - i);
      const Vec x = Vec::loadu(v + start + i, lanes), c = Vec::loadu(code + i, lanes);
      const Vec u = x / alpha, e = u - c, d = e.abs();
      const Vec error = x - c * alpha, valid = Vec::set(zero, one, lanes);
      const auto counted = [&](const Vec& if_so) { return if_so * valid; };
      const Vec below = if_less(u, qn, one, zero), above = if_less(qp, u, one, zero);
      const Vec inside = one - below - above, nonzero = if_equal(x, zero, zero, one);
      const Vec infinite = if_equal(x - x, zero, zero, one);
      const Vec terms[SCALARS] = {d,
                                  e * e,
                                  counted(inside),
                                  if_equal(inside, one, d, zero),
                                  counted(nonzero),
                                  if_equal(nonzero, one, d, zero),
                                  counted(below),
                                  counted(above),
                                  counted(if_less(d, hundredth, one, zero)),
                                  counted(if_less(d, twentieth, one, zero)),
                                  x * x,
                                  error * error,
                                  counted(infinite)};
      for (int64_t k = 0; k < SCALARS; ++k) total[k] = total[k] + Vec::set(zero, terms[k], lanes);
      u.store(u_held + i, lanes);
      e.store(e_held + i, lanes);
    }
    for (int64_t k = 0; k < SCALARS; ++k) out[k] += sum_of(total[k]);
    for (int64_t i = 0; i < n; ++i) {
      // A code outside of the grid, which a quantizer may give for NaN, goes into an end bin, as bins.bin_index has it.
      const int64_t bin = std::clamp<int64_t>((codes[start + i] - grid.qn) / grid.gap, 0, levels - 1);
      const double e = e_held[i];
      counts[bin] += 1;
      sums[bin] += e;
      squares[bin] += e * e;
      // Compared as a float first: NaN and what lies far out have no integer.
      const float bar = std::floor((u_held[i] - histogram.first_edge) / histogram.width);
      const float last = static_cast<float>(histogram.bins - 1);
      bars[bar > 0 ? static_cast<int64_t>(bar < last ? bar : last) : 0] += 1;
    }
  }
}

// v: float32, codes: integers of v's shape; alpha: one, or one per row of v.
Tensor site_sums(const Tensor& v_, const Tensor& codes_, const Tensor& alpha_, int64_t qn, int64_t qp, bool sign,
                 double first_edge, double width, int64_t bars) {
  TORCH_CHECK(v_.scalar_type() == at::kFloat, "float32 values");
  TORCH_CHECK(v_.sizes() == codes_.sizes(), "one code per value");
  check(v_, alpha_);
  const Grid grid(qn, qp, sign);
  const Tensor alpha = alpha_.contiguous(), v = walkable(v_, alpha.numel());
  const Tensor codes = laid_out_as(codes_, v);
  const Histogram histogram{static_cast<float>(first_edge), static_cast<float>(width), bars};
  const auto pieces = pieces_of(v.numel(), alpha.numel());
  const int64_t size = SCALARS + 3 * grid.levels() + bars;
  std::vector<double> parts(pieces.size() * size);
  AT_DISPATCH_INTEGRAL_TYPES(codes.scalar_type(), "site_sums", [&] {
    at::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const auto [start, count, channel] = pieces[p];
        piece(v.const_data_ptr<float>() + start, codes.const_data_ptr<scalar_t>() + start, count,
              alpha.const_data_ptr<float>()[channel], grid, histogram, &parts[p * size]);
      }
    });
  });
  Tensor out = at::zeros({size}, v.options().dtype(at::kDouble));
  double* totals = out.mutable_data_ptr<double>();
  for (size_t p = 0; p < pieces.size(); ++p)
    for (int64_t i = 0; i < size; ++i) totals[i] += parts[p * size + i];
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(brqat, m) {
  m.def(
      "site_sums(Tensor v, Tensor codes, Tensor alpha, int qn, int qp, bool sign, float first_edge, float width, int "
      "bars) -> Tensor");
}

TORCH_LIBRARY_IMPL(brqat, CPU, m) { m.impl("site_sums", site_sums); }

}  // namespace brqat
