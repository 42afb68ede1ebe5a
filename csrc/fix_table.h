// The table behind fastmem.registry.FixRegistry: signature text -> fix, with decay that costs nothing until it matters.
//
// Open addressing with linear probing. A slot holds what a lookup needs, half a cache line, so that a lookup in a table
// larger than the caches waits twice, for the slot, then for the text and the fix together, or not at all where the making
// of the signature has asked for them. A hit is a hit only if the whole text is equal: a collision of keys costs time and
// never a wrong fix. The rest of an entry stands apart, at a place that it keeps as long as it lives.
// An entry's strength is kept as of the epoch of its last event. The epoch in which it will die follows from that, and
// the entry waits in that epoch's bucket; advancing an epoch empties one bucket and touches nothing else.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <map>
#include <string_view>
#include <utility>
#include <vector>

namespace fastmem {

inline constexpr uint32_t kNone = UINT32_MAX;  // no entry, no epoch

// One epoch takes a strength s to max(0, s * rate - linear); below `floor` the entry dies.
struct Decay {
  double rate, linear, floor;
  double after(double strength, uint32_t epochs) const;
  uint32_t lifetime(double strength) const;  // epochs until it is below the floor; kNone
};

// What an entry remembers: its strength as of epoch `touched`, epochs (kNone: never) and counts.
struct History {
  double strength;
  uint32_t touched, created, last_success, last_access;
  uint32_t successes, failures;
};

// Memory that grows in place. Large blocks ask for huge pages, since a table is read in no order.
class Block {
 public:
  Block() = default;
  ~Block() { std::free(data_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  void grow(uint64_t bytes);
  void swap(Block& other) { std::swap(data_, other.data_), std::swap(bytes_, other.bytes_); }
  char* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  uint64_t bytes_ = 0;
};

class FixTable {
 public:
  using Released = std::vector<void*>;  // fixes the table let go of, for their owner to drop

  FixTable(Decay decay, uint64_t capacity);  // capacity 0: no bound

  struct Slot {
    uint64_t key;
    void* fix;      // owned by the caller; null: an empty slot
    uint32_t text;  // where its size and its bytes stand, in units of 8 bytes
    uint32_t index;
    uint32_t last_access;      // an epoch; kNone: never
    uint32_t generation : 31;  // tells a later user of a place from an earlier one
    uint32_t accessed : 1;     // `last_access` has moved since it was last noted down
  };
  static_assert(sizeof(Slot) == 32);

  struct Entry {
    double strength;  // as of epoch `touched`
    uint32_t touched, created, last_success;  // epochs; kNone: never
    uint32_t previous, next;  // in its bucket; a free place's `next` is the next free one
    uint32_t home;  // the key's upper half, which says where its slot is looked for; of a free place, its generation
    uint32_t successes : 31, live : 1;
    uint32_t failures : 31, changed : 1;  // changed: stands in the journal
  };
  static_assert(sizeof(Entry) == 40);

  Slot* find(uint64_t key, std::string_view text) const;  // null: not here
  void find_many(const uint64_t* keys, size_t count, Slot** found) const;  // by the keys alone
  // The slots from its home on: a cache line, and the next, where every second search ends.
  void prefetch(uint64_t key) const {
    const char* at = reinterpret_cast<const char*>(&slots()[home(key)]);
    __builtin_prefetch(at);
    __builtin_prefetch(at + 64);
  }

  // What a lookup of this key will read once its slot is here.
  void prefetch_entry(uint64_t key) const {
    for (uint64_t at = home(key); slots()[at].fix; at = after(at)) {
      if (slots()[at].key != key) continue;
      prefetch_found(slots()[at]);
      return;
    }
  }

  // The fix of a new or a known text. A known entry keeps its counts and its creation; its strength is 1 again. Of a
  // full table the entry goes that would die first; of those, the one that has waited longest.
  uint32_t insert(uint64_t key, std::string_view text, void* fix, Released& released);
  // An entry as it was, at the place that it had. False: the place or the text is taken.
  bool restore(uint32_t index, uint64_t key, std::string_view text, void* fix, const History& history);
  void succeed(uint32_t index, double gain);
  bool fail(uint32_t index, double loss, Released& released);  // true: it died of it
  void access(Slot& slot) const {
    if (slot.last_access == epoch_) return;
    slot.last_access = epoch_;
    slot.accessed = 1;
  }
  void erase(uint32_t index, Released& released);
  uint64_t advance(Released& released);  // one epoch; how many died
  uint64_t resume(uint32_t epoch, Released& released);  // at this epoch; how many are dead by then
  void clear(Released& released);

  const Entry& at(uint32_t index) const { return entries()[index]; }
  bool live(uint32_t index) const { return index < places_ && entries()[index].live; }
  Slot& slot_of(uint32_t index) const;  // of a live entry
  std::string_view text(const Slot& slot) const {
    const char* at = text_.data() + 8ull * slot.text;
    return {at + sizeof(uint32_t), *reinterpret_cast<const uint32_t*>(at)};
  }
  double strength(uint32_t index) const {
    const Entry& e = entries()[index];
    return decay_.after(e.strength, epoch_ - e.touched);
  }
  uint64_t size() const { return size_; }
  uint32_t epoch() const { return epoch_; }
  uint32_t places() const { return places_; }
  uint64_t bytes() const;  // of everything, the fixes excluded

  // The journal: which places changed since they were last taken. Off until asked for.
  void keep_journal() { journaled_ = true; }
  std::vector<uint32_t> take_journal();
  void mark(uint32_t index);
  std::vector<uint32_t> take_accessed();

 private:
  struct Bucket {
    uint32_t first = kNone, last = kNone;
  };
  using Buckets = std::map<uint32_t, Bucket>;  // by the epoch of death; kNone, never, is the last

  // The text will be compared, its last bytes too, and the fix's owner will count its references.
  void prefetch_found(const Slot& slot) const {
    __builtin_prefetch(slot.fix, 1);
    __builtin_prefetch(text_.data() + 8ull * slot.text);
    __builtin_prefetch(text_.data() + 8ull * slot.text + 63);
  }
  Entry* entries() const { return reinterpret_cast<Entry*>(entries_.data()); }
  Slot* slots() const { return reinterpret_cast<Slot*>(slots_.data()); }
  // Slots are in the order of their keys, but for collisions, so any number of them does and growth copies in order.
  uint64_t home_of(uint32_t upper) const { return upper * slot_count_ >> 32; }
  uint64_t home(uint64_t key) const { return home_of(uint32_t(key >> 32)); }
  uint64_t after(uint64_t at) const { return at + 1 == slot_count_ ? 0 : at + 1; }
  void grow_slots();
  void take_place(uint32_t index);
  void enter(uint32_t index, uint64_t key, std::string_view text, void* fix, const History& history);
  void enter_slot(const Slot& slot);
  void leave_slot(Slot& slot);
  uint64_t first_empty() const;
  void close_gaps(uint64_t gap);
  uint32_t death(const Entry& e) const;
  void trim(uint64_t most, Released& released);
  void discard(uint32_t index, Released& released);
  void erase_first_bucket(Released& released);
  void discard_many(uint32_t first, size_t count, Released& released);
  void free_place(uint32_t index, const Slot& slot);
  void enter_bucket(uint32_t index, Bucket& bucket);
  Buckets::iterator leave_bucket(uint32_t index);
  void drop_if_empty(Buckets::iterator bucket);
  void journal_room(size_t more);
  void settle(uint32_t index, double strength);  // as of now, and into the bucket that this means
  uint32_t store_text(std::string_view text);
  void compact_text();

  Decay decay_;
  uint64_t capacity_;
  uint32_t fresh_lifetime_;
  uint32_t epoch_ = 0, places_ = 0, free_ = kNone;
  uint64_t size_ = 0, slot_count_ = 0;
  Block entries_, slots_, text_;
  uint64_t text_used_ = 0, text_dead_ = 0;  // bytes
  Buckets buckets_;
  bool journaled_ = false;
  std::vector<uint32_t> journal_;
};

}  // namespace fastmem
