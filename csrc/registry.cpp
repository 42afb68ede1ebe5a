// The module fastmem._registry: FixTable for Python. CPython's own interface, since a lookup takes less time than the
// conversions of a binding library. Needs neither torch nor numpy.
//
// Two locks: the GIL, and the table's mutex. Whoever holds the GIL never waits for the mutex with it (Locked), so a batch
// may take the GIL back while it holds the mutex. No container is made and no fix is dropped under the mutex, since
// either may run a user's code.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <new>
#include <stdexcept>
#include <string_view>

#include "fix_table.h"
#include "registry.h"

using fastmem::Decay;
using fastmem::FixTable;
using fastmem::History;
using fastmem::kNone;
using fastmem::Signature;
using fastmem::Table;
using Slot = FixTable::Slot;

Table* fastmem::asked_last;

namespace {

class Locked {
 public:
  explicit Locked(Table* self) : mutex_(self->mutex) {
    if (mutex_.try_lock()) return;
    Py_BEGIN_ALLOW_THREADS
    mutex_.lock();
    Py_END_ALLOW_THREADS
  }
  ~Locked() { mutex_.unlock(); }
  Locked(const Locked&) = delete;

 private:
  std::mutex& mutex_;
};

// Drops, at the end of a call and outside of the mutex, the fixes that the table let go of.
struct Dropped : FixTable::Released {
  ~Dropped() {
    constexpr size_t ahead = 8;
    for (size_t i = 0; i < size(); ++i) {
      if (i + ahead < size()) __builtin_prefetch((*this)[i + ahead], 1);
      Py_DECREF(static_cast<PyObject*>((*this)[i]));
    }
  }
};

// Runs `body` and turns a C++ exception into Python's.
template <class Body>
PyObject* guarded(Body body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

Signature* as_signature(PyObject* object) {
  if (PyObject_TypeCheck(object, fastmem::signature_type)) return reinterpret_cast<Signature*>(object);
  PyErr_Format(PyExc_TypeError, "signature: expected an ErrorSignature, got %.200s", Py_TYPE(object)->tp_name);
  return nullptr;
}

Table* as_table(PyObject* self) { return reinterpret_cast<Table*>(self); }

// ---- Table: rows

// An entry, copied under the mutex. Owns its text and a reference to the fix.
struct Row {
  uint32_t index;
  uint64_t key;
  PyObject* text;
  PyObject* fix;
  double strength_now;
  History history;
};

Row copy_row(const FixTable& table, const Slot& slot) {
  const FixTable::Entry& e = table.at(slot.index);
  PyObject* fix = static_cast<PyObject*>(slot.fix);
  std::string_view text = table.text(slot);
  Row row{slot.index, slot.key, PyUnicode_FromStringAndSize(text.data(), Py_ssize_t(text.size())), fix, table.strength(slot.index),
          {e.strength, e.touched, e.created, e.last_success, slot.last_access, e.successes, e.failures}};
  Py_INCREF(fix);
  return row;
}

PyObject* epoch_object(uint32_t epoch) {
  if (epoch != kNone) return PyLong_FromUnsignedLong(epoch);
  Py_RETURN_NONE;
}

// A tuple made value by value: Py_BuildValue takes as long as the rest of a write.
class TupleMaker {
 public:
  explicit TupleMaker(Py_ssize_t size) : tuple_(PyTuple_New(size)) {}
  TupleMaker& operator<<(PyObject* value) {
    whole_ = whole_ && value;
    if (tuple_) PyTuple_SET_ITEM(tuple_, at_++, value);
    else Py_XDECREF(value);
    return *this;
  }
  TupleMaker& operator<<(uint32_t value) { return *this << PyLong_FromUnsignedLong(value); }
  TupleMaker& operator<<(double value) { return *this << PyFloat_FromDouble(value); }
  PyObject* done() {
    if (!whole_) Py_CLEAR(tuple_);
    return tuple_;
  }

 private:
  PyObject* tuple_;
  Py_ssize_t at_ = 0;
  bool whole_ = true;
};

// (index, key, text, fix, strength now, strength when touched, touched, created, last success, last access, successes,
// failures). Takes over what the row owns.
PyObject* row_object(const Row& row) {
  const History& h = row.history;
  TupleMaker made(12);
  made << row.index << PyLong_FromUnsignedLongLong(row.key) << row.text << row.fix << row.strength_now << h.strength
       << h.touched << h.created << epoch_object(h.last_success) << epoch_object(h.last_access) << h.successes
       << h.failures;
  return made.done();
}

PyObject* stored_row_object(const Row& row) {
  const History& h = row.history;
  Py_DECREF(row.fix);
  TupleMaker made(9);
  made << row.index << row.text << h.strength << h.touched << h.created << epoch_object(h.last_success)
       << epoch_object(h.last_access) << h.successes << h.failures;
  return made.done();
}

// ---- Table: one signature

// Calls use(table, slot) under the mutex; slot is null where the signature is not known.
template <class Use>
auto with_entry(PyObject* self, const Signature* signature, Use use) {
  Table* t = as_table(self);
  Locked lock(t);
  return use(*t->table, t->table->find(signature->key, signature->text()));
}

PyObject* table_lookup(PyObject* self, PyObject* argument) {
  Signature* signature = as_signature(argument);
  if (!signature) return nullptr;
  Table* t = as_table(self);
  PyObject* fix = Py_None;
  {
    Locked lock(t);
    fastmem::asked_last = t;
    if (Slot* slot = t->table->find(signature->key, signature->text())) {
      ++t->hits;
      t->table->access(*slot);
      fix = static_cast<PyObject*>(slot->fix);
    } else {
      ++t->misses;
    }
    Py_INCREF(fix);
  }
  return fix;
}

int table_contains(PyObject* self, PyObject* argument) {
  Signature* signature = as_signature(argument);
  if (!signature) return -1;
  return with_entry(self, signature, [](FixTable&, const Slot* slot) { return slot != nullptr; });
}

PyObject* table_row(PyObject* self, PyObject* argument) {
  return guarded([&]() -> PyObject* {
    Signature* signature = as_signature(argument);
    if (!signature) return nullptr;
    Row row{};
    bool known = with_entry(self, signature, [&](FixTable& table, const Slot* slot) {
      if (slot) row = copy_row(table, *slot);
      return slot != nullptr;
    });
    if (!known) Py_RETURN_NONE;
    return row_object(row);
  });
}

PyObject* table_insert(PyObject* self, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *first, *fix;
    if (!PyArg_ParseTuple(arguments, "OO", &first, &fix)) return nullptr;
    Signature* signature = as_signature(first);
    if (!signature) return nullptr;
    Dropped dropped;
    Table* t = as_table(self);
    Locked lock(t);
    dropped.reserve(2);
    uint32_t place = t->table->insert(signature->key, signature->text(), fix, dropped);
    Py_INCREF(fix);
    return PyLong_FromUnsignedLong(place);
  });
}

PyObject* table_succeed(PyObject* self, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject* first;
    double gain;
    if (!PyArg_ParseTuple(arguments, "Od", &first, &gain)) return nullptr;
    Signature* signature = as_signature(first);
    if (!signature) return nullptr;
    return PyBool_FromLong(with_entry(self, signature, [&](FixTable& table, const Slot* slot) {
      if (slot) table.succeed(slot->index, gain);
      return slot != nullptr;
    }));
  });
}

PyObject* table_fail(PyObject* self, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject* first;
    double loss;
    if (!PyArg_ParseTuple(arguments, "Od", &first, &loss)) return nullptr;
    Signature* signature = as_signature(first);
    if (!signature) return nullptr;
    Dropped dropped;
    return PyBool_FromLong(with_entry(self, signature, [&](FixTable& table, const Slot* slot) {
      if (slot) table.fail(slot->index, loss, dropped);
      return slot != nullptr;
    }));
  });
}

// ---- Table: many at once, without the GIL

PyObject* index_list(const std::vector<uint32_t>& indices) {
  PyObject* list = PyList_New(Py_ssize_t(indices.size()));
  for (size_t i = 0; list && i < indices.size(); ++i) {
    PyObject* index = PyLong_FromUnsignedLong(indices[i]);
    if (!index) Py_CLEAR(list);
    else PyList_SET_ITEM(list, Py_ssize_t(i), index);
  }
  return list;
}

// A buffer of 64-bit integers, released when it goes.
struct Integers : Py_buffer {
  bool held = false;
  bool take(PyObject* object, const char* name, int flags) {
    if (PyObject_GetBuffer(object, this, flags | PyBUF_FORMAT | PyBUF_ND | PyBUF_C_CONTIGUOUS) < 0) return false;
    held = true;
    const char* code = format ? format : "B";
    if (*code == '<' || *code == '=' || *code == '@') ++code;
    if (itemsize == 8 && ndim == 1 && *code && std::string_view("qQlL").find(*code) != std::string_view::npos) return true;
    PyErr_Format(PyExc_TypeError, "%s: expected a one-dimensional contiguous array of 64-bit integers", name);
    return false;
  }
  size_t count() const { return size_t(len) / 8; }
  ~Integers() {
    if (held) PyBuffer_Release(this);
  }
};

PyObject* table_lookup_keys(PyObject* self, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *first, *second;
    if (!PyArg_ParseTuple(arguments, "OO", &first, &second)) return nullptr;
    Integers keys, handles;
    if (!keys.take(first, "keys", 0) || !handles.take(second, "handles", PyBUF_WRITABLE)) return nullptr;
    if (keys.count() != handles.count()) {
      PyErr_SetString(PyExc_ValueError, "handles: expected one for each key");
      return nullptr;
    }
    Table* t = as_table(self);
    const uint64_t* key = static_cast<const uint64_t*>(keys.buf);
    int64_t* handle = static_cast<int64_t*>(handles.buf);
    Py_BEGIN_ALLOW_THREADS
    constexpr size_t kBlock = 4096;  // others may come between blocks
    Slot* found[kBlock];
    for (size_t start = 0; start < keys.count(); start += kBlock) {
      size_t n = std::min(kBlock, keys.count() - start);
      std::lock_guard lock(t->mutex);
      t->table->find_many(key + start, n, found);
      size_t hits = 0;
      for (size_t i = 0; i < n; ++i) {
        Slot* slot = found[i];
        handle[start + i] = slot ? int64_t(uint64_t(slot->generation) << 32 | slot->index) : -1;
        if (!slot) continue;
        ++hits;
        t->table->access(*slot);
      }
      t->hits += hits;
      t->misses += n - hits;
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
  });
}

// The items of a list, held: others may change the list while the GIL is away.
struct Held {
  PyObject* sequence = nullptr;
  std::vector<PyObject*> items;
  bool take(PyObject* object, const char* expected) {
    sequence = PySequence_Fast(object, expected);
    if (!sequence) return false;
    PyObject** first = PySequence_Fast_ITEMS(sequence);
    items.assign(first, first + PySequence_Fast_GET_SIZE(sequence));
    for (PyObject* item : items) Py_INCREF(item);
    return true;
  }
  bool all_signatures() const {
    for (PyObject* item : items)
      if (!as_signature(item)) return false;
    return true;
  }
  const Signature& signature(size_t i) const { return *reinterpret_cast<Signature*>(items[i]); }
  ~Held() {
    for (PyObject* item : items) Py_DECREF(item);
    Py_XDECREF(sequence);
  }
};

constexpr size_t kAhead = 16;

PyObject* table_lookup_signatures(PyObject* self, PyObject* argument) {
  return guarded([&]() -> PyObject* {
    Held signatures;
    if (!signatures.take(argument, "signatures: expected a list of ErrorSignatures")) return nullptr;
    if (!signatures.all_signatures()) return nullptr;
    Table* t = as_table(self);
    size_t n = signatures.items.size();
    std::vector<Slot*> found(n);
    std::vector<PyObject*> fixes(n, Py_None);
    Py_BEGIN_ALLOW_THREADS
    t->mutex.lock();
    for (size_t i = 0; i < n; ++i) {
      if (i + kAhead < n) t->table->prefetch(signatures.signature(i + kAhead).key);
      found[i] = t->table->find(signatures.signature(i).key, signatures.signature(i).text());
    }
    Py_END_ALLOW_THREADS
    for (size_t i = 0; i < n; ++i) {
      if (Slot* slot = found[i]) {
        ++t->hits;
        t->table->access(*slot);
        fixes[i] = static_cast<PyObject*>(slot->fix);
      } else {
        ++t->misses;
      }
      Py_INCREF(fixes[i]);
    }
    t->mutex.unlock();
    PyObject* list = PyList_New(Py_ssize_t(n));
    for (size_t i = 0; i < n; ++i) {
      if (list)
        PyList_SET_ITEM(list, Py_ssize_t(i), fixes[i]);
      else
        Py_DECREF(fixes[i]);
    }
    return list;
  });
}

PyObject* table_insert_many(PyObject* self, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *first, *second;
    if (!PyArg_ParseTuple(arguments, "OO", &first, &second)) return nullptr;
    Held signatures, fixes;
    if (!signatures.take(first, "signatures: expected a list of ErrorSignatures")) return nullptr;
    if (!signatures.all_signatures()) return nullptr;
    if (!fixes.take(second, "fixes: expected a list of Fixes")) return nullptr;
    size_t n = signatures.items.size();
    if (fixes.items.size() != n) {
      PyErr_SetString(PyExc_ValueError, "fixes: expected one for each signature");
      return nullptr;
    }
    Table* t = as_table(self);
    Dropped dropped;
    dropped.reserve(2 * n);
    size_t done = 0;
    std::vector<uint32_t> places(n);
    std::exception_ptr error;
    Py_BEGIN_ALLOW_THREADS
    {
      std::lock_guard lock(t->mutex);
      try {
        for (; done < n; ++done) {
          if (done + kAhead < n) t->table->prefetch(signatures.signature(done + kAhead).key);
          const Signature& signature = signatures.signature(done);
          places[done] = t->table->insert(signature.key, signature.text(), fixes.items[done], dropped);
        }
      } catch (...) {
        error = std::current_exception();
      }
    }
    Py_END_ALLOW_THREADS
    for (size_t i = 0; i < done; ++i) fixes.items[i] = Py_None, Py_INCREF(Py_None);  // the table has the reference now
    if (error) std::rethrow_exception(error);
    return index_list(places);
  });
}

// ---- Table: as a whole

PyObject* table_advance(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    Dropped dropped;
    Locked lock(as_table(self));
    return PyLong_FromUnsignedLongLong(as_table(self)->table->advance(dropped));
  });
}

PyObject* table_resume(PyObject* self, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    unsigned int epoch;
    unsigned long long hits, misses;
    if (!PyArg_ParseTuple(arguments, "IKK", &epoch, &hits, &misses)) return nullptr;
    Dropped dropped;
    Table* t = as_table(self);
    Locked lock(t);
    t->hits = hits;
    t->misses = misses;
    t->table->keep_journal();
    return PyLong_FromUnsignedLongLong(t->table->resume(epoch, dropped));
  });
}

PyObject* table_clear(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    Dropped dropped;
    Locked lock(as_table(self));
    as_table(self)->table->clear(dropped);
    Py_RETURN_NONE;
  });
}

PyObject* table_restore(PyObject* self, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    unsigned int index;
    PyObject *first, *fix;
    History h{};
    if (!PyArg_ParseTuple(arguments, "IOOdIIIIII", &index, &first, &fix, &h.strength, &h.touched, &h.created,
                          &h.last_success, &h.last_access, &h.successes, &h.failures))
      return nullptr;
    Signature* signature = as_signature(first);
    if (!signature) return nullptr;
    Locked lock(as_table(self));
    bool done = as_table(self)->table->restore(index, signature->key, signature->text(), fix, h);
    if (done) Py_INCREF(fix);
    return PyBool_FromLong(done);
  });
}

// Into a list of the caller's: what is returned would be lost where a signal's handler raises before it is bound.
PyObject* table_take_changed(PyObject* self, PyObject* into) {
  return guarded([&]() -> PyObject* {
    if (!PyList_Check(into)) {
      PyErr_SetString(PyExc_TypeError, "expected a list");
      return nullptr;
    }
    std::vector<uint32_t> changed;
    {
      Locked lock(as_table(self));
      changed = as_table(self)->table->take_journal();
    }
    PyObject* places = index_list(changed);
    const int failed = places ? PyList_SetSlice(into, PyList_GET_SIZE(into), PyList_GET_SIZE(into), places) : -1;
    Py_XDECREF(places);
    if (failed < 0) {
      Locked lock(as_table(self));
      for (uint32_t index : changed) as_table(self)->table->mark(index);
      return nullptr;
    }
    Py_RETURN_NONE;
  });
}

PyObject* table_take_accessed(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    std::vector<uint32_t> accessed;
    {
      Locked lock(as_table(self));
      accessed = as_table(self)->table->take_accessed();
    }
    return index_list(accessed);
  });
}

bool as_index(PyObject* item, uint32_t& index) {
  unsigned long value = PyLong_AsUnsignedLong(item);
  if (PyErr_Occurred()) return false;
  index = value < kNone ? uint32_t(value) : kNone;
  return true;
}

PyObject* table_give_back(PyObject* self, PyObject* argument) {
  return guarded([&]() -> PyObject* {
    Held places;
    if (!places.take(argument, "expected a list of places")) return nullptr;
    Locked lock(as_table(self));
    for (PyObject* item : places.items) {
      uint32_t index;
      if (!as_index(item, index)) return nullptr;
      if (index < as_table(self)->table->places()) as_table(self)->table->mark(index);
    }
    Py_RETURN_NONE;
  });
}

// For each place its row, or None where none lives there.
PyObject* rows_of(PyObject* self, PyObject* argument, PyObject* (*object)(const Row&)) {
  return guarded([&]() -> PyObject* {
    Held places;
    if (!places.take(argument, "expected a list of places")) return nullptr;
    std::vector<Row> rows(places.items.size());
    {
      Locked lock(as_table(self));
      const FixTable& table = *as_table(self)->table;
      for (size_t i = 0; i < rows.size(); ++i) {
        uint32_t index;
        if (!as_index(places.items[i], index)) {
          for (Row& row : rows) Py_XDECREF(row.fix), Py_XDECREF(row.text);
          return nullptr;
        }
        if (table.live(index)) rows[i] = copy_row(table, table.slot_of(index));
      }
    }
    PyObject* list = PyList_New(Py_ssize_t(rows.size()));
    for (size_t i = 0; i < rows.size(); ++i) {
      PyObject* row = nullptr;
      if (!rows[i].fix) row = Py_None, Py_INCREF(row);
      else row = object(rows[i]);
      if (!row) Py_CLEAR(list);
      if (list) PyList_SET_ITEM(list, Py_ssize_t(i), row);
      else Py_XDECREF(row);
    }
    return list;
  });
}

PyObject* table_rows(PyObject* self, PyObject* argument) { return rows_of(self, argument, row_object); }

// For each place what its row in a file should hold, in the order of sqlite_registry's columns but for the fix, or None.
PyObject* table_stored_rows(PyObject* self, PyObject* argument) {
  return rows_of(self, argument, stored_row_object);
}

PyObject* table_fix_of(PyObject* self, PyObject* argument) {
  long long handle = PyLong_AsLongLong(argument);
  if (PyErr_Occurred()) return nullptr;
  PyObject* fix = Py_None;
  Locked lock(as_table(self));
  const FixTable& table = *as_table(self)->table;
  uint32_t index = uint32_t(handle);
  if (handle >= 0 && table.live(index)) {
    const Slot& slot = table.slot_of(index);
    if (slot.generation == uint64_t(handle) >> 32) fix = static_cast<PyObject*>(slot.fix);
  }
  Py_INCREF(fix);
  return fix;
}

PyObject* table_counts(PyObject* self, PyObject*) {
  Table* t = as_table(self);
  uint64_t hits, misses, bytes;
  uint32_t epoch, places;
  {
    Locked lock(t);
    hits = t->hits, misses = t->misses, bytes = t->table->bytes();
    epoch = t->table->epoch(), places = t->table->places();
  }
  return Py_BuildValue("KKIIK", static_cast<unsigned long long>(hits), static_cast<unsigned long long>(misses), epoch,
                       places, static_cast<unsigned long long>(bytes));
}

Py_ssize_t table_length(PyObject* self) {
  Locked lock(as_table(self));
  return Py_ssize_t(as_table(self)->table->size());
}

PyObject* table_new(PyTypeObject* type, PyObject*, PyObject*) {
  Table* self = reinterpret_cast<Table*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  new (&self->mutex) std::mutex;
  try {
    self->table = new FixTable(Decay{1.0, 0.0, 0.0}, 0);
  } catch (const std::exception&) {
    Py_DECREF(self);
    return PyErr_NoMemory();
  }
  return reinterpret_cast<PyObject*>(self);
}

// _start(rate, linear, floor, capacity): an empty table of these rules.
PyObject* table_start(PyObject* self, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    Decay decay{};
    unsigned long long capacity;
    if (!PyArg_ParseTuple(arguments, "dddK", &decay.rate, &decay.linear, &decay.floor, &capacity)) return nullptr;
    Dropped dropped;
    Locked lock(as_table(self));
    FixTable* fresh = new FixTable(decay, capacity);
    as_table(self)->table->clear(dropped);
    delete as_table(self)->table;
    as_table(self)->table = fresh;
    as_table(self)->hits = as_table(self)->misses = 0;
    Py_RETURN_NONE;
  });
}

int table_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  return 0;
}

void table_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  if (fastmem::asked_last == as_table(self)) fastmem::asked_last = nullptr;
  {
    Dropped dropped;
    try {
      if (as_table(self)->table) as_table(self)->table->clear(dropped);
    } catch (const std::bad_alloc&) {  // what is left in it leaks
    }
    delete as_table(self)->table;
    as_table(self)->table = nullptr;
  }
  as_table(self)->mutex.~mutex();
  type->tp_free(self);
  Py_DECREF(type);
}


PyMethodDef methods[] = {
    {"lookup", table_lookup, METH_O,
     "lookup(signature)\n--\n\nThe fix registered for this error, or None. Notes the epoch of the access."},
    {"_lookup_signatures", table_lookup_signatures, METH_O, nullptr},
    {"_lookup_keys", table_lookup_keys, METH_VARARGS, nullptr},
    {"_row", table_row, METH_O, nullptr},
    {"_rows", table_rows, METH_O, nullptr},
    {"_stored_rows", table_stored_rows, METH_O, nullptr},
    {"_fix_of", table_fix_of, METH_O, nullptr},
    {"_insert", table_insert, METH_VARARGS, nullptr},
    {"_insert_many", table_insert_many, METH_VARARGS, nullptr},
    {"_succeed", table_succeed, METH_VARARGS, nullptr},
    {"_fail", table_fail, METH_VARARGS, nullptr},
    {"_advance", table_advance, METH_NOARGS, nullptr},
    {"_clear", table_clear, METH_NOARGS, nullptr},
    {"_counts", table_counts, METH_NOARGS, nullptr},
    {"_start", table_start, METH_VARARGS, nullptr},
    {"_restore", table_restore, METH_VARARGS, nullptr},
    {"_resume", table_resume, METH_VARARGS, nullptr},
    {"_take_changed", table_take_changed, METH_O, nullptr},
    {"_take_accessed", table_take_accessed, METH_NOARGS, nullptr},
    {"_give_back", table_give_back, METH_O, nullptr},
    {},
};
PyType_Slot table_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(table_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(table_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(table_traverse)},
    {Py_tp_methods, methods},
    {Py_sq_contains, reinterpret_cast<void*>(table_contains)},
    {Py_sq_length, reinterpret_cast<void*>(table_length)},
    {0, nullptr},
};
PyType_Spec table_spec = {"fastmem._registry.Table", sizeof(Table), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, table_slots};

// leak(object): it will never be finalised. For what a forked child has inherited and must not close.
PyObject* leak(PyObject*, PyObject* object) {
  Py_INCREF(object);
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"leak", leak, METH_O, nullptr},
    {"key_of", fastmem::key_of, METH_O, nullptr},
    {"set_fix_kinds", fastmem::set_fix_kinds, METH_VARARGS, nullptr},
    {"set_signature_kinds", fastmem::set_signature_kinds, METH_VARARGS, nullptr},
    {},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "fastmem._registry", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__registry() {
  PyObject* result = PyModule_Create(&module);
  PyObject* signature = fastmem::make_signature_type();
  PyObject* table = PyType_FromSpec(&table_spec);
  PyObject* fix_fields = fastmem::make_fix_fields_type();
  if (!result || !signature || !table || !fix_fields || PyModule_AddObject(result, "Signature", signature) < 0 ||
      PyModule_AddObject(result, "Table", table) < 0 || PyModule_AddObject(result, "FixFields", fix_fields) < 0) {
    Py_XDECREF(result);
    return nullptr;
  }
  return result;
}
