// LSQ and the per-bin table of Bin Regularization, each direction one pass over the data.
//
//   forward    c = round(clip(v / alpha, qn, qp)),  v_hat = c * alpha,  count_i, mse_i = mean over bin i of distance^2
//   backward   dv     = dv_hat * [qn < v / alpha < qp] + pull,   pull = 2 / N_i * dmse_i * distance
//              dalpha = g * sum dv_hat * (c - v / alpha, clipped: c);   of the bins: -sum pull * c
//
// The formulas and their sources stand in brqat/quantizer/lsq.py and brqat/bins.py. Saved for backward: v, alpha and
// the counts, nothing of v's size that was not there before.

#include "autograd.h"
#include "lsq.h"

#include <algorithm>
#include <tuple>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/ScalarType.h>
#include <torch/library.h>

namespace brqat {
namespace {

using Optional = std::optional<Tensor>;
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor>;

// A block of any dtype as float32, and back.
template <typename scalar>
struct Floats {
  float held[BLOCK];

  const float* read(const scalar* in, int64_t n) {
    if constexpr (std::is_same_v<scalar, float>) {
      return in;
    } else {
      at::vec::convert(in, held, n);
      return held;
    }
  }
  float* room(scalar* out) {
    if constexpr (std::is_same_v<scalar, float>) return out;
    else return held;
  }
  void write(scalar* out, int64_t n) {
    if constexpr (!std::is_same_v<scalar, float>) at::vec::convert(held, out, n);
  }
};

template <bool SIGN, typename scalar, typename code_type, typename MakeSums>
void forward_piece(const scalar* v, scalar* v_hat, code_type* codes, int64_t size, const Site& site_,
                   const MakeSums& make_sums) {
  const Site site = site_;  // a store could change what lies behind a reference, for all the compiler knows
  auto sums = make_sums();
  Floats<scalar> in_float, out_float;
  float code[BLOCK];
  for (int64_t start = 0; start < size; start += BLOCK) {
    const int64_t n = std::min(BLOCK, size - start);
    const float* in = in_float.read(v + start, n);
    float* out = out_float.room(v_hat + start);
    const auto step = [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Vec x = Vec::loadu(in + i, lanes);
      const Vec u = site.divided(x);
      const Vec c = site.code<SIGN>(u);
      (c * site.alpha).store(out + i, lanes);
      if (codes) site.known(c).store(code + i);
      if constexpr (decltype(sums)::WANTED) {
        const Vec distance = site.distance(x, u, c);
        sums.add(site.bin_code(u, c), distance * distance, lanes);
      }
    };
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) step(i, std::integral_constant<int64_t, WIDTH>());
    if (i < n) step(i, n - i);
    out_float.write(v_hat + start, n);
    if (codes)
      for (int64_t i = 0; i < n; ++i) codes[start + i] = static_cast<code_type>(code[i]);
  }
  sums.finish();
}

template <typename scalar, bool SIGN>
void backward_piece(const scalar* v, const scalar* grad, scalar* grad_v, int64_t size, float alpha, const Grid& grid,
                    const Bins& bins, const Pulls& pulls, double* sum, double* sum_br) {
  const Site site(alpha, grid, bins);
  Gradient<SIGN> gradient{site, pulls, bins.wanted};
  Floats<scalar> in_float, grad_float, out_float;
  const float zeros[BLOCK] = {};
  for (int64_t start = 0; start < size; start += BLOCK) {
    const int64_t n = std::min(BLOCK, size - start);
    const float* in = in_float.read(v + start, n);
    const float* g = grad ? grad_float.read(grad + start, n) : zeros;
    float* out = out_float.room(grad_v + start);
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) gradient(Vec::loadu(in + i), Vec::loadu(g + i)).store(out + i);
    if (const int64_t lanes = n - i)
      gradient(Vec::loadu(in + i, lanes), Vec::loadu(g + i, lanes), lanes).store(out + i, lanes);
    out_float.write(grad_v + start, n);
    gradient.flush(sum, sum_br);
  }
}

// Calls function(scalar, sign) with the types that the tensor and the quantizer need.
template <typename Function>
void for_types(at::ScalarType type, bool sign, const Function& function) {
  const auto for_scalar = [&](auto scalar) {
    if (sign) function(scalar, std::true_type());
    else function(scalar, std::false_type());
  };
  if (type == at::kFloat) for_scalar(float());
  else for_scalar(at::BFloat16());
}

Forward forward_cpu(const Tensor& v_, const Tensor& alpha_, int64_t qn, int64_t qp, bool sign, bool codes, bool bins,
                    bool in_steps, bool drop_clipped) {
  check(v_, alpha_);
  const Grid grid(qn, qp, sign);
  const Bins asked{bins, in_steps, drop_clipped};
  const int64_t levels = bins ? grid.levels() : 0;
  const Tensor alpha = alpha_.contiguous(), v = walkable(v_, alpha.numel());
  Tensor v_hat = empty_as(v), stored = codes ? empty_as(v, code_type(qn)) : nothing(code_type(qn));
  const auto pieces = pieces_of(v.numel(), alpha.numel());
  std::vector<double> sums(pieces.size() * 2 * levels);
  const float* alphas = alpha.const_data_ptr<float>();
  for_types(v.scalar_type(), sign, [&](auto scalar, auto is_sign) {
    using type = decltype(scalar);
    const type* in = v.const_data_ptr<type>();
    type* out = v_hat.mutable_data_ptr<type>();
    const auto with_codes = [&](auto* codes_out) {
      at::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          const auto [start, size, channel] = pieces[p];
          double* part = sums.data() + p * 2 * levels;
          const Site site(alphas[channel], grid, asked);
          with_sums(grid, bins, size, part, part + levels, [&](const auto& make) {
            forward_piece<decltype(is_sign)::value>(in + start, out + start, codes ? codes_out + start : nullptr, size,
                                                    site, make);
          });
        }
      });
    };
    if (qn < 0) with_codes(stored.mutable_data_ptr<int8_t>());
    else with_codes(stored.mutable_data_ptr<uint8_t>());
  });
  auto [count, mse] = table_of(sums, pieces.size(), levels);
  return {v_hat, stored, count, mse};
}

Forward forward_meta(const Tensor& v_, const Tensor& alpha, int64_t qn, int64_t qp, bool sign, bool codes, bool bins,
                     bool, bool) {
  const Tensor v = walkable(v_, alpha.numel());
  const int64_t levels = bins ? Grid(qn, qp, sign).levels() : 0;
  const auto as_codes = v.options().dtype(code_type(qn));
  Tensor stored = codes ? at::empty_like(v, as_codes) : at::empty({0}, as_codes);
  return {at::empty_like(v), stored, at::empty({levels}, v.options().dtype(at::kLong)),
          at::empty({levels}, v.options().dtype(at::kFloat))};
}

Backward backward_cpu(const Optional& grad_, const Optional& grad_mse, const Tensor& v_, const Tensor& alpha_,
                      const Tensor& count, int64_t qn, int64_t qp, bool sign, double scale, bool in_steps,
                      bool drop_clipped, bool one_alpha) {
  const Grid grid(qn, qp, sign);
  const Bins bins{grad_mse.has_value(), in_steps, drop_clipped};
  const Tensor alpha = alpha_.contiguous(), v = walkable(v_, alpha.numel());
  const Tensor grad = grad_.has_value() ? laid_out_as(*grad_, v) : Tensor();
  const Pulls pulls(grid, grad_mse, count);
  Tensor grad_v = empty_as(v), grad_alpha = empty_as(alpha);
  Tensor grad_bins = one_alpha ? nothing(at::kFloat) : empty_as(alpha);
  const auto pieces = pieces_of(v.numel(), alpha.numel());
  std::vector<double> sums(pieces.size() * 2);
  const float* alphas = alpha.const_data_ptr<float>();
  for_types(v.scalar_type(), sign, [&](auto scalar, auto is_sign) {
    using type = decltype(scalar);
    const type* in = v.const_data_ptr<type>();
    const type* from_above = grad.defined() ? grad.const_data_ptr<type>() : nullptr;
    type* out = grad_v.mutable_data_ptr<type>();
    at::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const auto [start, size, channel] = pieces[p];
        backward_piece<type, decltype(is_sign)::value>(in + start, from_above ? from_above + start : nullptr,
                                                       out + start, size, alphas[channel], grid, bins, pulls,
                                                       &sums[2 * p], &sums[2 * p + 1]);
      }
    });
  });
  std::vector<double> totals(2 * alpha.numel());
  for (size_t p = 0; p < pieces.size(); ++p)
    for (int64_t which = 0; which < 2; ++which) totals[2 * pieces[p].alpha + which] += sums[2 * p + which];
  for (int64_t channel = 0; channel < alpha.numel(); ++channel) {
    const double lsq = scale * totals[2 * channel], of_bins = totals[2 * channel + 1];
    grad_alpha.mutable_data_ptr<float>()[channel] = static_cast<float>(one_alpha ? lsq + of_bins : lsq);
    if (!one_alpha) grad_bins.mutable_data_ptr<float>()[channel] = static_cast<float>(of_bins);
  }
  return {grad_v, grad_alpha, grad_bins};
}

Backward backward_meta(const Optional&, const Optional&, const Tensor& v, const Tensor& alpha, const Tensor&, int64_t,
                       int64_t, bool, double, bool, bool, bool one_alpha) {
  return {at::empty_like(walkable(v, alpha.numel())), at::empty_like(alpha),
          one_alpha ? at::empty({0}, alpha.options()) : at::empty_like(alpha)};
}

const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("brqat::lsq_forward", "")
                             .typed<decltype(forward_cpu)>();
  return op;
}

const auto& backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("brqat::lsq_backward", "")
                             .typed<decltype(backward_cpu)>();
  return op;
}

struct LsqBackward : torch::autograd::Node {
  SavedVariable v, alpha, count;
  int64_t qn, qp;
  bool sign, in_steps, drop_clipped, one_alpha;
  double scale;

  std::string name() const override { return "LsqBackward"; }

  void release_variables() override {
    const std::lock_guard lock(mutex_);
    v.reset_data();
    alpha.reset_data();
    count.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    refuse_second_derivative();
    const std::lock_guard lock(mutex_);
    const Tensor mse = grads.size() > 1 ? grads[1] : Tensor();
    if (!grads[0].defined() && !mse.defined()) return variable_list(3);
    // Before the guard: a hook that unpacks may run a forward of its own, which wants autograd.
    const Tensor v_ = v.unpack(), alpha_ = alpha.unpack(), count_ = count.unpack();
    at::AutoDispatchBelowADInplaceOrView below;
    auto [to_v, to_alpha, to_bins] = backward_op().call(if_defined(grads[0]), if_defined(mse), v_, alpha_, count_, qn,
                                                        qp, sign, scale, in_steps, drop_clipped, one_alpha);
    if (one_alpha || !mse.defined()) to_bins = Tensor();
    if (!one_alpha && !grads[0].defined()) to_alpha = Tensor();
    return {to_v, to_alpha, to_bins};
  }
};

// alpha_br is alpha, or a copy without gradient: who may move alpha is decided outside.
Forward lsq_autograd(const Tensor& v, const Tensor& alpha, const Tensor& alpha_br, int64_t qn, int64_t qp, bool sign,
                     double scale, bool codes, bool bins, bool in_steps, bool drop_clipped) {
  refuse_forward_mode(v);
  auto results = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return forward_op().call(v, alpha, qn, qp, sign, codes, bins, in_steps, drop_clipped);
  }();
  if (!compute_requires_grad(v, alpha, alpha_br)) return results;
  const auto& [v_hat, stored, count, mse] = results;
  const bool one_alpha = alpha_br.is_same(alpha);
  const auto node = node_for<LsqBackward>(v, alpha, one_alpha ? Tensor() : alpha_br);
  node->v = SavedVariable(v, false);
  node->alpha = SavedVariable(alpha, false);
  node->count = SavedVariable(count, false);
  node->qn = qn;
  node->qp = qp;
  node->sign = sign;
  node->in_steps = in_steps;
  node->drop_clipped = drop_clipped;
  node->one_alpha = one_alpha;
  node->scale = scale;
  set_history(v_hat, node);
  if (bins) set_history(mse, node);
  return results;
}

Forward lsq_without_grad(const Tensor& v, const Tensor& alpha, const Tensor&, int64_t qn, int64_t qp, bool sign,
                         double, bool codes, bool bins, bool in_steps, bool drop_clipped) {
  return forward_op().call(v, alpha, qn, qp, sign, codes, bins, in_steps, drop_clipped);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(brqat, m) {
  m.def(
      "lsq(Tensor v, Tensor alpha, Tensor alpha_br, int qn, int qp, bool sign, float scale, bool codes, bool bins, "
      "bool in_steps, bool drop_clipped) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lsq_forward(Tensor v, Tensor alpha, int qn, int qp, bool sign, bool codes, bool bins, bool in_steps, bool "
      "drop_clipped) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lsq_backward(Tensor? grad, Tensor? grad_mse, Tensor v, Tensor alpha, Tensor count, int qn, int qp, bool sign, "
      "float scale, bool in_steps, bool drop_clipped, bool one_alpha) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(brqat, CPU, m) {
  m.impl("lsq", lsq_without_grad);
  m.impl("lsq_forward", forward_cpu);
  m.impl("lsq_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(brqat, Meta, m) {
  m.impl("lsq", lsq_without_grad);
  m.impl("lsq_forward", forward_meta);
  m.impl("lsq_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(brqat, Autograd, m) { m.impl("lsq", lsq_autograd); }

}  // namespace brqat
