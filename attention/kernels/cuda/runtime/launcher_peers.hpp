// Gathering keys or values from the GPUs of one host by copy engines, beside kernels that occupy all multiprocessors.
//
//   rank 0                                              rank 1
//     its rows ──copy──▶ slot i % count ◀────────copy──── pulls them to their places in its output
//     pulls them to their places ──copy──▶ slot i % count ◀──copy── its rows
//
// Arrays are planes (batch and head) of rows. What moves at once is a chunk of planes that fits a slot. Slots are memory of
// this module, which other processes have mapped (CUDA IPC); MLX's own memory cannot be shared. Flags in host memory that all
// ranks share say which chunk a rank has put into its slots (`ready`), and which chunk of it another one has taken (`taken`);
// streams wait for them.
//
// A gather (`PeerGather`) ends before what follows it begins. Attention over keys of other ranks (`PeerAttend`) is launched for
// some heads at a time, as their keys arrive; no kernel waits for copies. Partial results of few rows (`PeerMerge`) are written
// to the other ranks' memory by the kernel that merges them.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "launcher_layout.hpp"
#include "launcher_maps.hpp"
#include "launcher_memory.hpp"
#include "launcher_plan.hpp"

struct CUstream_st;
struct CUevent_st;

namespace fatui {

constexpr unsigned NON_BLOCKING = 1, NO_TIMING = 2, AT_LEAST = 0, UNIFIED_MEMORY = 4;  // CUDA's values

// CUDA_MEMCPY2D: `height` lines of `width` bytes.
struct Copy2D {
  size_t from_x = 0, from_y = 0;
  unsigned from_type = UNIFIED_MEMORY;
  const void* from_host = nullptr;
  uint64_t from;
  void* from_array = nullptr;
  size_t from_pitch;
  size_t to_x = 0, to_y = 0;
  unsigned to_type = UNIFIED_MEMORY;
  void* to_host = nullptr;
  uint64_t to;
  void* to_array = nullptr;
  size_t to_pitch, width, height;
};

struct CopyDriver {
  int (*create_stream)(CUstream_st**, unsigned, int);
  int (*create_event)(CUevent_st**, unsigned);
  int (*record)(CUevent_st*, CUstream_st*);
  int (*wait_event)(CUstream_st*, CUevent_st*, unsigned);
  int (*wait_value)(CUstream_st*, uint64_t, uint32_t, unsigned);
  int (*write_value)(CUstream_st*, uint64_t, uint32_t, unsigned);
  int (*copy)(const Copy2D*, CUstream_st*);
};

inline const CopyDriver& copy_driver() {
  static const CopyDriver made = [] {
    CopyDriver d;
    find(d.create_stream, "cuStreamCreateWithPriority");
    find(d.create_event, "cuEventCreate");
    find(d.record, "cuEventRecord");
    find(d.wait_event, "cuStreamWaitEvent");
    find(d.wait_value, "cuStreamWaitValue32_v2");
    find(d.write_value, "cuStreamWriteValue32_v2");
    find(d.copy, "cuMemcpy2DAsync_v2");
    return d;
  }();
  return made;
}

// The stream of an encoder: its second member, after a reference to its device. Python compares MLX's header with that.
inline CUstream_st* stream_of(mx::cu::CommandEncoder& encoder) {
  return *reinterpret_cast<CUstream_st**>(reinterpret_cast<char*>(&encoder) + sizeof(void*));
}

// Rows [from, from + count) of a plane of a rank's contribution, or of its own rows, become rows [to, to + count) of the output.
struct RowRun {
  int rank;
  int64_t from, to, count;
};

// Which rows are moved; the same on all ranks, but for what each has and needs.
struct RowPlan {
  std::vector<RowRun> sent;      // of this rank's rows to its contribution
  std::vector<RowRun> needed;    // what its output consists of
  std::vector<int64_t> contributed;  // rows of each rank's contribution
  int64_t rows;                  // of the output's planes
};

// An array of planes (batch and head) whose rows are moved: this rank's, and what becomes of it.
struct Moved {
  uint64_t from, to;
  size_t width;  // bytes of a row
};

// What a rank knows of all ranks. Addresses are of this process.
class Peers {
 public:
  static constexpr int MARKS = 4;

  // `merges` is memory of MLX that orders the merges.
  Peers(int rank, std::vector<uint64_t> slots, uint64_t flags, size_t slot_bytes, int slot_count, mx::array merges)
      : rank_(rank), slots_(std::move(slots)), flags_(flags), slot_bytes_(slot_bytes), slot_count_(slot_count),
        merges_(std::move(merges)) {}

  int rank() const { return rank_; }
  int ranks() const { return int(slots_.size()); }
  const mx::array& merges() const { return merges_; }
  uint32_t next_merge() { return ++merge_; }

  // Queue the copies that make `out` of this rank's `part` and the others', after what is queued on `own`, which then waits
  // for them. Rows are `width` bytes; a plane of `part` has `rows` of them.
  void gather(const RowPlan& plan, uint64_t part, int64_t rows, uint64_t out, int64_t planes, size_t width, CUstream_st* own) {
    const auto& d = copy_driver();
    const int64_t largest = *std::max_element(plan.contributed.begin(), plan.contributed.end());
    const int64_t step = std::max<int64_t>(1, int64_t(slot_bytes_ / (width * std::max<int64_t>(1, largest))));
    if (largest * width > slot_bytes_) throw std::runtime_error("A plane of the contributions does not fit a slot.");
    follow(own);
    const uint32_t first_chunk = chunk_;
    for (int64_t plane = 0; plane < planes; plane += step, chunk_++) {
      wait_until_taken();
      for (const RowRun& run : plan.sent) {
        copy(slot(rank_) + run.to * width, plan.contributed[rank_] * width, part + (plane * rows + run.from) * width,
             rows * width, run.count * width, std::min(step, planes - plane), sending_);
      }
      check(d.write_value(sending_, ready(rank_), chunk_ + 1, 0), "cuStreamWriteValue32");
    }
    for (const RowRun& run : plan.needed) {
      if (run.rank != rank_) continue;
      copy(out + run.to * width, plan.rows * width, part + run.from * width, rows * width, run.count * width, planes, receiving_);
    }
    chunk_ = first_chunk;
    for (int64_t plane = 0; plane < planes; plane += step, chunk_++) {
      for (int turn = 1; turn < ranks(); turn++) {
        const int peer = (rank_ + turn) % ranks();
        check(d.wait_value(receiving_, ready(peer), chunk_ + 1, AT_LEAST), "cuStreamWaitValue32");
        for (const RowRun& run : plan.needed) {
          if (run.rank != peer) continue;
          copy(out + (plane * plan.rows + run.to) * width, plan.rows * width, slot(peer) + run.from * width,
               plan.contributed[peer] * width, run.count * width, std::min(step, planes - plane), receiving_);
        }
        check(d.write_value(receiving_, taken(rank_, peer), chunk_ + 1, 0), "cuStreamWriteValue32");
      }
    }
    join(own);
  }

  // Queue the copies of the other ranks' rows of some planes of keys and values, `arrays`, after the copies before.
  void exchange(const RowPlan& plan, const std::array<Moved, 2>& arrays, int64_t rows, int64_t first, int64_t planes) {
    const auto& d = copy_driver();
    const int64_t largest = std::max<int64_t>(1, *std::max_element(plan.contributed.begin(), plan.contributed.end()));
    const int64_t step = int64_t(slot_bytes_ / (largest * (arrays[0].width + arrays[1].width)));
    if (step < 1) throw std::runtime_error("A plane of the contributions does not fit a slot.");
    for (int64_t plane = first, count; plane < first + planes; plane += count, chunk_++) {
      count = std::min(step, first + planes - plane);
      const auto place = [&](int rank, int array) {  // of an array's planes in a slot: keys, then values
        return slot(rank) + (array == 1 ? size_t(count * largest) * arrays[0].width : 0);
      };
      wait_until_taken();
      for (int i : {0, 1}) {
        const auto& [from, to, width] = arrays[i];
        for (const RowRun& run : plan.sent) {
          copy(place(rank_, i) + run.to * width, plan.contributed[rank_] * width, from + (plane * rows + run.from) * width,
               rows * width, run.count * width, count, sending_);
        }
      }
      check(d.write_value(sending_, ready(rank_), chunk_ + 1, 0), "cuStreamWriteValue32");
      for (int turn = 1; turn < ranks(); turn++) {
        const int peer = (rank_ + turn) % ranks();
        check(d.wait_value(receiving_, ready(peer), chunk_ + 1, AT_LEAST), "cuStreamWaitValue32");
        for (int i : {0, 1}) {
          const auto& [from, to, width] = arrays[i];
          for (const RowRun& run : plan.needed) {
            if (run.rank != peer) continue;
            copy(to + (plane * plan.rows + run.to) * width, plan.rows * width, place(peer, i) + run.from * width,
                 plan.contributed[peer] * width, run.count * width, count, receiving_);
          }
        }
        check(d.write_value(receiving_, taken(rank_, peer), chunk_ + 1, 0), "cuStreamWriteValue32");
      }
    }
  }

  // Makes a stream wait for the copies so far.
  void join(CUstream_st* own) {
    join_with(own, mark());
  }

  // The copies so far; the marks of the latest MARKS calls are valid.
  int mark() {
    const int made = marks_++ % MARKS;
    check(copy_driver().record(events_[2 * made + 1], sending_), "cuEventRecord");
    check(copy_driver().record(events_[2 * made + 2], receiving_), "cuEventRecord");
    return made;
  }
  // Makes a stream wait for the copies before a mark.
  void join_with(CUstream_st* own, int mark) {
    for (int i : {1, 2}) check(copy_driver().wait_event(own, events_[2 * mark + i], 0), "cuStreamWaitEvent");
  }

  // Makes a stream wait for what this rank sends: copies within a GPU take multiprocessors, which kernels would hold.
  void join_sent(CUstream_st* own) {
    check(copy_driver().record(sent_, sending_), "cuEventRecord");
    check(copy_driver().wait_event(own, sent_, 0), "cuStreamWaitEvent");
  }

  // Makes later copies wait for what is queued on a stream.
  void follow(CUstream_st* own) {
    const auto& d = copy_driver();
    if (sending_ == nullptr) {
      check(d.create_stream(&sending_, NON_BLOCKING, -1), "cuStreamCreateWithPriority");
      check(d.create_stream(&receiving_, NON_BLOCKING, -1), "cuStreamCreateWithPriority");
      for (auto& event : events_) check(d.create_event(&event, NO_TIMING), "cuEventCreate");
      check(d.create_event(&sent_, NO_TIMING), "cuEventCreate");
    }
    check(d.record(events_[0], own), "cuEventRecord");
    for (auto* stream : {sending_, receiving_}) check(d.wait_event(stream, events_[0], 0), "cuStreamWaitEvent");
  }

 private:
  static void copy(uint64_t to, size_t to_pitch, uint64_t from, size_t from_pitch, size_t width, size_t height, CUstream_st* stream) {
    Copy2D lines;
    lines.from = from, lines.from_pitch = from_pitch, lines.to = to, lines.to_pitch = to_pitch;
    lines.width = width, lines.height = height;
    check(copy_driver().copy(&lines, stream), "cuMemcpy2DAsync");
  }

  // Until all others have taken the chunk that was in this chunk's slot.
  void wait_until_taken() {
    if (chunk_ < uint32_t(slot_count_)) return;
    for (int peer = 0; peer < ranks(); peer++) {
      if (peer == rank_) continue;
      check(copy_driver().wait_value(sending_, taken(peer, rank_), chunk_ + 1 - slot_count_, AT_LEAST), "cuStreamWaitValue32");
    }
  }

  uint64_t slot(int rank) const { return slots_[rank] + (chunk_ % slot_count_) * slot_bytes_; }
  // One flag in 64 bytes: a row of `ready`, then a row of `taken` for each rank.
  uint64_t ready(int rank) const { return flags_ + 64 * uint64_t(rank); }
  uint64_t taken(int by, int of) const { return flags_ + 64 * (uint64_t(by + 1) * ranks() + of); }

  int rank_;
  std::vector<uint64_t> slots_;  // the memory of each rank's slots
  uint64_t flags_;
  size_t slot_bytes_;
  int slot_count_;
  mx::array merges_;
  uint32_t chunk_ = 0;   // all ranks gather the same chunks, in the same order
  uint32_t merge_ = 0;
  CUstream_st *sending_ = nullptr, *receiving_ = nullptr;
  CUevent_st *events_[1 + 2 * MARKS] = {}, *sent_ = nullptr;
  int marks_ = 0;
};

class PeerGather : public mx::Primitive {
 public:
  PeerGather(mx::Stream stream, std::shared_ptr<Peers> peers, RowPlan plan)
      : mx::Primitive(stream), peers_(std::move(peers)), plan_(std::move(plan)) {}

  void eval_cpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("Peer copies take one of MLX's GPU streams.");
  }

  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const mx::array& part = inputs[0];
    auto& encoder = mx::cu::get_command_encoder(stream());
    if (!part.flags().row_contiguous) throw std::runtime_error("Peer copies take a contiguous array.");
    allocate(outputs[0], stream());
    encoder.commit();  // the copies follow what has been queued, on the stream itself
    const auto at = [](const mx::array& a) { return reinterpret_cast<uint64_t>(pointer(a)); };
    peers_->gather(plan_, at(part), part.shape(2), at(outputs[0]), int64_t(part.shape(0)) * part.shape(1),
                   part.shape(3) * part.itemsize(), stream_of(encoder));
  }

  const char* name() const override { return "FatuiPeerGather"; }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override { return {shape_of(inputs[0])}; }
  mx::Shape shape_of(const mx::array& part) const { return {part.shape(0), part.shape(1), int(plan_.rows), part.shape(3)}; }

 private:
  std::shared_ptr<Peers> peers_;
  RowPlan plan_;
};

// Attention of this rank's rows over its own keys and values and those of other ranks. Inputs are q, k, v and the plan's
// constants; the plan's own inputs are q, k, v, the other ranks' keys and values, and the constants. Outputs are the plan's, then
// the other ranks' keys and values. Each launch is for some planes of keys, `planes`, and follows their arrival.
class PeerAttend : public mx::Primitive {
 public:
  PeerAttend(mx::Stream stream, std::shared_ptr<Peers> peers, std::shared_ptr<const Plan> plan, RowPlan rows,
             std::vector<int64_t> planes)
      : mx::Primitive(stream), peers_(std::move(peers)), plan_(std::move(plan)), rows_(std::move(rows)), planes_(std::move(planes)) {
    if (planes_.size() != plan_->steps.size() || planes_.size() > size_t(Peers::MARKS)) {
      throw std::invalid_argument("A plan with peers has planes for each launch, and few launches.");
    }
  }

  void eval_cpu(const Arrays&, Arrays&) override { throw std::runtime_error("Peer copies take one of MLX's GPU streams."); }

  void eval_gpu(const Arrays& inputs, Arrays& outputs) override {
    auto& encoder = mx::cu::get_command_encoder(stream());
    const mx::array &k = inputs[1], &v = inputs[2];
    if (!k.flags().row_contiguous || !v.flags().row_contiguous) throw std::runtime_error("Peer copies take contiguous arrays.");
    for (auto& out : outputs) allocate(out, stream());
    const size_t own = plan_->shapes.size();
    Arrays arrays{inputs.begin(), inputs.begin() + 3};
    if (!complies(inputs[0], plan_->layouts[0])) arrays[0] = copied(inputs[0], stream(), encoder);
    arrays.insert(arrays.end(), outputs.begin() + own, outputs.end());
    arrays.insert(arrays.end(), inputs.begin() + 3, inputs.end());
    arrays.insert(arrays.end(), outputs.begin(), outputs.begin() + own);
    encoder.commit();  // the copies follow what has been queued, on the stream itself
    CUstream_st* stream = stream_of(encoder);
    const auto moved = [](const mx::array& from, const mx::array& to) {
      const auto at = [](const mx::array& a) { return reinterpret_cast<uint64_t>(pointer(a)); };
      return Moved{at(from), at(to), size_t(from.shape(3)) * from.itemsize()};
    };
    const std::array<Moved, 2> both{moved(k, outputs[own]), moved(v, outputs[own + 1])};
    std::vector<int> marks;
    int64_t first = 0;
    peers_->follow(stream);
    for (const int64_t planes : planes_) {
      peers_->exchange(rows_, both, k.shape(2), first, planes);
      marks.push_back(peers_->mark());
      first += planes;
    }
    peers_->join_sent(stream);
    for (size_t i = 0; i < marks.size(); i++) {
      peers_->join_with(stream, marks[i]);
      launch(plan_->steps[i], arrays, {}, this->stream(), encoder);
      encoder.commit();
    }
  }

  const char* name() const override { return "FatuiPeerAttend"; }
  static std::vector<mx::Shape> shapes(const Plan& plan, const mx::array& k, const mx::array& v, const RowPlan& rows) {
    auto made = plan.shapes;
    const int far = int(std::max<int64_t>(1, rows.rows));  // memory for the tensor map, also if nothing is needed
    for (const mx::array* x : {&k, &v}) made.push_back({x->shape(0), x->shape(1), far, x->shape(3)});
    return made;
  }

 private:
  std::shared_ptr<Peers> peers_;
  std::shared_ptr<const Plan> plan_;
  RowPlan rows_;
  std::vector<int64_t> planes_;
};

// A plan whose last launch merges partial results of few rows, which every rank has; it is passed the number of the merge.
class PeerMerge : public mx::Primitive {
 public:
  PeerMerge(mx::Stream stream, std::shared_ptr<Peers> peers, std::shared_ptr<const Plan> plan)
      : mx::Primitive(stream), peers_(std::move(peers)), plan_(std::move(plan)) {}

  void eval_cpu(const Arrays&, Arrays&) override { throw std::runtime_error("Peer merges take one of MLX's GPU streams."); }

  void eval_gpu(const Arrays& inputs, Arrays& outputs) override {
    auto& encoder = mx::cu::get_command_encoder(stream());
    Arrays arrays = inputs;
    for (size_t i = 0; i < inputs.size(); i++) {
      if (!complies(inputs[i], plan_->layouts[i])) arrays[i] = copied(inputs[i], stream(), encoder);
    }
    for (auto& out : outputs) {
      allocate(out, stream());
      arrays.push_back(out);
    }
    const uint32_t number = peers_->next_merge();
    for (const Step& step : plan_->steps) {
      if (&step == &plan_->steps.back()) encoder.set_output_array(peers_->merges());  // one after another, as on other ranks
      launch(step, arrays, {number}, stream(), encoder);
    }
  }

  const char* name() const override { return "FatuiPeerMerge"; }

 private:
  std::shared_ptr<Peers> peers_;
  std::shared_ptr<const Plan> plan_;
};

inline mx::Stream gpu_stream() {
  const mx::Stream stream = mx::default_stream(mx::default_device());
  if (stream.device != mx::Device::gpu) throw std::invalid_argument("[flash_attention] The default device is not a GPU.");
  return stream;
}

inline Arrays attend_with_peers(std::shared_ptr<Peers> peers, std::shared_ptr<const Plan> plan, Arrays inputs, RowPlan rows,
                                std::vector<int64_t> planes) {
  const mx::array k = inputs[1], v = inputs[2];
  inputs.insert(inputs.end(), plan->constants.begin(), plan->constants.end());
  auto types = plan->types;
  types.insert(types.end(), {k.dtype(), v.dtype()});
  auto shapes = PeerAttend::shapes(*plan, k, v, rows);
  auto primitive = std::make_shared<PeerAttend>(gpu_stream(), std::move(peers), plan, std::move(rows), std::move(planes));
  return mx::array::make_arrays(std::move(shapes), types, primitive, inputs);
}

inline Arrays merge_with_peers(std::shared_ptr<Peers> peers, std::shared_ptr<const Plan> plan, Arrays inputs) {
  inputs.insert(inputs.end(), plan->constants.begin(), plan->constants.end());
  auto primitive = std::make_shared<PeerMerge>(gpu_stream(), std::move(peers), plan);
  return mx::array::make_arrays(plan->shapes, plan->types, primitive, inputs);
}

inline mx::array gather_from_peers(std::shared_ptr<Peers> peers, const mx::array& part, RowPlan plan, mx::Stream stream) {
  auto primitive = std::make_shared<PeerGather>(stream, std::move(peers), std::move(plan));
  return mx::array(primitive->shape_of(part), part.dtype(), primitive, {part});
}

}  // namespace fatui
