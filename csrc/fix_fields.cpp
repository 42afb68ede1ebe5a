// A registry holds many fixes, most of which say one thing: a field that was never set nor read takes no object of its
// own, and Python's collector of cycles is spared them.
#include <cmath>
#include <new>
#include <string>

#include "registry.h"

namespace fastmem {
namespace {

enum Field { kKind, kAdd, kRemove, kAdjust, kMoves, kSupplement, kParts, kFields };
const char* const kNames[] = {"fix_type",       "elements_to_add",       "elements_to_remove", "value_adjustments",
                              "category_moves", "definition_supplement", "decomposition",      nullptr};

struct FixFields {
  PyObject_HEAD
  PyObject* values[kFields];  // null: as it is when nobody says anything
};

PyTypeObject* usual_kind;  // FixType

FixFields* as_fields(PyObject* self) { return reinterpret_cast<FixFields*>(self); }

// A dict of finite numbers by text, and of none of their subclasses.
bool numbers(PyObject* dict) {
  if (!dict) return true;
  if (!PyDict_CheckExact(dict)) return false;
  PyObject *name, *value;
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &name, &value);) {
    if (!PyUnicode_CheckExact(name)) return false;
    double number = NAN;
    if (PyFloat_CheckExact(value)) number = PyFloat_AS_DOUBLE(value);
    else if (PyLong_CheckExact(value)) number = PyLong_AsDouble(value);
    if (!std::isfinite(number)) return false;
    if (number == -1.0 && PyErr_Occurred()) return PyErr_Clear(), false;
  }
  return true;
}

bool unset(PyObject* value) { return !value || value == Py_None; }

// What most fixes are, and nothing to complain about: only numbers are added and adjusted.
bool usual(const FixFields& fix) {
  PyObject* const* v = fix.values;
  return v[kKind] && Py_TYPE(v[kKind]) == usual_kind && numbers(v[kAdd]) && numbers(v[kAdjust]) &&
         (!v[kRemove] || (PyList_CheckExact(v[kRemove]) && !PyList_GET_SIZE(v[kRemove]))) &&
         (!v[kMoves] || (PyDict_CheckExact(v[kMoves]) && !PyDict_GET_SIZE(v[kMoves]))) && unset(v[kSupplement]) &&
         unset(v[kParts]);
}

int fields_init(PyObject* self, PyObject* arguments, PyObject* keywords) {
  PyObject* given[kFields] = {};
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O|OOOOOO:Fix", const_cast<char**>(kNames), &given[0], &given[1],
                                   &given[2], &given[3], &given[4], &given[5], &given[6]))
    return -1;
  for (int i = 0; i < kFields; ++i) {
    Py_XINCREF(given[i]);
    Py_XSETREF(as_fields(self)->values[i], given[i]);
  }
  spare_collector(self, sizeof(FixFields));
  if (usual(*as_fields(self))) return 0;
  PyObject* checked = PyObject_CallMethod(self, "check", nullptr);
  Py_XDECREF(checked);
  return checked ? 0 : -1;
}

void fields_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  for (PyObject* value : as_fields(self)->values) Py_XDECREF(value);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* get_field(PyObject* self, void* which) {
  const Field field = Field(reinterpret_cast<intptr_t>(which));
  PyObject*& value = as_fields(self)->values[field];
  if (!value) {
    if (field == kKind) {
      PyErr_SetString(PyExc_AttributeError, kNames[kKind]);
      return nullptr;
    }
    if (field == kSupplement || field == kParts) Py_RETURN_NONE;
    PyObject* made = field == kRemove ? PyList_New(0) : PyDict_New();
    if (!made) return nullptr;
    Py_XSETREF(value, made);
  }
  Py_INCREF(value);
  return value;
}

int set_field(PyObject* self, PyObject* value, void* which) {
  const intptr_t field = reinterpret_cast<intptr_t>(which);
  if (!value) {
    PyErr_Format(PyExc_AttributeError, "%s: a fix keeps all of its fields", kNames[field]);
    return -1;
  }
  Py_INCREF(value);
  Py_XSETREF(as_fields(self)->values[field], value);
  return 0;
}

// The seven fields, None for those that nobody has set or read.
PyObject* fields_given(PyObject* self, PyObject*) {
  PyObject* tuple = PyTuple_New(kFields);
  for (int i = 0; tuple && i < kFields; ++i) {
    PyObject* value = as_fields(self)->values[i] ? as_fields(self)->values[i] : Py_None;
    Py_INCREF(value);
    PyTuple_SET_ITEM(tuple, i, value);
  }
  return tuple;
}

// ---- JSON

bool append_text(std::string& json, PyObject* text) {
  if (!plain_text(text)) return false;
  json.append(1, '"').append(plain_view(text)).append(1, '"');
  return true;
}

bool append_number(std::string& json, PyObject* number) {
  if (PyFloat_CheckExact(number)) {
    char* digits = PyOS_double_to_string(PyFloat_AS_DOUBLE(number), 'r', 0, Py_DTSF_ADD_DOT_0, nullptr);
    if (!digits) return false;
    json += digits;
    PyMem_Free(digits);
    return true;
  }
  PyObject* digits = PyObject_Repr(number);
  if (digits) json += plain_view(digits);
  Py_XDECREF(digits);
  return digits != nullptr;
}

bool append_numbers(std::string& json, const char* field, PyObject* dict) {
  if (!dict || !PyDict_GET_SIZE(dict)) return true;
  json.append(",\"").append(field).append("\":{");
  PyObject *name, *value;
  bool first = true;
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &name, &value); first = false) {
    if (!first) json += ',';
    if (!append_text(json, name)) return false;
    json += ':';
    if (!append_number(json, value)) return false;
  }
  json += '}';
  return true;
}

// What Fix.to_json gives for a usual fix whose names need no escapes; None for others.
PyObject* fields_json(PyObject* self, PyObject*) {
  const FixFields& fix = *as_fields(self);
  if (!usual(fix)) Py_RETURN_NONE;
  try {
    PyObject* kind = PyObject_GetAttrString(fix.values[kKind], "_value_");
    std::string json = "{\"fix_type\":";
    const bool done = kind && append_text(json, kind) && append_numbers(json, kNames[kAdd], fix.values[kAdd]) &&
                      append_numbers(json, kNames[kAdjust], fix.values[kAdjust]);
    Py_XDECREF(kind);
    json += '}';
    if (done) return PyUnicode_FromStringAndSize(json.data(), Py_ssize_t(json.size()));
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

// ---- the type

PyObject* fields_usual(PyObject* self, PyObject*) { return PyBool_FromLong(usual(*as_fields(self))); }

#define FIELD(i) {kNames[i], get_field, set_field, nullptr, reinterpret_cast<void*>(intptr_t(i))}
PyGetSetDef properties[] = {FIELD(0), FIELD(1), FIELD(2), FIELD(3), FIELD(4), FIELD(5), FIELD(6), {}};
#undef FIELD

PyMethodDef methods[] = {
    {"_given", fields_given, METH_NOARGS, nullptr},
    {"_json", fields_json, METH_NOARGS, nullptr},
    {"_usual", fields_usual, METH_NOARGS, nullptr},
    {},
};
const char kDoc[] =
    "FixFields(fix_type, elements_to_add={}, elements_to_remove=[], value_adjustments={}, category_moves={}, "
    "definition_supplement=None, decomposition=None)\n--\n\n";
PyType_Slot slots[] = {
    {Py_tp_doc, const_cast<char*>(kDoc)},
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_init, reinterpret_cast<void*>(fields_init)},
    {Py_tp_dealloc, reinterpret_cast<void*>(fields_dealloc)},
    {Py_tp_getset, properties},
    {Py_tp_methods, methods},
    {0, nullptr},
};
PyType_Spec spec = {"fastmem._registry.FixFields", sizeof(FixFields), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};

}  // namespace

PyObject* make_fix_fields_type() { return PyType_FromSpec(&spec); }

PyObject* set_fix_kind(PyObject*, PyObject* type) {
  if (!PyType_Check(type)) {
    PyErr_SetString(PyExc_TypeError, "expected a type");
    return nullptr;
  }
  Py_INCREF(type);
  Py_XSETREF(usual_kind, reinterpret_cast<PyTypeObject*>(type));
  Py_RETURN_NONE;
}

}  // namespace fastmem
