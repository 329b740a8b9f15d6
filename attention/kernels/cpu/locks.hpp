// Mutex, condition, detached thread and clock by POSIX: the headers of C++'s take longer to read than pool.cpp to compile.
#pragma once
#include <pthread.h>
#include <time.h>

#include <cstdint>

namespace fatui {

class Mutex {
 public:
  void lock() { pthread_mutex_lock(&mutex_); }
  void unlock() { pthread_mutex_unlock(&mutex_); }

 private:
  friend class Condition;
  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
};

class Hold {
 public:
  explicit Hold(Mutex& mutex) : mutex_(mutex) { mutex_.lock(); }
  ~Hold() { mutex_.unlock(); }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;

 private:
  friend class Condition;
  Mutex& mutex_;
};

class Condition {
 public:
  template <class Met>
  void wait(Hold& hold, Met met) {
    while (!met()) pthread_cond_wait(&condition_, &hold.mutex_.mutex_);
  }
  void notify_one() { pthread_cond_signal(&condition_); }
  void notify_all() { pthread_cond_broadcast(&condition_); }

 private:
  pthread_cond_t condition_ = PTHREAD_COND_INITIALIZER;
};

// Starts a thread that nobody waits for, and returns whether the system granted it.
inline bool start_thread(void* (*run)(void*), void* argument) {
  pthread_t thread;
  if (pthread_create(&thread, nullptr, run, argument) != 0) return false;
  pthread_detach(thread);
  return true;
}

struct Clock {
  static int64_t now() {  // nanoseconds; never set back
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return int64_t(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
  }
  static constexpr int64_t microseconds(int64_t n) { return 1'000 * n; }
};

}  // namespace fatui
