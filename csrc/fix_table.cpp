#include "fix_table.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastmem {

namespace {

// Up to here strengths are followed epoch by epoch and equal an eager loop to the last bit; beyond, the closed form.
constexpr uint32_t kFollowed = 4096;
constexpr uint32_t kMost = (1u << 31) - 1;  // counts stop there
constexpr uint64_t kFirstSlots = 64;
constexpr uint64_t kHuge = 2u << 20;  // bytes of a huge page

uint32_t epochs_from(double count) {
  if (!(count < double(kNone - 1))) return kNone;
  return count < 1 ? 1 : uint32_t(count);
}

// So that as many more can be pushed without failing.
template <class T>
void make_room(std::vector<T>& vector, size_t more) {
  const size_t size = vector.size() + more;
  if (vector.capacity() < size) vector.reserve(std::max(size, 2 * vector.capacity()));
}

uint64_t text_bytes(size_t size) { return (sizeof(uint32_t) + size + 7) / 8 * 8; }

}  // namespace

double Decay::after(double strength, uint32_t epochs) const {
  uint32_t followed = std::min(epochs, kFollowed);
  for (uint32_t i = 0; i < followed; ++i) {
    double next = std::max(0.0, strength * rate - linear);
    if (next == strength) return strength;
    strength = next;
  }
  if (epochs == followed) return strength;
  double n = epochs - followed;
  if (rate == 1.0) return std::max(0.0, strength - linear * n);
  double power = std::pow(rate, n);
  return std::max(0.0, strength * power - linear * (1 - power) / (1 - rate));
}

uint32_t Decay::lifetime(double strength) const {
  double s = strength;
  for (uint32_t i = 1; i <= kFollowed; ++i) {
    double next = std::max(0.0, s * rate - linear);
    if (next < floor) return i;
    if (next == s) return kNone;  // at rest at or above the floor
    s = next;
  }
  double more;
  if (rate == 1.0) {
    more = (s - floor) / linear;
  } else {
    double rest = linear / (1 - rate);  // strength + rest falls geometrically
    if (floor + rest <= 0) return kNone;
    more = std::log((floor + rest) / (s + rest)) / std::log(rate);
  }
  uint32_t life = epochs_from(kFollowed + std::ceil(more));
  if (life == kNone) return kNone;
  // Rounding may be off by one; `after` is what counts.
  while (life > kFollowed + 1 && after(strength, life - 1) < floor) --life;
  while (life < kNone && !(after(strength, life) < floor)) ++life;
  return life;
}

void Block::grow(uint64_t bytes) {
  bool large = bytes >= kHuge;
  if (large) bytes = (bytes + kHuge - 1) / kHuge * kHuge;
  // Not realloc: it may move a block to where its huge pages fall apart.
  char* data = static_cast<char*>(large ? std::aligned_alloc(kHuge, bytes) : std::malloc(bytes));
  if (!data) throw std::bad_alloc();
#ifdef __linux__
  if (large) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  if (data_) std::memcpy(data, data_, std::min(bytes_, bytes));
  std::free(data_);
  data_ = data;
  bytes_ = bytes;
}

FixTable::FixTable(Decay decay, uint64_t capacity)
    : decay_(decay), capacity_(capacity), fresh_lifetime_(decay.lifetime(1.0)) {
  grow_slots();
}

FixTable::Slot* FixTable::find(uint64_t key, std::string_view wanted) const {
  for (uint64_t at = home(key);; at = after(at)) {
    Slot& slot = slots()[at];
    if (!slot.fix) return nullptr;
    if (slot.key != key) continue;
    prefetch_found(slot);
    if (text(slot) == wanted) return &slot;
  }
}

void FixTable::find_many(const uint64_t* keys, size_t count, Slot** found) const {
  constexpr size_t ahead = 24;  // keys whose slots are on their way
  for (size_t i = 0; i < std::min(ahead, count); ++i) prefetch(keys[i]);
  for (size_t i = 0; i < count; ++i) {
    if (i + ahead < count) prefetch(keys[i + ahead]);
    uint64_t at = home(keys[i]);
    while (slots()[at].fix && slots()[at].key != keys[i]) at = after(at);
    found[i] = slots()[at].fix ? &slots()[at] : nullptr;
  }
}

FixTable::Slot& FixTable::slot_of(uint32_t index) const {
  uint64_t at = home_of(entries()[index].home);
  while (slots()[at].index != index || !slots()[at].fix) at = after(at);
  return slots()[at];
}

uint32_t FixTable::insert(uint64_t key, std::string_view text, void* fix, Released& released) {
  make_room(released, 1);
  journal_room(1);
  if (Slot* slot = find(key, text)) {
    settle(slot->index, 1.0);
    released.push_back(slot->fix);
    slot->fix = fix;
    slot->last_access = epoch_;
    return slot->index;
  }
  if (capacity_) trim(capacity_ - 1, released);
  const uint32_t index = free_ != kNone ? free_ : places_;
  enter(index, key, text, fix, {1.0, epoch_, epoch_, kNone, epoch_, 0, 0});
  mark(index);
  return index;
}

bool FixTable::restore(uint32_t index, uint64_t key, std::string_view text, void* fix, const History& history) {
  if (live(index) || find(key, text)) return false;
  enter(index, key, text, fix, history);
  return true;
}

void FixTable::succeed(uint32_t index, double gain) {
  settle(index, std::min(1.0, strength(index) + gain));
  Entry& e = entries()[index];
  if (e.successes < kMost) ++e.successes;
  e.last_success = slot_of(index).last_access = epoch_;
}

bool FixTable::fail(uint32_t index, double loss, Released& released) {
  const double left = std::max(0.0, strength(index) - loss);
  if (left < decay_.floor) {
    erase(index, released);
    return true;
  }
  settle(index, left);
  Entry& e = entries()[index];
  if (e.failures < kMost) ++e.failures;
  slot_of(index).last_access = epoch_;
  return false;
}

void FixTable::erase(uint32_t index, Released& released) {
  make_room(released, 1);
  journal_room(1);
  drop_if_empty(leave_bucket(index));
  discard(index, released);
}

// Erases an entry that is in no bucket.
void FixTable::discard(uint32_t index, Released& released) {
  Slot& slot = slot_of(index);
  released.push_back(slot.fix);
  text_dead_ += text_bytes(text(slot).size());
  free_place(index, slot);
  leave_slot(slot);
}

void FixTable::free_place(uint32_t index, const Slot& slot) {
  Entry& e = entries()[index];
  e.live = 0;
  e.home = slot.generation + 1;
  mark(index);
  e.next = free_;
  free_ = index;
  --size_;
}

uint64_t FixTable::advance(Released& released) {
  if (epoch_ >= kNone - 1) throw std::overflow_error("the registry has reached its last epoch");
  return resume(epoch_ + 1, released);
}

uint64_t FixTable::resume(uint32_t epoch, Released& released) {
  epoch_ = epoch;
  uint64_t before = size_;
  while (!buckets_.empty() && buckets_.begin()->first <= epoch_) erase_first_bucket(released);
  uint64_t died = before - size_;
  if (capacity_) trim(capacity_, released);  // what was restored may be more
  return died;
}

void FixTable::erase_first_bucket(Released& released) {
  const uint32_t first = buckets_.begin()->second.first;
  size_t count = 0;
  for (uint32_t index = first; index != kNone; index = entries()[index].next) ++count;
  make_room(released, count);
  journal_room(count);
  buckets_.erase(buckets_.begin());  // from here on, nothing fails
  if (count > size_ / 16) return discard_many(first, count, released);
  for (uint32_t index = first; index != kNone;) {
    const uint32_t next = entries()[index].next;
    discard(index, released);
    index = next;
  }
}

// `discard` of a bucket that is a good part of the table: slots are emptied as they come and the gaps closed once, at the
// end, for which every slot is visited.
void FixTable::discard_many(uint32_t first, size_t count, Released& released) {
  const bool everything = count == size_;  // then no text is left to count
  const uint64_t gap = first_empty();
  constexpr size_t ahead = 16;  // slots are asked for two rounds before they are needed, their texts one
  Slot* found[ahead];
  uint32_t asked = first, next = first, dead = first;
  for (size_t i = 0; i < count + 2 * ahead; ++i) {
    if (i < count) {
      prefetch(uint64_t(entries()[asked].home) << 32);
      asked = entries()[asked].next;
    }
    Slot*& turn = found[i % ahead];
    if (i >= 2 * ahead) {
      const uint32_t index = dead;
      dead = entries()[index].next;
      released.push_back(turn->fix);
      if (!everything) text_dead_ += text_bytes(text(*turn).size());
      free_place(index, *turn);
      turn->fix = nullptr;
    }
    if (i >= ahead && i < count + ahead) {
      turn = &slot_of(next);
      if (!everything) __builtin_prefetch(text_.data() + 8ull * turn->text);
      next = entries()[next].next;
    }
  }
  if (everything) text_used_ = text_dead_ = 0;
  else close_gaps(gap);
}

void FixTable::trim(uint64_t most, Released& released) {
  while (size_ > most) erase(buckets_.begin()->second.first, released);
}

void FixTable::clear(Released& released) {
  while (!buckets_.empty()) erase_first_bucket(released);
}

uint64_t FixTable::bytes() const {
  return places_ * sizeof(Entry) + slot_count_ * sizeof(Slot) + text_used_ + journal_.capacity() * sizeof(uint32_t) +
         buckets_.size() * (sizeof(Bucket) + 48);
}

void FixTable::mark(uint32_t index) {
  Entry& e = entries()[index];
  if (!journaled_ || e.changed) return;
  journal_.push_back(index);
  e.changed = 1;
}

void FixTable::journal_room(size_t more) {
  if (journaled_) make_room(journal_, more);
}

std::vector<uint32_t> FixTable::take_journal() {
  for (uint32_t index : journal_) entries()[index].changed = 0;
  return std::exchange(journal_, {});
}

std::vector<uint32_t> FixTable::take_accessed() {
  std::vector<uint32_t> accessed;
  for (uint64_t at = 0; at < slot_count_; ++at) {
    Slot& slot = slots()[at];
    if (slot.fix && slot.accessed) accessed.push_back(slot.index);
    slot.accessed = 0;
  }
  return accessed;
}

// By a fifth, so that two thirds to four fifths of the slots are taken.
void FixTable::grow_slots() {
  const uint64_t old_count = slot_count_, count = std::max(kFirstSlots, old_count * 6 / 5);
  if (count > kNone) throw std::length_error("the registry is full");
  Block old;
  old.grow(count * sizeof(Slot));  // where this fails, the table is as it was
  std::memset(old.data(), 0, count * sizeof(Slot));
  old.swap(slots_);
  slot_count_ = count;
  const Slot* slot = reinterpret_cast<const Slot*>(old.data());
  for (const Slot* end = slot + old_count; slot != end; ++slot)
    if (slot->fix) enter_slot(*slot);
}

// Makes a free place ready: the first of the free ones, the next after all, or, while restoring, any.
void FixTable::take_place(uint32_t index) {
  if (index >= kNone - 1) throw std::length_error("the registry is full: 2^32 entries");
  if ((size_ + 1) * 5 > slot_count_ * 4) grow_slots();
  if (index == free_) {
    free_ = entries()[index].next;
    return;
  }
  if (index < places_) {  // in the middle of the free list
    uint32_t* link = &free_;
    while (*link != index) link = &entries()[*link].next;
    *link = entries()[index].next;
    return;
  }
  uint64_t bytes = (uint64_t(index) + 1) * sizeof(Entry);
  if (bytes > entries_.bytes()) entries_.grow(std::max(bytes, entries_.bytes() + entries_.bytes() / 2 + 4096));
  for (uint32_t place = places_; place <= index; ++place) {
    entries()[place] = Entry{};
    if (place == index) break;
    entries()[place].next = free_;
    free_ = place;
  }
  places_ = index + 1;
}

void FixTable::enter(uint32_t index, uint64_t key, std::string_view text, void* fix, const History& history) {
  take_place(index);
  Entry& e = entries()[index];
  const uint32_t generation = e.home;
  e.strength = history.strength;
  e.touched = history.touched, e.created = history.created, e.last_success = history.last_success;
  e.successes = std::min(history.successes, kMost), e.failures = std::min(history.failures, kMost);
  uint32_t at;
  try {
    at = store_text(text);
    enter_bucket(index, buckets_[death(e)]);
  } catch (...) {
    e.next = free_;
    free_ = index;
    throw;
  }
  enter_slot({key, fix, at, index, history.last_access, generation, 0});
  e.home = uint32_t(key >> 32);
  e.live = 1;
  ++size_;
}

void FixTable::enter_slot(const Slot& slot) {
  uint64_t at = home(slot.key);
  while (slots()[at].fix) at = after(at);
  slots()[at] = slot;
}

// Moves later ones of the run back into the gap, so that no tombstones gather.
void FixTable::leave_slot(Slot& slot) {
  uint64_t gap = uint64_t(&slot - slots());
  for (uint64_t at = after(gap); slots()[at].fix; at = after(at)) {
    uint64_t start = home(slots()[at].key);
    bool between = gap <= at ? gap < start && start <= at : gap < start || start <= at;
    if (between) continue;  // it would move to before its home
    slots()[gap] = slots()[at];
    gap = at;
  }
  slots()[gap] = {};
}

uint64_t FixTable::first_empty() const {
  uint64_t at = 0;
  while (slots()[at].fix) ++at;
  return at;
}

// Moves every entry to the first empty slot from its home on. `gap` was empty before others were emptied, so no entry was
// looked for across it.
void FixTable::close_gaps(uint64_t gap) {
  for (uint64_t at = after(gap); at != gap; at = after(at)) {
    if (!slots()[at].fix) continue;
    const Slot slot = std::exchange(slots()[at], Slot{});
    enter_slot(slot);
  }
}

uint32_t FixTable::death(const Entry& e) const {
  uint32_t life = e.strength == 1.0 ? fresh_lifetime_ : decay_.lifetime(e.strength);
  return life >= kNone - e.touched ? kNone : e.touched + life;
}

void FixTable::enter_bucket(uint32_t index, Bucket& bucket) {
  Entry& e = entries()[index];
  e.previous = bucket.last;
  e.next = kNone;
  (bucket.last == kNone ? bucket.first : entries()[bucket.last].next) = index;
  bucket.last = index;
}

// The bucket that it was the last one in, or the end.
FixTable::Buckets::iterator FixTable::leave_bucket(uint32_t index) {
  Entry& e = entries()[index];
  if (e.previous != kNone) entries()[e.previous].next = e.next;
  if (e.next != kNone) entries()[e.next].previous = e.previous;
  if (e.previous != kNone && e.next != kNone) return buckets_.end();
  auto bucket = buckets_.find(death(e));  // the epoch is worked out only where an end of the bucket moves
  if (e.previous == kNone) bucket->second.first = e.next;
  if (e.next == kNone) bucket->second.last = e.previous;
  return bucket->second.first == kNone ? bucket : buckets_.end();
}

void FixTable::drop_if_empty(Buckets::iterator bucket) {
  if (bucket != buckets_.end() && bucket->second.first == kNone) buckets_.erase(bucket);
}

// An entry's strength as of now, and the bucket that this means. What may fail comes first.
void FixTable::settle(uint32_t index, double strength) {
  Entry now = entries()[index];
  now.strength = strength;
  now.touched = epoch_;
  journal_room(1);
  Bucket& bucket = buckets_[death(now)];
  const auto left = leave_bucket(index);
  Entry& e = entries()[index];
  e.strength = strength;
  e.touched = epoch_;
  enter_bucket(index, bucket);
  drop_if_empty(left);
  mark(index);
}

uint32_t FixTable::store_text(std::string_view text) {
  if (text.size() > UINT32_MAX) throw std::length_error("a signature is longer than 4 GiB");
  uint64_t size = text_bytes(text.size());
  if (text_dead_ > 65536 && text_dead_ > text_used_ / 2) compact_text();
  uint64_t bytes = text_used_ + size;
  if (bytes > 8ull * UINT32_MAX) throw std::length_error("the signatures of the registry take more than 32 GiB");
  if (bytes > text_.bytes()) text_.grow(std::max(bytes, text_.bytes() + text_.bytes() / 2 + 4096));
  char* at = text_.data() + text_used_;
  uint32_t length = uint32_t(text.size()), place = uint32_t(text_used_ / 8);
  std::memcpy(at, &length, sizeof length);
  std::memcpy(at + sizeof length, text.data(), length);
  text_used_ = bytes;
  return place;
}

void FixTable::compact_text() {
  Block fresh;
  fresh.grow(std::max<uint64_t>(4096, text_used_ - text_dead_));
  uint64_t used = 0;
  for (uint64_t at = 0; at < slot_count_; ++at) {
    Slot& slot = slots()[at];
    if (!slot.fix) continue;
    uint64_t size = text_bytes(text(slot).size());
    std::memcpy(fresh.data() + used, text_.data() + 8ull * slot.text, size);
    slot.text = uint32_t(used / 8);
    used += size;
  }
  text_.swap(fresh);
  text_used_ = used;
  text_dead_ = 0;
}

}  // namespace fastmem
