// The memory that kernels share: buffers and threadgroup arrays, each between wide zones that nobody may touch.
#pragma once
#include <stdlib.h>
#include <deque>
#include "threads.hpp"

constexpr size_t PAGE = 4096, RED_ZONE = 16 * PAGE, THREADGROUP_LIMIT = 32768;

constexpr int NOBODY = -1, SEVERAL = -2;

// The shadow of one granule: its last write, and its reads since the last barrier. Small, since caches have to hold it.
struct Cell {
  Time written = 0, read = 0;  // when; 0 for never
  uint32_t read_by = 0;        // simdgroups that read it, a bit each
  int writer : 12;             // thread
  int reader : 12;             // thread, of a simdgroup that is the only one to have read it
  unsigned is_write_atomic : 1, are_reads_atomic : 1;
  unsigned is_read_elsewhere : 1;  // by an earlier threadgroup

  Cell() : writer(NOBODY), reader(NOBODY), is_write_atomic(0), are_reads_atomic(0), is_read_elsewhere(0) {}
};
static_assert(sizeof(Cell) == 16 && MOST_THREADS <= 2048, "threads have to fit into 12 bits");

// One buffer, or one array of a threadgroup.
struct Region {
  std::string name;
  Space space;
  unsigned char* begin;
  size_t bytes;
  unsigned shift;               // a cell stands for a granule of 2 ** shift bytes
  bool is_writable = true;
  bool is_initialised = false;  // before the launch
  int line = 0;                 // of a threadgroup array: where it is declared
  Time declared = 0;            // and in which threadgroup it was last
  uint64_t reads = 0, writes = 0;  // granules
  std::vector<Cell> cells = {};

  size_t granule() const { return size_t(1) << shift; }

  // How far an address lies outside.
  size_t distance(uintptr_t address) const {
    const uintptr_t from = uintptr_t(begin), to = from + bytes;
    return address < from ? from - address : address >= to ? address - to + 1 : 0;
  }
};

// All regions, in one piece of address space.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;

  // Makes room for regions of so many bytes in all.
  Memory(size_t bytes, size_t regions) : size_((bytes / PAGE + 1) * PAGE + (regions + 1) * (RED_ZONE + 2 * PAGE)) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    begin_ = static_cast<unsigned char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, flags, -1, 0));
    if (begin_ == MAP_FAILED) abort();
    of_page_.assign(size_ / PAGE, nullptr);
    next_ = RED_ZONE;
  }
  ~Memory() { munmap(begin_, size_); }

  // Whether another region of that size fits.
  bool has_room(size_t bytes) const { return next_ + bytes + RED_ZONE + 2 * PAGE <= size_; }

  // A new region that begins `offset` bytes behind a page; a granule is a power of two.
  Region& add(const std::string& name, Space space, size_t bytes, size_t granule, size_t offset) {
    unsigned char* const at = begin_ + next_ + offset;
    regions_.push_back({name, space, at, bytes, unsigned(__builtin_ctzl(granule))});
    Region& made = regions_.back();
    made.cells.resize(bytes / granule + 1);
    const size_t end = next_ + offset + bytes;
    for (size_t page = next_ / PAGE; page <= end / PAGE; page++) of_page_[page] = &made;
    next_ = (end / PAGE + 1) * PAGE + RED_ZONE;
    return made;
  }

  // Whether an address belongs to this memory, red zones included.
  bool holds(uintptr_t address) const { return address - uintptr_t(begin_) < size_; }

  // The region on whose pages an address lies, or null; the address may still be outside of the region itself.
  Region* on_page(uintptr_t address) const { return of_page_[(address - uintptr_t(begin_)) / PAGE]; }

  // The region that an address in a red zone was probably meant for.
  const Region& nearest(uintptr_t address) const {
    const Region* found = &regions_.front();
    for (const Region& region : regions_)
      if (region.distance(address) < found->distance(address)) found = &region;
    return *found;
  }

  std::deque<Region>& regions() { return regions_; }

 private:
  unsigned char* begin_ = nullptr;
  size_t size_ = 0, next_ = 0;
  std::vector<Region*> of_page_;
  std::deque<Region> regions_;  // a deque: regions stay where they are while others are added
};

static Memory* memory = nullptr;
static uintptr_t library_begin, library_end;  // the kernel's own constants lie there

// Threadgroup memory that the kernel declares in all.
inline size_t threadgroup_bytes() {
  size_t bytes = 0;
  for (const Region& region : memory->regions())
    if (region.space == Space::threadgroup) bytes = (bytes + 15) / 16 * 16 + region.bytes;
  return bytes;
}
