// Steps of a stream (attention/streaming) over a full ring, one after the other: what changes from a step to the next is counted
// here, which takes Python several times as long.
#pragma once
#include <array>
#include <optional>
#include <utility>

#include <mlx/transforms.h>

#include "launcher_run.hpp"

namespace fatui {

// Where the tokens are: `first` slots of the first ones, then a ring, of which a query sees `window` tokens.
struct Ring {
  int64_t first, window, ring;
};

class Steps {
 public:
  // Steps after one that is made: `like` are its query, key and value; `fixed` its slots, and radians if there are any; `seen`
  // the number of tokens after it, and `latest` its output. `given` are the further arguments, which a repeated step has too:
  // scale, softcap, whether query and key are rotated, implementation.
  Steps(std::shared_ptr<const Plan> plan, const Arrays& like, Arrays fixed, mx::array latest, Ring ring, int64_t seen,
        std::array<nb::object, 4> given)
      : plan_(std::move(plan)), fixed_(std::move(fixed)), latest_(std::move(latest)), ring_(ring), seen_(seen),
        given_(std::move(given)), rotated_(nb::cast<bool>(given_[2])) {
    for (const mx::array& a : like) shapes_.push_back(a.shape()), types_.push_back(a.dtype());
  }

  // The output of the next step; none if its arguments are not those of a repeated one.
  std::optional<mx::array> next(const mx::array& q, const mx::array& k, const mx::array& v,
                                const std::array<nb::handle, 4>& given) {
    const std::array<const mx::array*, 3> arrays{&q, &k, &v};
    for (size_t i = 0; i < arrays.size(); i++) {
      if (arrays[i]->shape() != shapes_[i] || arrays[i]->dtype() != types_[i]) return std::nullopt;
    }
    for (size_t i = 0; i < given.size(); i++) {
      if (!is_same(given[i], given_[i])) return std::nullopt;
    }
    if (mx::default_device() != mx::Device::gpu) return std::nullopt;
    const auto& [first, window, ring] = ring_;
    const int64_t slot = first + (seen_ - first) % ring, at = rotated_ ? slot : 0;
    Arrays inputs{q, k, v};
    inputs.insert(inputs.end(), fixed_.begin(), fixed_.end());
    inputs.push_back(latest_);
    mx::array out = run(plan_, std::move(inputs), {slot, slot - at, slot + ring - at, first + window - 1 - at, first, slot + 1,
                                                   slot + 1, first + ring, 0, first})[0];
    const bool queued = latest_.status() == mx::array::Status::unscheduled;
    latest_ = out, seen_++;
    if (++calls_ % STARTED_TOGETHER == 0 && queued && !out.is_tracer()) {
      const nb::gil_scoped_release released;
      mx::async_eval({out});
    }
    return out;
  }

 private:
  static constexpr int STARTED_TOGETHER = 8;  // queued steps after which the GPU starts

  static bool is_same(nb::handle a, nb::handle b) {
    if (a.is(b)) return true;
    return PyFloat_CheckExact(a.ptr()) && PyFloat_CheckExact(b.ptr()) && PyFloat_AS_DOUBLE(a.ptr()) == PyFloat_AS_DOUBLE(b.ptr());
  }

  std::shared_ptr<const Plan> plan_;
  Arrays fixed_;
  mx::array latest_;
  Ring ring_;
  int64_t seen_;
  std::array<nb::object, 4> given_;
  bool rotated_;
  std::vector<mx::Shape> shapes_;
  std::vector<mx::Dtype> types_;
  int calls_ = 0;
};

}  // namespace fatui
