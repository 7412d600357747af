// fastff._C: an empty Python module. Importing it runs the static initialisers of the other files, which register
// the operators of the namespace fastff. Limited API (3.10+), stable libtorch ABI (2.10+): one binary for all later ones.

#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
