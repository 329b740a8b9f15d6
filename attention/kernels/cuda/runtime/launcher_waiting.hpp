// A fence: a scalar that becomes available once the GPU has finished the work queued before it, except for the last few
// such scalars, and MLX has released the inputs of that work. Operations that depend on it are not queued earlier. MLX's
// alternative is an array that passes to the CPU stream and back, by two events in managed memory that are polled at growing
// intervals.
#pragma once
#include <chrono>
#include <deque>
#include <future>
#include <map>
#include <memory>

#include "launcher.hpp"

namespace fatui {

class Passed : public mx::Primitive {
 public:
  Passed(mx::Stream stream, size_t behind) : mx::Primitive(stream), behind_(behind) {}

  void eval_cpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("Waiting for a GPU takes one of MLX's GPU streams.");
  }

  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    outputs[0].copy_shared_buffer(inputs[0]);
    auto& encoder = mx::cu::get_command_encoder(stream());
    auto done = std::make_shared<std::promise<void>>();
    auto& under_way = queued(stream().index);
    under_way.push_back(done->get_future());
    encoder.commit();  // arrays are released in the last task of a commit, so this task belongs to the next one
    encoder.add_completed_handler([done] { done->set_value(); });
    encoder.commit();
    for (; under_way.size() > behind_; under_way.pop_front()) wait(under_way.front());
  }

  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override {
    const mx::array& token = inputs[0];
    return {{mx::array(token.shape(), token.dtype(), std::make_shared<Passed>(stream(), behind_), {token})}, axes};
  }

  const char* name() const override { return "FatuiPassed"; }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override { return {inputs[0].shape()}; }

 private:
  // MLX streams are bound to a thread.
  static std::deque<std::future<void>>& queued(int stream) {
    static thread_local std::map<int, std::deque<std::future<void>>> queues;
    return queues[stream];
  }

  // After a failed kernel, CUDA runs no host callbacks.
  static void wait(std::future<void>& done) {
    while (done.wait_for(std::chrono::seconds(1)) != std::future_status::ready) {
      check(driver().synchronize(), "Waiting for the GPU");
    }
  }

  size_t behind_;
};

inline mx::array passed(const mx::array& token, size_t behind) {
  const mx::Stream stream = mx::default_stream(mx::default_device());
  return mx::array(token.shape(), token.dtype(), std::make_shared<Passed>(stream, behind), {token});
}

}  // namespace fatui
