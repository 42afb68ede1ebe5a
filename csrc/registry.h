// What the files of the module fastmem._registry share.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <string_view>

#include "fix_table.h"

namespace fastmem {

// A failure's canonical text and what it was made of. Immutable.
struct Signature {
  PyObject_VAR_HEAD  // the text follows
  uint64_t key;
  PyObject* fields;
  char* data() const { return reinterpret_cast<char*>(const_cast<Signature*>(this) + 1); }
  std::string_view text() const { return {data(), size_t(ob_base.ob_size)}; }
};

struct Table {
  PyObject_HEAD
  FixTable* table;
  std::mutex mutex;
  uint64_t hits, misses;
};

extern PyTypeObject* signature_type;
extern Table* asked_last;  // the table of the last lookup, or null

PyObject* make_signature_type();  // a new reference; null: an error is set
PyObject* make_fix_fields_type();
PyObject* key_of(PyObject* module, PyObject* digest);
PyObject* set_signature_kinds(PyObject* module, PyObject* arguments);
PyObject* set_fix_kinds(PyObject* module, PyObject* arguments);

// Of a str in ASCII.
inline std::string_view plain_view(PyObject* text) {
  return {static_cast<const char*>(PyUnicode_DATA(text)), size_t(PyUnicode_GET_LENGTH(text))};
}

// A str that stands between quotes as it is, in JSON and in repr().
inline bool plain_text(PyObject* text) {
  if (!PyUnicode_CheckExact(text) || !PyUnicode_IS_ASCII(text)) return false;
  const std::string_view view = plain_view(text);
  return std::all_of(view.begin(), view.end(),
                     [](char c) { return c >= ' ' && c <= '~' && c != '\'' && c != '"' && c != '\\'; });
}

}  // namespace fastmem
