// Whether what a plan was read from is as it was: fastlora/peft/known.py. Python's own objects, looked at where they lie, in a tenth of Python's time.
#pragma once

#include <Python.h>

namespace fastlora {

/// Whether body is true of each `width` items of the tuple one after the other.
template <class Body>
bool all_of(PyObject* tuple, Py_ssize_t width, const Body& body) {
  const Py_ssize_t count = PyTuple_GET_SIZE(tuple);
  for (Py_ssize_t i = 0; i + width <= count; i += width) {
    if (!body(&PyTuple_GET_ITEM(tuple, i))) return false;
  }
  return true;
}

/// The dictionary's item is the value, or is missing where the value is the tuple's own mark, None's type.
inline bool has_item(PyObject** one) {
  PyObject* found = PyDict_GetItemWithError(one[0], one[1]);
  return found ? found == one[2] : one[2] == reinterpret_cast<PyObject*>(Py_TYPE(Py_None)) && !PyErr_Occurred();
}

inline bool has_type(PyObject** one) { return reinterpret_cast<PyObject*>(Py_TYPE(one[0])) == one[1]; }

inline bool is_empty(PyObject** one) { return PyDict_Check(one[0]) ? PyDict_GET_SIZE(one[0]) == 0 : PyList_GET_SIZE(one[0]) == 0; }

/// The list's items are the tuple's.
inline bool has_items(PyObject** one) {
  PyObject *list = one[0], *items = one[1];
  if (PyList_GET_SIZE(list) != PyTuple_GET_SIZE(items)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items); ++i) {
    if (PyList_GET_ITEM(list, i) != PyTuple_GET_ITEM(items, i)) return false;
  }
  return true;
}

/// The object's attribute is the value, or equals it: dtypes and flags are one object each, shapes and devices are made anew.
inline bool has_attribute(PyObject** one) {
  PyObject* found = PyObject_GetAttr(one[0], one[1]);
  if (!found) return false;
  const int equal = found == one[2] ? 1 : PyObject_RichCompareBool(found, one[2], Py_EQ);
  Py_DECREF(found);
  return equal == 1;
}

/// unchanged(items, types, empty, lists, attributes): each a tuple of the arguments of one of the above, one after the other.
inline PyObject* unchanged(PyObject*, PyObject* const* state, Py_ssize_t count) {
  bool same = count == 5;
  for (Py_ssize_t i = 0; same && i < count; ++i) same = PyTuple_Check(state[i]);
  if (!same) {
    PyErr_SetString(PyExc_TypeError, "state: expected five tuples");
    return nullptr;
  }
  same = all_of(state[0], 3, has_item) && all_of(state[1], 2, has_type) && all_of(state[2], 1, is_empty) && all_of(state[3], 2, has_items) &&
         all_of(state[4], 3, has_attribute);
  PyErr_Clear();  // an attribute that is gone, a comparison that fails: it is not as it was
  return PyBool_FromLong(same);
}

}  // namespace fastlora
