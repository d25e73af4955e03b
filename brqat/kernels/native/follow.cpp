// What is followed from step to step over all sites at once: the oscillation of weights (brqat/levels.py says what it
// is) and the floor under the alphas. One call each, since a call per site costs more than the work.

#include <algorithm>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

namespace brqat {
namespace {

using at::Tensor;

constexpr int64_t PIECE = 65536;  // weights that one thread takes at a time
constexpr int64_t BLOCK = 256;

// codes: of each site, int16; the rest flat over all sites: last int16, direction int8, frequency float32, flips int32.
void oscillation(at::TensorList codes, Tensor last, Tensor direction, Tensor frequency, Tensor flips, double momentum) {
  int64_t start = 0;
  const float share = static_cast<float>(momentum);
  for (const Tensor& site : codes) {
    TORCH_CHECK(site.scalar_type() == at::kShort, "codes are int16");
    const Tensor flat = site.contiguous();
    const int64_t size = flat.numel();
    TORCH_CHECK(start + size <= last.numel(), "more codes than were followed so far");
    const int16_t* now = flat.const_data_ptr<int16_t>();
    int16_t* before = last.mutable_data_ptr<int16_t>() + start;
    int8_t* way = direction.mutable_data_ptr<int8_t>() + start;
    float* often = frequency.mutable_data_ptr<float>() + start;
    int32_t* count = flips.mutable_data_ptr<int32_t>() + start;
    at::parallel_for(0, size, PIECE, [&](int64_t begin, int64_t end) {
      for (int64_t from = begin; from < end; from += BLOCK) {
        const int64_t to = std::min(end, from + BLOCK);
        for (int64_t i = from; i < to; ++i) often[i] -= share * often[i];
        // In most blocks no code has changed.
        if (std::equal(now + from, now + to, before + from)) continue;
        for (int64_t i = from; i < to; ++i) {
          if (now[i] == before[i]) continue;
          const int8_t change = now[i] > before[i] ? 1 : -1;
          if (change * way[i] < 0) often[i] += share;
          ++count[i];
          way[i] = change;
          before[i] = now[i];
        }
      }
    });
    start += size;
  }
}

// Lifts every alpha to its floor, and counts where that was needed: clamped is flat over all alphas, int64.
void guard(at::TensorList alphas, at::TensorList floors, Tensor clamped) {
  int64_t* count = clamped.mutable_data_ptr<int64_t>();
  for (size_t site = 0; site < alphas.size(); ++site) {
    TORCH_CHECK(alphas[site].is_contiguous() && floors[site].numel() == alphas[site].numel(), "one floor per alpha");
    float* alpha = alphas[site].mutable_data_ptr<float>();
    const Tensor floor = floors[site].contiguous();
    for (int64_t i = 0; i < alphas[site].numel(); ++i, ++count) {
      const float least = floor.const_data_ptr<float>()[i];
      *count += alpha[i] < least;
      alpha[i] = alpha[i] < least ? least : alpha[i];  // NaN stays NaN
    }
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(brqat, m) {
  m.def(
      "oscillation(Tensor[] codes, Tensor(a!) last, Tensor(b!) direction, Tensor(c!) frequency, Tensor(d!) flips, "
      "float momentum) -> ()");
  m.def("guard(Tensor(a!)[] alphas, Tensor[] floors, Tensor(b!) clamped) -> ()");
}

TORCH_LIBRARY_IMPL(brqat, CPU, m) {
  m.impl("oscillation", oscillation);
  m.impl("guard", guard);
}

}  // namespace brqat
