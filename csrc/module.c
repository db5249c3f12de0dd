/* A Python module without functions. Importing it loads the library, which registers its operator with torch. */
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", NULL, -1, NULL, NULL, NULL, NULL, NULL};
  PyObject* module = PyModule_Create(&definition);
  if (module != NULL) {
    /* The GPU architectures it was compiled for, such as "80;90a;100", and the hash of its sources (see setup.py). */
    PyModule_AddStringConstant(module, "ARCHITECTURES", TINYDROP_ARCHITECTURES);
    PyModule_AddStringConstant(module, "SOURCES", TINYDROP_SOURCES);
  }
  return module;
}
