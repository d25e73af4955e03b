// A training batch in one pass: gather, zero-padded crop, mirror, normalise. The plain torch that defines it is
// brqat/dataset/pixels.py's `plain`.
//
//     out[b, c, y, x] = table[c][pixel]     pixel = images[order[b], c, y + top[b] - pad, x' + left[b] - pad],
//                                           0 outside the image;   x' = W - 1 - x where flip[b], else x
//
// A pixel has 256 values, so normalising is a look-up of what torch itself computed for each: equal to the last
// bit, whatever the compiler makes of a division.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kValues = 256;

struct Source {  // one image, cropped and mirrored
  const uint8_t* pixels;
  int64_t channel_stride, row_stride, column_stride;
  int64_t height, width;
  int64_t down, right;  // the window's corner, relative to the image's
  bool flip;
};

// Writes (height, width, channels). kChannels is a constant of the compiler for the common counts, 0 for others.
template <int64_t kChannels>
void write(const Source& s, int64_t count, const float* table, float* out) {
  const int64_t channels = kChannels ? kChannels : count;
  const auto blank = [&](int64_t from, int64_t to, float* row) {
    for (int64_t x = from; x < to; ++x)
      for (int64_t c = 0; c < channels; ++c) row[x * channels + c] = table[c * kValues];
  };
  // x in [first, last) lie inside the image; there, the source's column is start + x * step.
  const int64_t shift = s.flip ? s.right : -s.right;
  const int64_t first = std::clamp<int64_t>(shift, 0, s.width);
  const int64_t last = std::clamp<int64_t>(s.width + shift, first, s.width);
  const int64_t step = s.flip ? -s.column_stride : s.column_stride;
  const int64_t start = (s.flip ? s.width - 1 + s.right : s.right) * s.column_stride;
  for (int64_t y = 0; y < s.height; ++y) {
    float* row = out + y * s.width * channels;
    const int64_t from = y + s.down;
    if (from < 0 || from >= s.height) {
      blank(0, s.width, row);
      continue;
    }
    blank(0, first, row);
    const uint8_t* pixels = s.pixels + from * s.row_stride + start;
    for (int64_t x = first; x < last; ++x)
      for (int64_t c = 0; c < channels; ++c)
        row[x * channels + c] = table[c * kValues + pixels[x * step + c * s.channel_stride]];
    blank(last, s.width, row);
  }
}

// images (N, C, H, W) uint8 of any strides; order, top, left (B,) int64; flip (B,) bool; table (C, 256) float32
// -> (B, C, H, W) float32, channels_last. IndexError for an image or a corner that is not there.
at::Tensor feed(
    const at::Tensor& images,
    const at::Tensor& order,
    const at::Tensor& top,
    const at::Tensor& left,
    const at::Tensor& flip,
    int64_t pad,
    const at::Tensor& table) {
  TORCH_CHECK(images.dim() == 4 && images.scalar_type() == at::kByte, "feed takes images (N, C, H, W) of uint8");
  const int64_t count = images.size(0), channels = images.size(1);
  const int64_t height = images.size(2), width = images.size(3), batch = order.numel();
  TORCH_CHECK(
      table.dim() == 2 && table.size(0) == channels && table.size(1) == kValues && table.is_contiguous() &&
          table.scalar_type() == at::kFloat,
      "feed takes a table (C, 256) of float32, contiguous");
  for (const at::Tensor& draws : {order, top, left, flip})
    TORCH_CHECK(
        draws.dim() == 1 && draws.numel() == batch && draws.is_contiguous(), "feed takes draws (B,), contiguous");
  TORCH_CHECK(pad >= 0, "feed takes no negative pad");
  const int64_t* orders = order.const_data_ptr<int64_t>();
  const int64_t* tops = top.const_data_ptr<int64_t>();
  const int64_t* lefts = left.const_data_ptr<int64_t>();
  const bool* flips = flip.const_data_ptr<bool>();
  for (int64_t b = 0; b < batch; ++b) {
    TORCH_CHECK_INDEX(orders[b] >= 0 && orders[b] < count, "image ", orders[b], " of ", count);
    TORCH_CHECK_INDEX(
        std::min(tops[b], lefts[b]) >= 0 && std::max(tops[b], lefts[b]) <= 2 * pad,
        "corner (", tops[b], ", ", lefts[b], ") with pad ", pad);
  }

  at::Tensor out =
      at::empty({batch, channels, height, width}, table.options().memory_format(at::MemoryFormat::ChannelsLast));
  const uint8_t* pixels = images.const_data_ptr<uint8_t>();
  const float* values = table.const_data_ptr<float>();
  float* written = out.mutable_data_ptr<float>();
  const int64_t size = channels * height * width;
  const auto one = channels == 3 ? write<3> : channels == 1 ? write<1> : write<0>;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, size));  // a thread's start is paid back
  at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Source source{
          pixels + orders[b] * images.stride(0),
          images.stride(1),
          images.stride(2),
          images.stride(3),
          height,
          width,
          tops[b] - pad,
          lefts[b] - pad,
          flips[b]};
      one(source, channels, values, written + b * size);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(brqat, m) {
  m.def("feed(Tensor images, Tensor order, Tensor top, Tensor left, Tensor flip, int pad, Tensor table) -> Tensor");
}

TORCH_LIBRARY_IMPL(brqat, CPU, m) {
  m.impl("feed", &feed);
}
