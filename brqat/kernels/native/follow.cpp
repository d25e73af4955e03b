// What is followed from step to step over all sites at once: the oscillation of weights (brqat/levels.py says what it
// is) and the floor under the alphas. One call each, since a call per site costs more than the work.

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

namespace brqat {
namespace {

using at::Tensor;

constexpr int64_t PIECE = 65536;  // weights that one thread takes at a time
constexpr int64_t BLOCK = 256;

// In the order of memory where that is channels_last, as bins.as_it_lies has it.
Tensor as_it_lies(const Tensor& t) {
  return t.dim() == 4 && t.is_contiguous(at::MemoryFormat::ChannelsLast) ? t : t.contiguous();
}

// codes: of each site, int8; last, direction and frequency flat over all sites, int8, int8 and float32; flips: of each
// site, int64. share: what a change back adds to the frequency.
void oscillation(at::TensorList codes, Tensor last, Tensor direction, Tensor frequency, Tensor flips, double share_) {
  TORCH_CHECK(flips.numel() == static_cast<int64_t>(codes.size()), "one count of flips per site");
  const float share = static_cast<float>(share_);
  int64_t start = 0;
  for (size_t site = 0; site < codes.size(); ++site) {
    TORCH_CHECK(codes[site].scalar_type() == at::kChar, "codes are int8");
    const Tensor flat = as_it_lies(codes[site]);
    const int64_t size = flat.numel(), pieces = (size + PIECE - 1) / PIECE;
    for (const Tensor& followed : {last, direction, frequency})
      TORCH_CHECK(start + size <= followed.numel(), "more codes than were followed so far");
    const int8_t* now = flat.const_data_ptr<int8_t>();
    int8_t* before = last.mutable_data_ptr<int8_t>() + start;
    int8_t* way = direction.mutable_data_ptr<int8_t>() + start;
    float* often = frequency.mutable_data_ptr<float>() + start;
    std::vector<int64_t> changes(pieces);
    at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t stop = std::min(size, (piece + 1) * PIECE);
        for (int64_t from = piece * PIECE; from < stop; from += BLOCK) {
          const int64_t to = std::min(stop, from + BLOCK);
          // In most blocks no code has changed.
          if (std::memcmp(now + from, before + from, to - from) == 0) continue;
          for (int64_t i = from; i < to; ++i) {
            if (now[i] == before[i]) continue;
            const int8_t change = now[i] > before[i] ? 1 : -1;
            if (change * way[i] < 0) often[i] += share;
            ++changes[piece];
            way[i] = change;
            before[i] = now[i];
          }
        }
      }
    });
    flips.mutable_data_ptr<int64_t>()[site] += std::accumulate(changes.begin(), changes.end(), int64_t(0));
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
    alphas[site].unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(brqat, m) {
  m.def(
      "oscillation(Tensor[] codes, Tensor(a!) last, Tensor(b!) direction, Tensor(c!) frequency, Tensor(d!) flips, "
      "float share) -> ()");
  m.def("guard(Tensor(a!)[] alphas, Tensor[] floors, Tensor(b!) clamped) -> ()");
}

TORCH_LIBRARY_IMPL(brqat, CPU, m) {
  m.impl("oscillation", oscillation);
  m.impl("guard", guard);
}

}  // namespace brqat
