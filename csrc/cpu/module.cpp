// An empty Python module, fastff._C_baseline, _C_avx2 or _C_avx512 (setup.py). Importing it runs the static initialisers of the other files, which
// register the operators of the namespace fastff. Limited API (3.10+), stable libtorch ABI (2.10+): one binary for all later ones.

#include <Python.h>

#define FASTFF_JOIN(a, b) a##b
#define FASTFF_INIT(name) FASTFF_JOIN(PyInit_, name)
#define FASTFF_TEXT(name) FASTFF_STRING(name)
#define FASTFF_STRING(name) #name

extern "C" PyMODINIT_FUNC FASTFF_INIT(FASTFF_MODULE)(void) {
  static struct PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, FASTFF_TEXT(FASTFF_MODULE), nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
