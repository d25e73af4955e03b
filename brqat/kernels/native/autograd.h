// What the kernels need of autograd: nodes as torch writes them for its own operators. torch::autograd::Function would
// carry every argument through a dictionary, which for a small tensor costs more than the work.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <type_traits>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

namespace brqat {

using torch::autograd::compute_requires_grad;
using torch::autograd::SavedVariable;
using torch::autograd::set_history;
using torch::autograd::variable_list;

// A node whose gradients, in this order, go to the inputs.
template <typename T, typename... Inputs>
auto node_for(const Inputs&... inputs) {
  using Held = decltype(torch::autograd::Edge::function);
  auto node = [] {  // which of the two depends on torch's release
    if constexpr (std::is_same_v<Held, std::shared_ptr<torch::autograd::Node>>) return std::make_shared<T>();
    else return c10::make_intrusive<T>();
  }();
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  return node;
}

inline void refuse_forward_mode(const at::Tensor& v) {
  TORCH_CHECK(!torch::autograd::isFwGradDefined(v),
              "the kernels have no forward-mode derivative: write kernels=torch");
}

inline void refuse_second_derivative() {
  TORCH_CHECK(!at::GradMode::is_enabled(),
              "the kernels have no second derivative: create_graph=True goes with kernels=torch up to LSQ, and no "
              "further");
}

inline std::optional<at::Tensor> if_defined(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

}  // namespace brqat
