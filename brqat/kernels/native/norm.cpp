// BatchNorm, an activation and LSQ with its per-bin table, as one: what lies between is never written to memory.
//
//   y = (x - mean) / sqrt(var + eps) * weight + bias (+ shortcut)
//   r = clamp(y, low, high),   v_hat, count, mse = lsq(r)
//
// In training mean and var are the batch's. Backward reads x, which BatchNorm keeps anyway, and computes y and r anew.
// With a shortcut r is an output too, since others read it, and is read instead:
//
//   dy = lsq's gradient at r (+ the gradient of r), where low < y < high;   dshortcut = dy
//   dbias = sum dy,  dweight = sum dy * (x - mean) / std
//   dx = weight / std * (dy - dbias / M - (x - mean) / std * dweight / M)              M values per channel
//
// (Ioffe, Szegedy, 2015, section 3.) x is float32 (N, C, H, W) in channels_last memory: rows of C.

#include "autograd.h"
#include "lsq.h"

#include <array>
#include <tuple>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

namespace brqat {
namespace {

using Optional = std::optional<Tensor>;
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor as_rows(const Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

constexpr int64_t FIRST_ROWS = 16;  // whose mean is near enough to that of all
constexpr int64_t STRETCH = 128;    // rows summed in float before they go to double: roundings grow with their number

// A tensor's rows of channels, cut into pieces of about PIECE elements: some rows, and of them at most GROUP channels,
// or a piece of a network's last layers would be a few rows of a thousand channels, each of which wants sums of its
// own.
struct Rows {
  static constexpr int64_t GROUP = 64;
  int64_t count, channels, groups, per_piece, stacks, pieces;

  explicit Rows(const Tensor& x)
      : count(x.numel() / x.size(1)),
        channels(x.size(1)),
        groups((channels + GROUP - 1) / GROUP),
        per_piece(PIECE / std::min(channels, GROUP)),
        stacks((count + per_piece - 1) / per_piece),
        pieces(groups * stacks) {}

  struct Piece {
    int64_t number, stack, first_row, rows, first_channel, end_channel;
  };

  int64_t rows_of(int64_t stack) const { return std::min(per_piece, count - stack * per_piece); }

  // Calls function(piece) for all, each on any thread.
  template <typename Function>
  void for_each(const Function& function) const {
    at::parallel_for(0, pieces, 1, [&](int64_t from, int64_t to) {
      for (int64_t number = from; number < to; ++number) {
        const int64_t stack = number / groups, first = number % groups * GROUP;
        function(Piece{number, stack, stack * per_piece, rows_of(stack), first, std::min(channels, first + GROUP)});
      }
    });
  }
};

// One number per channel in whole vectors, so that the last can be loaded too.
std::vector<float> per_channel(int64_t channels) { return std::vector<float>(padded(channels)); }

template <int64_t value>
using Constant = std::integral_constant<int64_t, value>;

// Vectors of neighbouring channels.
template <int64_t vectors>
using Several = std::array<Vec, vectors>;

template <int64_t vectors>
C10_ALWAYS_INLINE Several<vectors> all_zero() {
  Several<vectors> zeros;
  zeros.fill(Vec(0.0f));
  return zeros;
}

// Calls function(channel, vectors, lanes) for all channels, four or two vectors at a time where there are as many: what
// is read along a row the processor fetches ahead. lanes, of the last vector, is a constant to the compiler if WIDTH.
template <typename Function>
C10_ALWAYS_INLINE void for_vectors(const Rows::Piece& piece, const Function& function) {
  int64_t c = piece.first_channel;
  for (; c + 4 * WIDTH <= piece.end_channel; c += 4 * WIDTH) function(c, Constant<4>(), Constant<WIDTH>());
  for (; c + 2 * WIDTH <= piece.end_channel; c += 2 * WIDTH) function(c, Constant<2>(), Constant<WIDTH>());
  for (; c + WIDTH <= piece.end_channel; c += WIDTH) function(c, Constant<1>(), Constant<WIDTH>());
  if (c < piece.end_channel) function(c, Constant<1>(), piece.end_channel - c);
}

// Sums of v - about and of its squares over rows. With fewer than four vectors several sums of each run side by side,
// since an addition waits for the one before it.
template <int64_t vectors, typename Lanes>
C10_ALWAYS_INLINE std::pair<Several<vectors>, Several<vectors>> sums_about(const Several<vectors>& about,
                                                                           const float* x, int64_t rows,
                                                                           int64_t channels, Lanes lanes) {
  constexpr int64_t chains = 4 / vectors;
  Several<vectors> sums[chains], squares[chains];
  for (int64_t chain = 0; chain < chains; ++chain) sums[chain] = squares[chain] = all_zero<vectors>();
  const auto take = [&](int64_t chain, int64_t row) __attribute__((always_inline)) {
    for (int64_t k = 0; k < vectors; ++k) {
      const Vec apart = Vec::loadu(x + row * channels + k * WIDTH, lanes) - about[k];
      sums[chain][k] = sums[chain][k] + apart;
      squares[chain][k] = at::vec::fmadd(apart, apart, squares[chain][k]);
    }
  };
  int64_t row = 0;
  for (; row + chains <= rows; row += chains)
    for (int64_t chain = 0; chain < chains; ++chain) take(chain, row + chain);
  for (; row < rows; ++row) take(0, row);
  for (int64_t chain = 1; chain < chains; ++chain) {
    for (int64_t k = 0; k < vectors; ++k) {
      sums[0][k] = sums[0][k] + sums[chain][k];
      squares[0][k] = squares[0][k] + squares[chain][k];
    }
  }
  return {sums[0], squares[0]};
}

// Adds v to total; of its last vector the first lanes only.
template <int64_t vectors>
C10_ALWAYS_INLINE void add_to(double* total, const Several<vectors>& v, int64_t lanes) {
  float held[vectors * WIDTH];
  for (int64_t k = 0; k < vectors; ++k) v[k].store(held + k * WIDTH);
  for (int64_t i = 0; i < (vectors - 1) * WIDTH + lanes; ++i) total[i] += held[i];
}

// Mean and biased variance of every channel. The squares of a piece are taken about the mean of its first rows, and
// pieces are joined as Chan, Golub, LeVeque (1979) do: nothing large cancels.
void statistics(const float* x, const Rows& rows, float* mean, float* var) {
  const int64_t channels = rows.channels;
  std::vector<double> means(rows.stacks * channels), squares(rows.stacks * channels);
  rows.for_each([&](const Rows::Piece& piece) {
    const float* start = x + piece.first_row * channels;
    double *mean_out = &means[piece.stack * channels], *square_out = &squares[piece.stack * channels];
    for_vectors(piece, [&](int64_t c, auto vectors, auto lanes) __attribute__((always_inline)) {
      const int64_t first = std::min(piece.rows, FIRST_ROWS);
      Several<vectors> about = sums_about<vectors>(all_zero<vectors>(), start + c, first, channels, lanes).first;
      for (Vec& sum : about) sum = sum / Vec(static_cast<float>(first));
      double sums[vectors * WIDTH] = {};
      for (int64_t row = 0; row < piece.rows; row += STRETCH) {
        const int64_t stretch = std::min(STRETCH, piece.rows - row);
        const auto [sum, square] = sums_about<vectors>(about, start + row * channels + c, stretch, channels, lanes);
        add_to<vectors>(sums, sum, lanes);
        add_to<vectors>(square_out + c, square, lanes);
      }
      add_to<vectors>(mean_out + c, about, lanes);
      for (int64_t i = 0; i < (vectors - 1) * WIDTH + lanes; ++i) {
        const double off = sums[i] / piece.rows;
        mean_out[c + i] += off;
        square_out[c + i] = std::max(0.0, square_out[c + i] - off * off * piece.rows);
      }
    });
  });
  for (int64_t c = 0; c < channels; ++c) {
    double count = 0, total_mean = 0, total_square = 0;
    for (int64_t stack = 0; stack < rows.stacks; ++stack) {
      const double n = rows.rows_of(stack);
      const double apart = means[stack * channels + c] - total_mean;
      total_mean += apart * n / (count + n);
      total_square += squares[stack * channels + c] + apart * apart * count * n / (count + n);
      count += n;
    }
    mean[c] = static_cast<float>(total_mean);
    var[c] = static_cast<float>(total_square / count);
  }
}

// y = x * scale + shift
struct Affine {
  std::vector<float> scale, shift;

  Affine(const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var, double eps)
      : scale(per_channel(weight.numel())), shift(per_channel(weight.numel())) {
    const float *weights = weight.const_data_ptr<float>(), *biases = bias.const_data_ptr<float>();
    const float *means = mean.const_data_ptr<float>(), *vars = var.const_data_ptr<float>();
    for (int64_t c = 0; c < weight.numel(); ++c) {
      scale[c] = weights[c] * static_cast<float>(1 / std::sqrt(vars[c] + eps));
      shift[c] = biases[c] - means[c] * scale[c];
    }
  }
};

void check(const Tensor& x, const Optional& shortcut, const Tensor& weight, const Tensor& bias, const Tensor& alpha) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast),
              "the kernel takes float32 (N, C, H, W) in channels_last memory");
  TORCH_CHECK(alpha.scalar_type() == at::kFloat && alpha.numel() == 1, "the kernel takes one float32 alpha");
  TORCH_CHECK(!shortcut || (shortcut->sizes() == x.sizes() && shortcut->scalar_type() == at::kFloat),
              "the shortcut is no float32 of x's shape");
  TORCH_CHECK(weight.numel() == x.size(1) && bias.numel() == x.size(1), "one weight and one bias per channel");
  TORCH_CHECK(x.numel() > 0, "BatchNorm has no statistics of nothing");
}

// v_hat, with a shortcut r, and the sums of each piece: (pieces, 2, levels).
void quantize(const float* x, const float* shortcut, float* r_out, float* v_hat, const Rows& rows,
              const Affine& affine, float low, float high, const Site& site, const Grid& grid, bool bins,
              std::vector<double>& sums) {
  const int64_t channels = rows.channels, levels = grid.levels();
  rows.for_each([&](const Rows::Piece& piece) {
    double* part = bins ? &sums[piece.number * 2 * levels] : nullptr;
    const int64_t size = piece.rows * (piece.end_channel - piece.first_channel);
    with_sums(grid, bins, size, part, bins ? part + levels : nullptr, [&, site_ = site](const auto& make_sums) {
      // Copies: a store could change what lies behind a reference, for all the compiler knows.
      const Site site = site_;
      const float *x_in = x, *shortcut_in = shortcut;
      float *r_to = r_out, *to = v_hat;
      auto per_bin = make_sums();
      const Vec floor(low), ceiling(high);
      for_vectors(piece, [&](int64_t c, auto vectors, auto lanes) __attribute__((always_inline)) {
        const float *scale = &affine.scale[c], *shift = &affine.shift[c];
        for (int64_t row = piece.first_row; row < piece.first_row + piece.rows; ++row) {
          for (int64_t k = 0; k < vectors; ++k) {
            const int64_t at = row * channels + c + k * WIDTH;
            Vec y = at::vec::fmadd(Vec::loadu(x_in + at, lanes), Vec::loadu(scale + k * WIDTH),
                                   Vec::loadu(shift + k * WIDTH));
            if (shortcut_in) y = y + Vec::loadu(shortcut_in + at, lanes);
            const Vec r = at::vec::clamp(y, floor, ceiling);
            if (shortcut_in) r.store(r_to + at, lanes);
            const Vec u = site.divided(r);
            const Vec code = site.code<false>(u);
            (code * site.alpha).store(to + at, lanes);
            if constexpr (decltype(per_bin)::WANTED) {
              const Vec distance = site.distance(r, u, code);
              per_bin.add(site.bin_code(u, code), distance * distance, lanes);
            }
          }
        }
      });
      per_bin.finish();
    });
  });
}

std::tuple<Tensor, Tensor> eval_cpu(const Tensor& x, const Optional& shortcut_, const Tensor& weight,
                                    const Tensor& bias, const Tensor& mean, const Tensor& var, double eps, double low,
                                    double high, const Tensor& alpha, int64_t qn, int64_t qp) {
  check(x, shortcut_, weight, bias, alpha);
  const Tensor shortcut = shortcut_ ? as_rows(*shortcut_) : Tensor();
  const Grid grid(qn, qp, false);
  const Site site(*alpha.const_data_ptr<float>(), grid, {false, false, false});
  Tensor v_hat = empty_as(x), r = shortcut_ ? empty_as(x) : nothing(at::kFloat);
  std::vector<double> none;
  quantize(x.const_data_ptr<float>(), shortcut_ ? shortcut.const_data_ptr<float>() : nullptr,
           r.mutable_data_ptr<float>(), v_hat.mutable_data_ptr<float>(), Rows(x),
           Affine(weight.contiguous(), bias.contiguous(), mean.contiguous(), var.contiguous(), eps),
           static_cast<float>(low), static_cast<float>(high), site, grid, false, none);
  return {v_hat, r};
}

std::tuple<Tensor, Tensor> eval_meta(const Tensor& x, const Optional& shortcut, const Tensor&, const Tensor&,
                                     const Tensor&, const Tensor&, double, double, double, const Tensor&, int64_t,
                                     int64_t) {
  return {at::empty_like(x), shortcut ? at::empty_like(x) : at::empty({0}, x.options())};
}

Forward forward_cpu(const Tensor& x, const Optional& shortcut_, const Tensor& weight, const Tensor& bias, double eps,
                    double low, double high, const Tensor& alpha, int64_t qn, int64_t qp, bool bins, bool in_steps,
                    bool drop_clipped) {
  check(x, shortcut_, weight, bias, alpha);
  const Rows rows(x);
  const Grid grid(qn, qp, false);
  const Site site(*alpha.const_data_ptr<float>(), grid, {bins, in_steps, drop_clipped});
  const Tensor shortcut = shortcut_ ? as_rows(*shortcut_) : Tensor();
  Tensor v_hat = empty_as(x), r = shortcut_ ? empty_as(x) : nothing(at::kFloat);
  Tensor mean = empty({rows.channels}, at::kFloat), var = empty({rows.channels}, at::kFloat);
  statistics(x.const_data_ptr<float>(), rows, mean.mutable_data_ptr<float>(), var.mutable_data_ptr<float>());
  std::vector<double> sums(bins ? rows.pieces * 2 * grid.levels() : 0);
  quantize(x.const_data_ptr<float>(), shortcut_ ? shortcut.const_data_ptr<float>() : nullptr,
           r.mutable_data_ptr<float>(), v_hat.mutable_data_ptr<float>(), rows,
           Affine(weight.contiguous(), bias.contiguous(), mean, var, eps), static_cast<float>(low),
           static_cast<float>(high), site, grid, bins, sums);
  auto [count, mse] = table_of(sums, rows.pieces, bins ? grid.levels() : 0);
  return {v_hat, r, mean, var, count, mse};
}

Forward forward_meta(const Tensor& x, const Optional& shortcut, const Tensor& weight, const Tensor&, double, double,
                     double, const Tensor&, int64_t qn, int64_t qp, bool bins, bool, bool) {
  const int64_t levels = bins ? Grid(qn, qp, false).levels() : 0;
  return {at::empty_like(x), shortcut ? at::empty_like(x) : at::empty({0}, x.options()),
          at::empty({x.size(1)}, weight.options()), at::empty({x.size(1)}, weight.options()),
          at::empty({levels}, x.options().dtype(at::kLong)), at::empty({levels}, x.options())};
}

Backward backward_cpu(const Optional& grad_, const Optional& grad_r_, const Optional& grad_mse, const Tensor& x_,
                      const Optional& r_, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                      const Tensor& var, double eps, double low, double high, const Tensor& alpha,
                      const Tensor& count, int64_t qn, int64_t qp, double scale, bool in_steps,
                      bool drop_clipped, bool one_alpha) {
  const Tensor x = as_rows(x_), r = r_ ? as_rows(*r_) : Tensor();  // a hook may have laid out anew what was saved
  const Rows rows(x);
  const int64_t channels = rows.channels;
  const Grid grid(qn, qp, false);
  const bool bins = grad_mse.has_value();
  const Site site(*alpha.const_data_ptr<float>(), grid, {bins, in_steps, drop_clipped});
  const Pulls pulls(grid, grad_mse, count);
  const Tensor grad = grad_ ? as_rows(*grad_) : at::zeros_like(x);
  const Tensor grad_r = grad_r_ ? as_rows(*grad_r_) : Tensor();
  const Affine affine(weight.contiguous(), bias.contiguous(), mean, var, eps);
  const float *in = x.const_data_ptr<float>(), *g = grad.const_data_ptr<float>();
  const float* r_in = r_ ? r.const_data_ptr<float>() : nullptr;
  const float* g_r = grad_r_ ? grad_r.const_data_ptr<float>() : nullptr;
  const float* means = mean.const_data_ptr<float>();
  auto centre = per_channel(channels);
  std::copy(means, means + channels, centre.begin());
  Tensor grad_x = empty_as(x), grad_shortcut = r_ ? empty_as(x) : nothing(at::kFloat);
  float* out = grad_x.mutable_data_ptr<float>();
  float* dy_out = r_ ? grad_shortcut.mutable_data_ptr<float>() : out;

  // First pass: dy, and the sums: dbias and dweight * std per channel, and what goes to the two alphas.
  std::vector<double> sums(rows.stacks * 2 * channels), to_alphas(rows.pieces * 2);
  rows.for_each([&](const Rows::Piece& piece) {
    const float *x_in = in, *grad_in = g, *r_read = r_in, *grad_r_in = g_r;  // copies, as in quantize
    float* to = dy_out;
    const Vec floor(static_cast<float>(low)), ceiling(static_cast<float>(high));
    double* part = &sums[piece.stack * 2 * channels];
    Gradient<false> gradient{site, pulls, bins};
    int64_t since_flush = 0;  // vectors; a stretch has up to four for each row
    for_vectors(piece, [&](int64_t c, auto vectors, auto lanes) __attribute__((always_inline)) {
      const float *scale = &affine.scale[c], *shift = &affine.shift[c], *middle = &centre[c];
      for (int64_t from = piece.first_row; from < piece.first_row + piece.rows; from += STRETCH) {
        const int64_t end = std::min(from + STRETCH, piece.first_row + piece.rows);
        auto sum = all_zero<vectors>(), product = all_zero<vectors>();
        for (int64_t row = from; row < end; ++row) {
          for (int64_t k = 0; k < vectors; ++k) {
            const int64_t at = row * channels + c + k * WIDTH;
            const Vec v = Vec::loadu(x_in + at, lanes);
            // A clamped r lies on its bound, so that r tells as well as y what was clamped.
            const Vec y = r_read ? Vec::loadu(r_read + at, lanes)
                                 : at::vec::fmadd(v, Vec::loadu(scale + k * WIDTH), Vec::loadu(shift + k * WIDTH));
            Vec dr = gradient(at::vec::clamp(y, floor, ceiling), Vec::loadu(grad_in + at, lanes), lanes);
            if (grad_r_in) dr = dr + Vec::loadu(grad_r_in + at, lanes);
            const Vec dy = if_between(floor, y, ceiling, dr);
            dy.store(to + at, lanes);
            sum[k] = sum[k] + dy;
            product[k] = at::vec::fmadd(dy, v - Vec::loadu(middle + k * WIDTH), product[k]);
          }
        }
        add_to<vectors>(part + c, sum, lanes);
        add_to<vectors>(part + channels + c, product, lanes);
        if ((since_flush += vectors * (end - from)) >= BLOCK / WIDTH) {
          gradient.flush(&to_alphas[2 * piece.number], &to_alphas[2 * piece.number + 1]);
          since_flush = 0;
        }
      }
    });
    gradient.flush(&to_alphas[2 * piece.number], &to_alphas[2 * piece.number + 1]);
  });
  std::vector<double> total(2 * channels);
  for (int64_t stack = 0; stack < rows.stacks; ++stack)
    for (int64_t i = 0; i < 2 * channels; ++i) total[i] += sums[stack * 2 * channels + i];
  double to_alpha = 0, to_alpha_br = 0;
  for (int64_t piece = 0; piece < rows.pieces; ++piece) {
    to_alpha += to_alphas[2 * piece];
    to_alpha_br += to_alphas[2 * piece + 1];
  }

  // Second pass: dx = scale * dy + per_x * x + constant, over dy.
  Tensor grad_weight = empty_as(mean), grad_bias = empty_as(mean);
  auto per_x = per_channel(channels), constant = per_channel(channels);
  const float* vars = var.const_data_ptr<float>();
  float *to_weight = grad_weight.mutable_data_ptr<float>(), *to_bias = grad_bias.mutable_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    const double inverse = 1 / std::sqrt(vars[c] + eps);
    to_bias[c] = static_cast<float>(total[c]);
    to_weight[c] = static_cast<float>(total[channels + c] * inverse);
    const double slope = -affine.scale[c] * inverse * inverse * total[channels + c] / rows.count;
    per_x[c] = static_cast<float>(slope);
    constant[c] = static_cast<float>(-affine.scale[c] * total[c] / rows.count - slope * means[c]);
  }
  rows.for_each([&](const Rows::Piece& piece) {
    const float *x_in = in, *dy_in = dy_out;  // copies again
    float* dx_out = out;
    for_vectors(piece, [&](int64_t c, auto vectors, auto lanes) __attribute__((always_inline)) {
      const float *scale = &affine.scale[c], *slope = &per_x[c], *shift = &constant[c];
      for (int64_t row = piece.first_row; row < piece.first_row + piece.rows; ++row) {
        for (int64_t k = 0; k < vectors; ++k) {
          const int64_t at = row * channels + c + k * WIDTH;
          const Vec rest = at::vec::fmadd(Vec::loadu(x_in + at, lanes), Vec::loadu(slope + k * WIDTH),
                                          Vec::loadu(shift + k * WIDTH));
          at::vec::fmadd(Vec::loadu(dy_in + at, lanes), Vec::loadu(scale + k * WIDTH), rest).store(dx_out + at, lanes);
        }
      }
    });
  });
  Tensor grad_alpha = empty_as(alpha), grad_bins = one_alpha ? nothing(at::kFloat) : empty_as(alpha);
  *grad_alpha.mutable_data_ptr<float>() = static_cast<float>(scale * to_alpha + (one_alpha ? to_alpha_br : 0));
  if (!one_alpha) *grad_bins.mutable_data_ptr<float>() = static_cast<float>(to_alpha_br);
  return {grad_x, grad_shortcut, grad_weight, grad_bias, grad_alpha, grad_bins};
}

Backward backward_meta(const Optional&, const Optional&, const Optional&, const Tensor& x, const Optional& r,
                       const Tensor& weight, const Tensor& bias,
                       const Tensor&, const Tensor&, double, double, double, const Tensor& alpha, const Tensor&,
                       int64_t, int64_t, double, bool, bool, bool one_alpha) {
  return {at::empty_like(x), r ? at::empty_like(x) : at::empty({0}, x.options()), at::empty_like(weight),
          at::empty_like(bias), at::empty_like(alpha),
          one_alpha ? at::empty({0}, alpha.options()) : at::empty_like(alpha)};
}

const auto& forward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("brqat::norm_lsq_forward", "").typed<decltype(forward_cpu)>();
  return op;
}

const auto& backward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("brqat::norm_lsq_backward", "").typed<decltype(backward_cpu)>();
  return op;
}

// Lets BatchNorm's running statistics, (C,) float32, follow those of a batch of so many values per channel, as
// BatchNorm does: the variance that it keeps is the unbiased one.
void update_statistics(Tensor running_mean, Tensor running_var, const Tensor& mean, const Tensor& var, double momentum,
                       int64_t values) {
  for (const Tensor& t : {running_mean, running_var, mean, var})
    TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() == mean.numel(),
                "statistics are float32 and of one size");
  const float share = static_cast<float>(momentum), unbiased = static_cast<float>(values) / (values - 1);
  const float *new_mean = mean.const_data_ptr<float>(), *new_var = var.const_data_ptr<float>();
  float *old_mean = running_mean.mutable_data_ptr<float>(), *old_var = running_var.mutable_data_ptr<float>();
  for (int64_t c = 0; c < mean.numel(); ++c) {
    old_mean[c] = share * new_mean[c] + (1 - share) * old_mean[c];
    old_var[c] = share * new_var[c] * unbiased + (1 - share) * old_var[c];
  }
  running_mean.unsafeGetTensorImpl()->bump_version();
  running_var.unsafeGetTensorImpl()->bump_version();
}

void update_statistics_meta(Tensor, Tensor, const Tensor&, const Tensor&, double, int64_t) {}

struct NormLsqBackward : torch::autograd::Node {
  SavedVariable x, r, weight, bias, mean, var, alpha, count;
  double eps, low, high, scale;
  int64_t qn, qp;
  bool joined, in_steps, drop_clipped, one_alpha;

  std::string name() const override { return "NormLsqBackward"; }

  void release_variables() override {
    const std::lock_guard lock(mutex_);
    for (SavedVariable* saved : {&x, &r, &weight, &bias, &mean, &var, &alpha, &count}) saved->reset_data();
  }

  // grads: of v_hat, and where there are such results of r and of mse.
  variable_list apply(variable_list&& grads) override {
    refuse_second_derivative();
    const std::lock_guard lock(mutex_);
    const Tensor of_r = joined ? grads[1] : Tensor();
    const Tensor of_mse = grads.size() > 1 + joined ? grads[1 + joined] : Tensor();
    if (!grads[0].defined() && !of_r.defined() && !of_mse.defined()) return variable_list(6);
    // Before the guard: a hook that unpacks may run a forward of its own, which wants autograd.
    const Tensor x_ = x.unpack(), weight_ = weight.unpack(), bias_ = bias.unpack(), mean_ = mean.unpack();
    const Tensor var_ = var.unpack(), alpha_ = alpha.unpack(), count_ = count.unpack();
    const Optional r_ = joined ? Optional(r.unpack()) : std::nullopt;
    at::AutoDispatchBelowADInplaceOrView below;
    auto [to_x, to_shortcut, to_weight, to_bias, to_alpha, to_bins] = backward_op().call(
        if_defined(grads[0]), if_defined(of_r), if_defined(of_mse), x_, r_, weight_, bias_, mean_, var_, eps, low, high,
        alpha_, count_, qn, qp, scale, in_steps, drop_clipped, one_alpha);
    if (!joined) to_shortcut = Tensor();
    if (one_alpha || !of_mse.defined()) to_bins = Tensor();
    if (!grads[0].defined() && !(one_alpha && of_mse.defined())) to_alpha = Tensor();
    return {to_x, to_shortcut, to_weight, to_bias, to_alpha, to_bins};
  }
};

Forward with_grad(const Tensor& x, const Optional& shortcut, const Tensor& weight, const Tensor& bias, double eps,
                  double low, double high, const Tensor& alpha, const Tensor& alpha_br, int64_t qn, int64_t qp,
                  double scale, bool bins, bool in_steps, bool drop_clipped) {
  refuse_forward_mode(x);
  auto results = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return forward_op().call(x, shortcut, weight, bias, eps, low, high, alpha, qn, qp, bins, in_steps, drop_clipped);
  }();
  const Tensor added = shortcut.value_or(Tensor());
  if (!compute_requires_grad(x, added, weight, bias, alpha, alpha_br)) return results;
  const auto& [v_hat, r, mean, var, count, mse] = results;
  const bool one_alpha = alpha_br.is_same(alpha);
  const auto node = node_for<NormLsqBackward>(x, added, weight, bias, alpha, one_alpha ? Tensor() : alpha_br);
  node->x = SavedVariable(x, false);
  if (shortcut) node->r = SavedVariable(r.detach(), false);  // without its node, which would hold itself
  node->weight = SavedVariable(weight, false);
  node->bias = SavedVariable(bias, false);
  node->mean = SavedVariable(mean, false);
  node->var = SavedVariable(var, false);
  node->alpha = SavedVariable(alpha, false);
  node->count = SavedVariable(count, false);
  node->eps = eps;
  node->low = low;
  node->high = high;
  node->scale = scale;
  node->qn = qn;
  node->qp = qp;
  node->joined = shortcut.has_value();
  node->in_steps = in_steps;
  node->drop_clipped = drop_clipped;
  node->one_alpha = one_alpha;
  set_history(v_hat, node);
  if (shortcut) set_history(r, node);
  if (bins) set_history(mse, node);
  return results;
}

Forward without_grad(const Tensor& x, const Optional& shortcut, const Tensor& weight, const Tensor& bias, double eps,
                     double low, double high, const Tensor& alpha, const Tensor&, int64_t qn, int64_t qp, double,
                     bool bins, bool in_steps, bool drop_clipped) {
  return forward_op().call(x, shortcut, weight, bias, eps, low, high, alpha, qn, qp, bins, in_steps, drop_clipped);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(brqat, m) {
  m.def(
      "norm_lsq(Tensor x, Tensor? shortcut, Tensor weight, Tensor bias, float eps, float low, float high, Tensor "
      "alpha, Tensor alpha_br, int qn, int qp, float scale, bool bins, bool in_steps, bool drop_clipped) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "norm_lsq_forward(Tensor x, Tensor? shortcut, Tensor weight, Tensor bias, float eps, float low, float high, "
      "Tensor alpha, int qn, int qp, bool bins, bool in_steps, bool drop_clipped) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def(
      "norm_lsq_backward(Tensor? grad, Tensor? grad_r, Tensor? grad_mse, Tensor x, Tensor? r, Tensor weight, Tensor "
      "bias, Tensor mean, Tensor var, float eps, float low, float high, Tensor alpha, Tensor count, int qn, int qp, "
      "float scale, bool in_steps, bool drop_clipped, bool one_alpha) -> (Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "norm_lsq_eval(Tensor x, Tensor? shortcut, Tensor weight, Tensor bias, Tensor mean, Tensor var, float eps, float "
      "low, float high, Tensor alpha, int qn, int qp) -> (Tensor, Tensor)");
  m.def(
      "update_statistics(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum, "
      "int values) -> ()");
}

TORCH_LIBRARY_IMPL(brqat, CPU, m) {
  m.impl("norm_lsq", without_grad);
  m.impl("norm_lsq_forward", forward_cpu);
  m.impl("norm_lsq_backward", backward_cpu);
  m.impl("norm_lsq_eval", eval_cpu);
  m.impl("update_statistics", update_statistics);
}

TORCH_LIBRARY_IMPL(brqat, Meta, m) {
  m.impl("norm_lsq", without_grad);
  m.impl("norm_lsq_forward", forward_meta);
  m.impl("norm_lsq_backward", backward_meta);
  m.impl("norm_lsq_eval", eval_meta);
  m.impl("update_statistics", update_statistics_meta);
}

TORCH_LIBRARY_IMPL(brqat, Autograd, m) { m.impl("norm_lsq", with_grad); }

}  // namespace brqat
