// A number that is there once the GPU has done what was queued before it, but for the last few numbers of its kind, and MLX
// has let go of what that read. Nothing that needs it is queued earlier. MLX's own way is an array that passes to the
// processor and back: two signals through memory that both reach, each asked for at intervals that grow with the wait.
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
    encoder.commit();  // what arrays are let go of is the last task of a commit, so this one is of the next
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
  // A stream of MLX's belongs to a thread.
  static std::deque<std::future<void>>& queued(int stream) {
    static thread_local std::map<int, std::deque<std::future<void>>> queues;
    return queues[stream];
  }

  // After a failed kernel CUDA calls nobody back.
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
