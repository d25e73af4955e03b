// What one element goes through, and how a tensor is cut into pieces: shared by lsq.cpp and norm.cpp.
//
// Vectors are ATen's (at::vec): one source for every instruction set. Sums run in float over a block (behind a
// BatchNorm over some hundred rows) and in double beyond it, and pieces are added up in the order of memory whatever
// thread made them: the number of threads changes no bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty_like.h>
#include <c10/macros/Macros.h>

namespace brqat {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t WIDTH = Vec::size();
constexpr int64_t BLOCK = 1024;   // elements whose intermediate values live in the L1 cache
constexpr int64_t PIECE = 32768;  // elements that one thread takes at a time

static_assert(BLOCK % WIDTH == 0);

constexpr int64_t padded(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

struct Grid {
  int64_t qn, qp, gap;  // gap: distance of two codes

  Grid(int64_t qn, int64_t qp, bool sign) : qn(qn), qp(qp), gap(sign ? 2 : 1) {}
  int64_t levels() const { return (qp - qn) / gap + 1; }
  float level(int64_t bin) const { return static_cast<float>(qn + bin * gap); }
};

// Of stored codes; as Grid.dtype in brqat/grid.py.
inline at::ScalarType code_type(int64_t qn) { return qn < 0 ? at::kChar : at::kByte; }

// What a regularizer asks of a site's bins (brqat.bins.Bins).
struct Bins {
  bool wanted, in_steps, drop_clipped;
};

// Lane by lane: a < b ? yes : no, and its kin; false for NaN. Where the compiler has the vector as a type of its own,
// as GCC and Clang do on x86, the comparison stays in a mask register: half the instructions of at::vec's masks.
#if defined(CPU_CAPABILITY_AVX512)
using Native = __m512;
#elif defined(CPU_CAPABILITY_AVX2)
using Native = __m256;
#endif
#if (defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)) && defined(__GNUC__)
#define BRQAT_CHOICE(name, op)                                                                    \
  C10_ALWAYS_INLINE Vec name(const Vec& a, const Vec& b, const Vec& yes, const Vec& no) {         \
    return Native(a) op Native(b) ? Native(yes) : Native(no);                                     \
  }
#else
#define BRQAT_CHOICE(name, op)                                                            \
  C10_ALWAYS_INLINE Vec name(const Vec& a, const Vec& b, const Vec& yes, const Vec& no) { \
    return Vec::blendv(no, yes, a op b);                                                  \
  }
#endif
BRQAT_CHOICE(if_less, <)
BRQAT_CHOICE(if_at_most, <=)
BRQAT_CHOICE(if_equal, ==)
#undef BRQAT_CHOICE

// sum + (a == b ? term : 0), in one instruction where there are mask registers.
C10_ALWAYS_INLINE Vec add_if_equal(const Vec& sum, const Vec& a, const Vec& b, const Vec& term) {
#if defined(CPU_CAPABILITY_AVX512)
  return Vec(_mm512_mask_add_ps(sum, _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), sum, term));
#else
  return sum + if_equal(a, b, term, Vec(0.0f));
#endif
}

// value between the two bounds, themselves excluded, else 0.
C10_ALWAYS_INLINE Vec if_between(const Vec& low, const Vec& x, const Vec& high, const Vec& value) {
  const Vec zero(0.0f);
  return if_less(low, x, if_less(x, high, value, zero), zero);
}

// One alpha and its grid: what becomes of the values that share it.
struct Site {
  const bool in_steps, drop_clipped;
  const Vec alpha, minus_alpha, inverse, qn, qp, left_out, minus_unit, per_unit;

  Site(float alpha, const Grid& grid, const Bins& bins)
      : in_steps(bins.in_steps),
        drop_clipped(bins.drop_clipped),
        alpha(alpha),
        minus_alpha(-alpha),
        inverse(1.0f / alpha),
        qn(static_cast<float>(grid.qn)),
        qp(static_cast<float>(grid.qp)),
        left_out(static_cast<float>(grid.qp + grid.gap)),
        // The distance of v to its level is v - c * alpha, or v / alpha - c.
        minus_unit(bins.in_steps ? -1.0f : -alpha),
        per_unit(bins.in_steps ? 1.0f / alpha : 1.0f) {}

  // v / alpha, correctly rounded as the division is, in less time (Markstein, 1990): under fma the residual of an
  // approximate quotient is exact. Far beyond the grid the first quotient does, and it has to: the residual of an
  // infinite one is NaN.
  C10_ALWAYS_INLINE Vec divided(const Vec& v) const {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    const Vec first = v * inverse;
    const Vec q = at::vec::fmadd(at::vec::fmadd(first, minus_alpha, v), inverse, first);
    return if_less(first.abs(), Vec(1e30f), at::vec::fmadd(at::vec::fmadd(q, minus_alpha, v), inverse, q), first);
#else
    return v / alpha;
#endif
  }

  // NaN stays NaN.
  template <bool SIGN>
  C10_ALWAYS_INLINE Vec code(const Vec& u) const {
    if (SIGN) return if_less(u, Vec(0.0f), Vec(-1.0f), if_at_most(Vec(0.0f), u, Vec(1.0f), u));
    return at::vec::clamp(u, qn, qp).round();
  }

  // NaN has no code: it goes into bin 0, where it reaches the mean.
  C10_ALWAYS_INLINE Vec known(const Vec& code) const { return if_at_most(qn, code, code, qn); }

  // The code of the bin that an element counts in.
  C10_ALWAYS_INLINE Vec bin_code(const Vec& u, const Vec& code) const {
    if (!drop_clipped) return known(code);
    return if_less(u, qn, left_out, if_less(qp, u, left_out, known(code)));
  }

  C10_ALWAYS_INLINE Vec distance(const Vec& v, const Vec& u, const Vec& code) const {
    if (in_steps) return at::vec::fmadd(code, minus_unit, u);  // not ?:, which would choose between addresses
    return at::vec::fmadd(code, minus_unit, v);
  }
};

// Lane after lane.
C10_ALWAYS_INLINE double sum_of(const Vec& v) {
  float lanes[WIDTH];
  v.store(lanes);
  double total = 0;
  for (int64_t i = 0; i < WIDTH; ++i) total += lanes[i];
  return total;
}

// Count and sum of squared distances per bin of a piece. add takes the code of the bin (left_out for what does not
// count) and the square of the first lanes.
struct NoSums {
  static constexpr bool WANTED = false;
  C10_ALWAYS_INLINE void add(const Vec&, const Vec&, int64_t) {}
  void finish() {}
};

// A block is held back, then goes through once for all of a few levels, or once per level, or into a table.
class BinSums {
 public:
  static constexpr bool WANTED = true;

  // size: of the piece; count, square: (levels) each, to be added to.
  BinSums(const Grid& grid, int64_t size, double* count, double* square)
      : grid_(grid), levels_(grid.levels()), count_(count), square_(square) {
    if (levels_ <= ONE_BY_ONE) return;
    replicas_ = size < REPLICAS * levels_ ? 1 : REPLICAS;
    table_.assign(2 * replicas_ * (levels_ + 1), 0.0f);  // one more bin: what is left out
  }

  C10_ALWAYS_INLINE void add(const Vec& code, const Vec& square, int64_t lanes) {
    code.store(code_ + held_);
    square.store(squared_ + held_);
    if ((held_ += lanes) > BLOCK - WIDTH) pass_on();
  }

  void finish() {
    if (held_) pass_on();
    if (in_table_) flush();
  }

 private:
  // Count and sum side by side: one load, one addition and one store for both.
  using Pair = float __attribute__((vector_size(8)));
  static constexpr int64_t AT_ONCE = 4, ONE_BY_ONE = 8;  // levels
  static constexpr int64_t REPLICAS = std::min<int64_t>(8, WIDTH);  // neighbours that share a bin need not wait then
  static constexpr int64_t FLUSH = 8192;    // elements

  void pass_on() {
    const int64_t n = padded(held_);
    std::fill(code_ + held_, code_ + n, grid_.level(levels_));
    if (levels_ <= AT_ONCE) at_once(n);
    else if (levels_ <= ONE_BY_ONE) one_by_one(n);
    else into_table(n);
    held_ = 0;
  }

  void at_once(int64_t n) {
    // NaN equals nothing.
    const auto level = [&](int64_t bin) {
      return Vec(bin < levels_ ? grid_.level(bin) : std::numeric_limits<float>::quiet_NaN());
    };
    const Vec one(1.0f), zero(0.0f), level_0 = level(0), level_1 = level(1), level_2 = level(2), level_3 = level(3);
    // No arrays: these stay in registers.
    Vec count_0 = zero, count_1 = zero, count_2 = zero, count_3 = zero;
    Vec square_0 = zero, square_1 = zero, square_2 = zero, square_3 = zero;
    for (int64_t i = 0; i < n; i += WIDTH) {
      const Vec code = Vec::loadu(code_ + i), square = Vec::loadu(squared_ + i);
      count_0 = add_if_equal(count_0, code, level_0, one);
      square_0 = add_if_equal(square_0, code, level_0, square);
      count_1 = add_if_equal(count_1, code, level_1, one);
      square_1 = add_if_equal(square_1, code, level_1, square);
      count_2 = add_if_equal(count_2, code, level_2, one);
      square_2 = add_if_equal(square_2, code, level_2, square);
      count_3 = add_if_equal(count_3, code, level_3, one);
      square_3 = add_if_equal(square_3, code, level_3, square);
    }
    const Vec counts[] = {count_0, count_1, count_2, count_3}, squares[] = {square_0, square_1, square_2, square_3};
    for (int64_t bin = 0; bin < levels_; ++bin) {
      count_[bin] += sum_of(counts[bin]);
      square_[bin] += sum_of(squares[bin]);
    }
  }

  void one_by_one(int64_t n) {
    for (int64_t bin = 0; bin < levels_; ++bin) {
      const Vec level(grid_.level(bin)), one(1.0f), zero(0.0f);
      // Two sums of each, since an addition waits for the one before it.
      Vec counts = zero, squares = zero, more_counts = zero, more_squares = zero;
      int64_t i = 0;
      for (; i + WIDTH < n; i += 2 * WIDTH) {
        const Vec here = Vec::loadu(code_ + i), there = Vec::loadu(code_ + i + WIDTH);
        counts = add_if_equal(counts, here, level, one);
        squares = add_if_equal(squares, here, level, Vec::loadu(squared_ + i));
        more_counts = add_if_equal(more_counts, there, level, one);
        more_squares = add_if_equal(more_squares, there, level, Vec::loadu(squared_ + i + WIDTH));
      }
      if (i < n) {
        const Vec here = Vec::loadu(code_ + i);
        counts = add_if_equal(counts, here, level, one);
        squares = add_if_equal(squares, here, level, Vec::loadu(squared_ + i));
      }
      count_[bin] += sum_of(counts + more_counts);
      square_[bin] += sum_of(squares + more_squares);
    }
  }

  void into_table(int64_t n) {
    int32_t bin[BLOCK + WIDTH];
    const Vec qn(grid_.level(0));  // these grids have no gaps
    for (int64_t i = 0; i < n; i += WIDTH)
      at::vec::convert_to_int_of_same_size(Vec::loadu(code_ + i) - qn).store(bin + i);
    if (replicas_ == 1) {
      for (int64_t i = 0; i < n; ++i) place(bin[i]) += Pair{1.0f, squared_[i]};
    } else {
      for (int64_t i = 0; i < n; i += REPLICAS)
        for (int64_t r = 0; r < REPLICAS; ++r) place(r * (levels_ + 1) + bin[i + r]) += Pair{1.0f, squared_[i + r]};
    }
    if ((in_table_ += n) < FLUSH) return;
    flush();
    std::fill(table_.begin(), table_.end(), 0.0f);
  }

  C10_ALWAYS_INLINE Pair& place(int64_t i) { return reinterpret_cast<Pair*>(table_.data())[i]; }

  void flush() {
    const int64_t size = 2 * (levels_ + 1);
    float* total = table_.data();
    for (int64_t r = 1; r < replicas_; ++r)
      for (int64_t i = 0; i < size; ++i) total[i] += total[r * size + i];
    for (int64_t bin = 0; bin < levels_; ++bin) {
      count_[bin] += total[2 * bin];
      square_[bin] += total[2 * bin + 1];
    }
    in_table_ = 0;
  }

  static_assert(WIDTH % REPLICAS == 0);

  const Grid grid_;
  const int64_t levels_;
  double *count_, *square_;
  int64_t replicas_ = 0, held_ = 0, in_table_ = 0;
  std::vector<float> table_;
  float code_[BLOCK + WIDTH], squared_[BLOCK + WIDTH];
};

// Calls function(make) where make() gives the sums that the grid needs; size, count and square as the classes take
// them. Made where they are used: what a reference leads to would not stay in registers.
template <typename Function>
void with_sums(const Grid& grid, bool wanted, int64_t size, double* count, double* square, const Function& function) {
  if (!wanted) function([] { return NoSums(); });
  else function([=] { return BinSums(grid, size, count, square); });
}

// at::empty and at::empty_like, without their way through the dispatcher.
inline Tensor empty(at::IntArrayRef sizes, at::ScalarType type) { return Tensor(at::detail::empty_cpu(sizes, type)); }

inline Tensor empty_as(const Tensor& like, at::ScalarType type) {
  return Tensor(at::detail::empty_strided_cpu(like.sizes(), like.strides(), type));
}

inline Tensor empty_as(const Tensor& like) { return empty_as(like, like.scalar_type()); }

// In the place of a result that was not asked for: an operator must return a tensor, and each its own.
inline Tensor nothing(at::ScalarType type) { return empty({0}, type); }

// Count and mean square of each bin, from the sums of all pieces, (pieces, 2, levels), in their order.
inline std::pair<Tensor, Tensor> table_of(const std::vector<double>& sums, int64_t pieces, int64_t levels) {
  if (levels == 0) return {nothing(at::kLong), nothing(at::kFloat)};
  Tensor count = empty({levels}, at::kLong), mse = empty({levels}, at::kFloat);
  std::vector<double> total(2 * levels);
  for (int64_t piece = 0; piece < pieces; ++piece)
    for (int64_t i = 0; i < 2 * levels; ++i) total[i] += sums[piece * 2 * levels + i];
  int64_t* counts = count.mutable_data_ptr<int64_t>();
  float* means = mse.mutable_data_ptr<float>();
  for (int64_t bin = 0; bin < levels; ++bin) {
    counts[bin] = static_cast<int64_t>(total[bin]);
    means[bin] = static_cast<float>(total[levels + bin] / std::max(total[bin], 1.0));
  }
  return {count, mse};
}

// The pull of each bin on its elements, 2 / N_i * the gradient of mse_i, looked up by code.
class Pulls {
 public:
  // grad_mse, count: (levels) each; without grad_mse no pull at all.
  Pulls(const Grid& grid, const std::optional<Tensor>& grad_mse, const Tensor& count)
      : qn_(grid.level(0)),
        in_register_(grid.qp - grid.qn < WIDTH),
        table_(std::max(grid.qp + grid.gap - grid.qn + 1, WIDTH)) {  // by code, up to the one that is left out
    if (grad_mse) {
      const float* grads = grad_mse->const_data_ptr<float>();
      const int64_t stride = grad_mse->stride(0);  // behind a sum one number stands for all
      const int64_t* counts = count.const_data_ptr<int64_t>();
      for (int64_t bin = 0; bin < grid.levels(); ++bin)
        table_[bin * grid.gap] = 2.0f * grads[bin * stride] / static_cast<float>(std::max<int64_t>(counts[bin], 1));
    }
    first_ = Vec::loadu(table_.data());
  }

  // Anything for what is left out: Gradient drops it.
  C10_ALWAYS_INLINE Vec operator()(const Vec& code) const {
    const auto place = at::vec::convert_to_int_of_same_size(code - qn_);
#if defined(CPU_CAPABILITY_AVX512)
    if (in_register_) return Vec(_mm512_permutexvar_ps(place, first_));
#elif defined(CPU_CAPABILITY_AVX2)
    if (in_register_) return Vec(_mm256_permutevar8x32_ps(first_, place));
#endif
    return at::vec::gather<sizeof(float)>(table_.data(), place);
  }

 private:
  const Vec qn_;
  const bool in_register_;
  std::vector<float> table_;
  Vec first_;
};

// The gradient that leaves one vector of values, from the one that comes from above and from the bins.
template <bool SIGN>
struct Gradient {
  const Site site;
  const Pulls pulls;
  const bool bins;
  Vec alpha{0.0f}, alpha_br{0.0f};  // what the vectors so far send to alpha, before its scale, and to the bins' alpha

  C10_ALWAYS_INLINE Vec operator()(const Vec& v, const Vec& from_above) {
    const Vec u = site.divided(v);
    const Vec c = site.known(site.template code<SIGN>(u));
    Vec grad = SIGN ? from_above : if_between(site.qn, u, site.qp, from_above);
    alpha = at::vec::fmadd(from_above, SIGN ? c : c - if_between(site.qn, u, site.qp, u), alpha);
    if (bins) {
      const Vec bin = site.drop_clipped ? site.bin_code(u, c) : c;
      Vec pull = pulls(bin) * site.distance(v, u, c) * site.per_unit;
      Vec along = c;
      if (site.in_steps) along = u;
      if (site.drop_clipped) {  // not 0 times infinity
        pull = if_equal(bin, site.left_out, Vec(0.0f), pull);
        along = if_equal(bin, site.left_out, Vec(0.0f), along);
      }
      grad = grad + pull;
      alpha_br = at::vec::fmadd(pull, along, alpha_br);
    }
    return grad;
  }

  // The same where only the first lanes hold values.
  C10_ALWAYS_INLINE Vec operator()(const Vec& v, const Vec& from_above, int64_t lanes) {
    if (lanes == WIDTH) return (*this)(v, from_above);
    const Vec alpha_before = alpha, alpha_br_before = alpha_br;
    const Vec grad = (*this)(v, from_above);
    alpha = Vec::set(alpha_before, alpha, lanes);
    alpha_br = Vec::set(alpha_br_before, alpha_br, lanes);
    return grad;
  }

  // Adds the sums up and begins anew.
  void flush(double* to_alpha, double* to_alpha_br) {
    *to_alpha += sum_of(alpha);
    *to_alpha_br -= sum_of(alpha_br);
    alpha = alpha_br = Vec(0.0f);
  }
};

// A stretch of memory with one alpha.
struct Piece {
  int64_t start, size, alpha;
};

inline std::vector<Piece> pieces_of(int64_t numel, int64_t alphas) {
  std::vector<Piece> pieces;
  if (numel == 0) return pieces;
  if (alphas == 1) {
    for (int64_t start = 0; start < numel; start += PIECE) pieces.push_back({start, std::min(PIECE, numel - start), 0});
  } else {
    const int64_t row = numel / alphas;
    for (int64_t channel = 0; channel < alphas; ++channel) pieces.push_back({channel * row, row, channel});
  }
  return pieces;
}

// v as it is where memory can be walked from end to end, with dim 0 outermost if each of its rows has an alpha.
inline Tensor walkable(const Tensor& v, int64_t alphas) {
  const bool rows = alphas == 1 || v.size(0) <= 1 || v.stride(0) * v.size(0) == v.numel();
  return v.is_non_overlapping_and_dense() && rows ? v : v.contiguous();
}

inline Tensor laid_out_as(const Tensor& t, const Tensor& like) {
  return t.strides() == like.strides() ? t : at::empty_like(like, like.options().dtype(t.scalar_type())).copy_(t);
}

inline void check(const Tensor& v, const Tensor& alpha) {
  TORCH_CHECK(v.scalar_type() == at::kFloat || v.scalar_type() == at::kBFloat16, "v is ", v.scalar_type(),
              ": the kernel takes float32 and bfloat16");
  TORCH_CHECK(alpha.scalar_type() == at::kFloat, "alpha is ", alpha.scalar_type(), ", not float32");
  const bool per_row = alpha.dim() == v.dim() && alpha.dim() > 0 && alpha.numel() == v.size(0) &&
                       alpha.size(0) == v.size(0);
  TORCH_CHECK(alpha.numel() == 1 || per_row, "alpha has ", alpha.numel(),
              " entries: the kernel takes one, or one for each row of v");
}

}  // namespace brqat
