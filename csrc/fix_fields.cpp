// A registry holds many fixes, most of which say one thing: a field that was never set nor read takes no object of its
// own, and Python's collector of cycles is spared them.
#include <cfloat>
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

PyTypeObject *usual_type, *usual_kind;  // Fix and FixType

FixFields* as_fields(PyObject* self) { return reinterpret_cast<FixFields*>(self); }

// An int as a float; NaN where it is too large, or would be but for the rounding.
double rounded(PyObject* integer) {
  const double number = PyLong_AsDouble(integer);
  if (number == -1.0 && PyErr_Occurred()) return PyErr_Clear(), NAN;
  return std::abs(number) < DBL_MAX ? number : NAN;
}

// A dict of finite numbers by text, and of none of their subclasses.
bool numbers(PyObject* dict) {
  if (!dict) return true;
  if (!PyDict_CheckExact(dict)) return false;
  PyObject *name, *value;
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &name, &value);) {
    if (!PyUnicode_CheckExact(name)) return false;
    double number = NAN;
    if (PyFloat_CheckExact(value)) number = PyFloat_AS_DOUBLE(value);
    else if (PyLong_CheckExact(value)) number = rounded(value);
    if (!std::isfinite(number)) return false;
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

// Numbers by text make no cycle, so Python's collector need not walk through a usual fix. A subclass may hold more.
void track(PyObject* self, bool is_usual) {
  const bool needed = !is_usual || Py_TYPE(self) != usual_type;
  if (needed == bool(PyObject_GC_IsTracked(self))) return;
  needed ? PyObject_GC_Track(self) : PyObject_GC_UnTrack(self);
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
  const bool is_usual = usual(*as_fields(self));
  track(self, is_usual);
  if (is_usual && Py_TYPE(self) == usual_type) return 0;
  PyObject* checked = PyObject_CallMethod(self, "__post_init__", nullptr);
  Py_XDECREF(checked);
  return checked ? 0 : -1;
}

int fields_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  for (PyObject* value : as_fields(self)->values) Py_VISIT(value);
  return 0;
}

int fields_clear(PyObject* self) {
  for (PyObject*& value : as_fields(self)->values) Py_CLEAR(value);
  return 0;
}

void fields_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  for (PyObject* value : as_fields(self)->values) Py_XDECREF(value);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* get_field(PyObject* self, void* which) {
  const Field field = Field(reinterpret_cast<intptr_t>(which));
  PyObject*& value = as_fields(self)->values[field];
  if (!value) {
    if (field == kKind) {
      PyErr_SetString(PyExc_AttributeError, "fix_type: this fix was never given one");
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
  track(self, usual(*as_fields(self)));
  return 0;
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
  if (Py_TYPE(self) != usual_type || !usual(fix)) Py_RETURN_NONE;
  PyObject* kind = PyObject_GetAttrString(fix.values[kKind], "_value_");
  if (!kind || !usual(fix)) {  // that may have run anything
    Py_XDECREF(kind);
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  try {
    std::string json = "{\"fix_type\":";
    const bool done = append_text(json, kind) && append_numbers(json, kNames[kAdd], fix.values[kAdd]) &&
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
    {Py_tp_traverse, reinterpret_cast<void*>(fields_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(fields_clear)},
    {Py_tp_getset, properties},
    {Py_tp_methods, methods},
    {0, nullptr},
};
PyType_Spec spec = {"fastmem._registry.FixFields", sizeof(FixFields), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, slots};

}  // namespace

// Its `__slots__` say to dataclasses, copy and pickle what Python's own would.
PyObject* make_fix_fields_type() {
  PyObject* type = PyType_FromSpec(&spec);
  PyObject* names = PyTuple_New(kFields);
  bool done = type && names;
  for (int i = 0; done && i < kFields; ++i) {
    PyObject* name = PyUnicode_InternFromString(kNames[i]);
    done = name != nullptr;
    PyTuple_SET_ITEM(names, i, name);
  }
  done = done && PyObject_SetAttrString(type, "__slots__", names) == 0;
  Py_XDECREF(names);
  if (!done) Py_CLEAR(type);
  return type;
}

// set_fix_kinds(Fix, FixType): what a usual fix is, and what its type is.
PyObject* set_fix_kinds(PyObject*, PyObject* arguments) {
  PyObject *fix, *kind;
  if (!PyArg_ParseTuple(arguments, "O!O!", &PyType_Type, &fix, &PyType_Type, &kind)) return nullptr;
  Py_INCREF(fix);
  Py_INCREF(kind);
  Py_XSETREF(usual_type, reinterpret_cast<PyTypeObject*>(fix));
  Py_XSETREF(usual_kind, reinterpret_cast<PyTypeObject*>(kind));
  Py_RETURN_NONE;
}

}  // namespace fastmem
