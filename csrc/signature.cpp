// The type fastmem._registry.Signature, which ErrorSignature extends. Making one costs more than looking it up, so what is
// usual is made here; ErrorSignature._make knows the rest, and what is refused.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "registry.h"

namespace fastmem {

PyTypeObject* signature_type;

namespace {

PyTypeObject *usual_type, *severity_type, *error_type_type;  // ErrorSignature and its enums
PyObject *sha256, *value_name, *digest_name, *make_name;

// A signature is made to be looked up, mostly in the table that was asked last: while it is made, its entry is on its way
// from memory, first the slot and then what the slot leads to. A table that is busy is left alone.
template <class Fetch>
void expect(Fetch fetch) {
  if (!asked_last || !asked_last->mutex.try_lock()) return;
  fetch(*asked_last->table);
  asked_last->mutex.unlock();
}

uint64_t expected_key(const char* digest) {
  uint64_t key = 0;
  for (int i = 0; i < 8; ++i) key = key << 8 | uint8_t(digest[i]);
  expect([key](const FixTable& table) { table.prefetch(key); });
  return key;
}

// Takes over the reference to `fields`.
PyObject* make(PyTypeObject* type, std::string_view text, uint64_t key, PyObject* fields) {
  PyObject* object = type->tp_alloc(type, Py_ssize_t(text.size()));
  if (!object) {
    Py_DECREF(fields);
    return nullptr;
  }
  Signature* self = reinterpret_cast<Signature*>(object);
  std::copy(text.begin(), text.end(), self->data());
  self->key = key;
  self->fields = fields;
  // Enums, text and a number make no cycle. A subclass may hold more.
  if (type == usual_type) PyObject_GC_UnTrack(object);
  expect([key](const FixTable& table) { table.prefetch_entry(key); });
  return object;
}

// ---- the usual one

bool append(std::string& text, PyObject* item) {
  Py_ssize_t size;
  const char* data = PyUnicode_Check(item) ? PyUnicode_AsUTF8AndSize(item, &size) : nullptr;
  if (data) text.append(data, size_t(size));
  return data != nullptr;
}

bool append_value(std::string& text, PyObject* member) {
  PyObject* value = PyObject_GetAttr(member, value_name);
  const bool done = value && append(text, value);
  Py_XDECREF(value);
  return done;
}

bool append_categories(std::string& text, PyObject* categories) {
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(categories);
  std::vector<std::string_view> sorted(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(categories, i);
    if (!plain_text(item)) return false;
    sorted[size_t(i)] = plain_view(item);
  }
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 0; i < sorted.size(); ++i) text.append(i ? "', '" : "'").append(sorted[i]);
  if (count) text += '\'';
  return true;
}

bool usual(PyObject* const* field) {
  return Py_TYPE(field[0]) == severity_type && Py_TYPE(field[1]) == error_type_type && PyUnicode_CheckExact(field[2]) &&
         (PyList_CheckExact(field[3]) || PyTuple_CheckExact(field[3])) && PyFloat_CheckExact(field[4]) &&
         std::isfinite(PyFloat_AS_DOUBLE(field[4]));
}

// The canonical text; false where something needs escapes, or an error is set.
bool canonical_text(std::string& text, PyObject* const* field, PyObject* categories) {
  if (!append_value(text, field[0])) return false;
  text += ':';
  if (!append_value(text, field[1])) return false;
  text += ':';
  if (!append(text, field[2])) return false;
  text += ":[";
  if (!append_categories(text, categories)) return false;
  text += ']';
  return true;
}

// The digest's key; false: an error is set.
bool digest_key(std::string_view text, uint64_t& key) {
  PyObject* bytes = PyBytes_FromStringAndSize(text.data(), Py_ssize_t(text.size()));
  PyObject* hash = bytes ? PyObject_CallOneArg(sha256, bytes) : nullptr;
  PyObject* digest = hash ? PyObject_CallMethodNoArgs(hash, digest_name) : nullptr;
  const bool done = digest && PyBytes_Check(digest) && PyBytes_GET_SIZE(digest) == 32;
  if (done) key = expected_key(PyBytes_AS_STRING(digest));
  Py_XDECREF(digest);
  Py_XDECREF(hash);
  Py_XDECREF(bytes);
  return done;
}

// The signature of usual fields; null where it is not usual after all, or an error is set.
PyObject* make_usual(PyTypeObject* type, PyObject* const* field) {
  PyObject* categories = PySequence_Tuple(field[3]);  // a list may change while the text is hashed
  if (!categories) return nullptr;
  PyObject* fields = PyTuple_Pack(5, field[0], field[1], field[2], categories, field[4]);
  Py_DECREF(categories);
  if (!fields) return nullptr;
  try {
    std::string text;
    text.reserve(128);
    uint64_t key = 0;
    if (canonical_text(text, field, categories) && digest_key(text, key)) return make(type, text, key, fields);
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  }
  Py_DECREF(fields);
  return nullptr;
}

PyObject* signature_new(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  static const char* const names[] = {"severity", "error_type", "context", "affected_categories", "delta", nullptr};
  PyObject* field[5];
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OOOOO:ErrorSignature", const_cast<char**>(names), &field[0],
                                   &field[1], &field[2], &field[3], &field[4]))
    return nullptr;
  PyObject* made = usual(field) ? make_usual(type, field) : nullptr;
  if (made) return made;
  PyErr_Clear();
  PyObject* self = reinterpret_cast<PyObject*>(type);
  return PyObject_CallMethodObjArgs(self, make_name, field[0], field[1], field[2], field[3], field[4], nullptr);
}

// ---- the type

// Signature._of(text, key, fields): one of which the text and the key are known.
PyObject* signature_of(PyObject* type, PyObject* arguments) {
  const char* text;
  Py_ssize_t size;
  unsigned long long key;
  PyObject* fields;
  if (!PyArg_ParseTuple(arguments, "s#KO", &text, &size, &key, &fields)) return nullptr;
  Py_INCREF(fields);
  return make(reinterpret_cast<PyTypeObject*>(type), {text, size_t(size)}, key, fields);
}

void signature_dealloc(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  Py_XDECREF(reinterpret_cast<Signature*>(object)->fields);
  type->tp_free(object);
  Py_DECREF(type);
}

PyObject* signature_key(PyObject* self, void*) {
  return PyLong_FromUnsignedLongLong(reinterpret_cast<Signature*>(self)->key);
}
PyObject* signature_text(PyObject* self, void*) {
  std::string_view text = reinterpret_cast<Signature*>(self)->text();
  return PyUnicode_FromStringAndSize(text.data(), Py_ssize_t(text.size()));
}
PyObject* signature_fields(PyObject* self, void*) {
  PyObject* fields = reinterpret_cast<Signature*>(self)->fields;
  Py_INCREF(fields);
  return fields;
}

PyGetSetDef properties[] = {
    {"key", signature_key, nullptr, "The text's 64-bit key.", nullptr},
    {"text", signature_text, nullptr, "The canonical text.", nullptr},
    {"_fields", signature_fields, nullptr, nullptr, nullptr},
    {},
};
PyMethodDef methods[] = {{"_of", signature_of, METH_VARARGS | METH_CLASS, nullptr}, {}};
const char kDoc[] = "Signature(severity, error_type, context, affected_categories, delta)\n--\n\n";
PyType_Slot slots[] = {
    {Py_tp_doc, const_cast<char*>(kDoc)},
    {Py_tp_new, reinterpret_cast<void*>(signature_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(signature_dealloc)},
    {Py_tp_getset, properties},
    {Py_tp_methods, methods},
    {0, nullptr},
};
PyType_Spec spec = {"fastmem._registry.Signature", sizeof(Signature), 1, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};

}  // namespace

PyObject* make_signature_type() {
  value_name = PyUnicode_InternFromString("_value_");
  digest_name = PyUnicode_InternFromString("digest");
  make_name = PyUnicode_InternFromString("_make");
  if (!value_name || !digest_name || !make_name) return nullptr;
  PyObject* type = PyType_FromSpec(&spec);
  signature_type = reinterpret_cast<PyTypeObject*>(type);
  return type;
}

// key_of(digest): the key of a text with this digest, its first 8 bytes.
PyObject* key_of(PyObject*, PyObject* digest) {
  if (!PyBytes_Check(digest) || PyBytes_GET_SIZE(digest) < 8) {
    PyErr_SetString(PyExc_TypeError, "digest: expected 8 bytes or more");
    return nullptr;
  }
  return PyLong_FromUnsignedLongLong(expected_key(PyBytes_AS_STRING(digest)));
}

// set_signature_kinds(ErrorSignature, ErrorSeverity, ErrorType, sha256): what a usual signature is, and is made of.
PyObject* set_signature_kinds(PyObject*, PyObject* arguments) {
  PyObject *type, *severity, *error_type, *hash;
  if (!PyArg_ParseTuple(arguments, "O!O!O!O", &PyType_Type, &type, &PyType_Type, &severity, &PyType_Type, &error_type,
                        &hash))
    return nullptr;
  Py_INCREF(type);
  Py_INCREF(severity);
  Py_INCREF(error_type);
  Py_INCREF(hash);
  Py_XSETREF(usual_type, reinterpret_cast<PyTypeObject*>(type));
  Py_XSETREF(severity_type, reinterpret_cast<PyTypeObject*>(severity));
  Py_XSETREF(error_type_type, reinterpret_cast<PyTypeObject*>(error_type));
  Py_XSETREF(sha256, hash);
  Py_RETURN_NONE;
}

}  // namespace fastmem
