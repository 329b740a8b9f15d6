// Scratch of launches: memory whose contents are of no use before a launch or after it. The launches of a stream take a few
// buffers in turn, in place of an array each: that costs the host less, and the GPU keeps them in its L2 cache. As MLX orders
// launches that write the same array, as many run at once as there are buffers.
#pragma once
#include <array>
#include <map>
#include <optional>

#include <unistd.h>
#include <sys/syscall.h>

#include "launcher_memory.hpp"

namespace fatui {

class Scratch {
 public:
  // A buffer of so many bytes at least, until the next call.
  const mx::array& take(size_t bytes, mx::Stream stream, mx::cu::CommandEncoder& encoder) {
    auto& buffer = buffers_[next_++ % buffers_.size()];
    if (!buffer || buffer->nbytes() < bytes) {
      if (buffer) encoder.add_completed_handler([kept = buffer->data_shared_ptr()] {});  // launches that are queued use it
      buffer.emplace(mx::Shape{int(bytes)}, mx::uint8, nullptr, std::vector<mx::array>{});
      allocate(*buffer, stream);
    }
    return *buffer;
  }

 private:
  static constexpr size_t BUFFERS = 8;
  std::array<std::optional<mx::array>, BUFFERS> buffers_;
  size_t next_ = 0;
};

// The scratch of a thread's streams. MLX's streams belong to a thread; at its end launches may still be queued, which are waited
// for, but for the main thread's: MLX may be gone by then.
class ThreadScratch {
 public:
  ThreadScratch() : streams_(new std::map<int, Scratch>()) {}
  ~ThreadScratch() {
    if (syscall(SYS_gettid) == getpid()) return;
    driver().synchronize();
    delete streams_;
  }
  Scratch& of(int stream) { return (*streams_)[stream]; }

 private:
  std::map<int, Scratch>* streams_;
};

inline const mx::array& scratch(size_t bytes, mx::Stream stream, mx::cu::CommandEncoder& encoder) {
  static thread_local ThreadScratch scratch;
  return scratch.of(stream.index).take(bytes, stream, encoder);
}

}  // namespace fatui
