// Gathering an array from the GPUs of one host by copy engines, beside kernels that occupy all multiprocessors.
//
//   rank 0                                            rank 1
//     part ──copy──▶ slot i % SLOTS  ◀────────copy──── pulls it into its output
//     pulls into its output ────copy───▶ slot i % SLOTS ◀──copy── part
//
// A part moves in chunks of a slot. Slots are memory of this module, which other processes have mapped (CUDA IPC); MLX's
// own memory cannot be shared. Flags in host memory that all ranks share say which chunk a rank has put into its slots
// (`ready`), and which chunk of it another one has taken (`taken`); streams wait for them, no kernel spins.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "launcher_maps.hpp"
#include "launcher_memory.hpp"

struct CUstream_st;
struct CUevent_st;

namespace fatui {

constexpr unsigned NON_BLOCKING = 1, NO_TIMING = 2, AT_LEAST = 0;  // CUDA's flags

struct CopyDriver {
  int (*create_stream)(CUstream_st**, unsigned, int);
  int (*create_event)(CUevent_st**, unsigned);
  int (*record)(CUevent_st*, CUstream_st*);
  int (*wait_event)(CUstream_st*, CUevent_st*, unsigned);
  int (*wait_value)(CUstream_st*, uint64_t, uint32_t, unsigned);
  int (*write_value)(CUstream_st*, uint64_t, uint32_t, unsigned);
  int (*copy)(uint64_t, uint64_t, size_t, CUstream_st*);
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
    find(d.copy, "cuMemcpyDtoDAsync_v2");
    return d;
  }();
  return made;
}

// The stream of an encoder: its second member, after a reference to its device. Python compares MLX's header with that.
inline CUstream_st* stream_of(mx::cu::CommandEncoder& encoder) {
  return *reinterpret_cast<CUstream_st**>(reinterpret_cast<char*>(&encoder) + sizeof(void*));
}

// What a rank knows of all ranks. Addresses are of this process.
class Peers {
 public:
  Peers(int rank, std::vector<uint64_t> slots, uint64_t flags, size_t slot_bytes, int slot_count)
      : rank_(rank), slots_(std::move(slots)), flags_(flags), slot_bytes_(slot_bytes), slot_count_(slot_count) {}

  int ranks() const { return int(slots_.size()); }

  // Queue the copies of a part of `bytes` bytes to `out`, which has room for all ranks' parts, after what is queued on
  // `own`, which then waits for them.
  void gather(uint64_t part, uint64_t out, size_t bytes, CUstream_st* own) {
    const auto& d = copy_driver();
    if (sending_ == nullptr) {
      check(d.create_stream(&sending_, NON_BLOCKING, -1), "cuStreamCreateWithPriority");
      check(d.create_stream(&receiving_, NON_BLOCKING, -1), "cuStreamCreateWithPriority");
      for (auto& event : events_) check(d.create_event(&event, NO_TIMING), "cuEventCreate");
    }
    check(d.record(events_[0], own), "cuEventRecord");
    for (auto* stream : {sending_, receiving_}) check(d.wait_event(stream, events_[0], 0), "cuStreamWaitEvent");
    for (size_t first = 0; first < bytes; first += slot_bytes_, chunk_++) {
      send(part + first, std::min(slot_bytes_, bytes - first));
    }
    chunk_ -= uint32_t((bytes + slot_bytes_ - 1) / slot_bytes_);
    check(d.copy(out + rank_ * bytes, part, bytes, receiving_), "cuMemcpyDtoDAsync");
    for (size_t first = 0; first < bytes; first += slot_bytes_, chunk_++) {
      for (int step = 1; step < ranks(); step++) {
        const int peer = (rank_ + step) % ranks();
        receive(peer, out + peer * bytes + first, std::min(slot_bytes_, bytes - first));
      }
    }
    check(d.record(events_[1], sending_), "cuEventRecord");
    check(d.record(events_[2], receiving_), "cuEventRecord");
    for (int i : {1, 2}) check(d.wait_event(own, events_[i], 0), "cuStreamWaitEvent");
  }

 private:
  // Chunk `chunk_` into this rank's slot, once all others have taken the chunk that was there.
  void send(uint64_t from, size_t bytes) {
    const auto& d = copy_driver();
    if (chunk_ >= uint32_t(slot_count_)) {
      for (int peer = 0; peer < ranks(); peer++) {
        if (peer == rank_) continue;
        check(d.wait_value(sending_, taken(peer, rank_), chunk_ + 1 - slot_count_, AT_LEAST), "cuStreamWaitValue32");
      }
    }
    check(d.copy(slot(rank_), from, bytes, sending_), "cuMemcpyDtoDAsync");
    check(d.write_value(sending_, ready(rank_), chunk_ + 1, 0), "cuStreamWriteValue32");
  }

  // Chunk `chunk_` of another rank.
  void receive(int peer, uint64_t to, size_t bytes) {
    const auto& d = copy_driver();
    check(d.wait_value(receiving_, ready(peer), chunk_ + 1, AT_LEAST), "cuStreamWaitValue32");
    check(d.copy(to, slot(peer), bytes, receiving_), "cuMemcpyDtoDAsync");
    check(d.write_value(receiving_, taken(rank_, peer), chunk_ + 1, 0), "cuStreamWriteValue32");
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
  uint32_t chunk_ = 0;  // all ranks gather the same parts, in the same order
  CUstream_st *sending_ = nullptr, *receiving_ = nullptr;
  CUevent_st* events_[3] = {};
};

class PeerGather : public mx::Primitive {
 public:
  PeerGather(mx::Stream stream, std::shared_ptr<Peers> peers) : mx::Primitive(stream), peers_(std::move(peers)) {}

  void eval_cpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("Peer copies take one of MLX's GPU streams.");
  }

  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& encoder = mx::cu::get_command_encoder(stream());
    if (!inputs[0].flags().row_contiguous) throw std::runtime_error("Peer copies take a contiguous array.");
    allocate(outputs[0], stream());
    encoder.commit();  // the copies follow what has been queued, on the stream itself
    const auto at = [](const mx::array& a) { return reinterpret_cast<uint64_t>(pointer(a)); };
    peers_->gather(at(inputs[0]), at(outputs[0]), inputs[0].nbytes(), stream_of(encoder));
  }

  const char* name() const override { return "FatuiPeerGather"; }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override { return {shape_of(inputs[0])}; }

  mx::Shape shape_of(const mx::array& part) const {
    mx::Shape shape{peers_->ranks()};
    shape.insert(shape.end(), part.shape().begin(), part.shape().end());
    return shape;
  }

 private:
  std::shared_ptr<Peers> peers_;
};

inline mx::array gather_from_peers(std::shared_ptr<Peers> peers, const mx::array& part, mx::Stream stream) {
  auto primitive = std::make_shared<PeerGather>(stream, std::move(peers));
  return mx::array(primitive->shape_of(part), part.dtype(), primitive, {part});
}

}  // namespace fatui
