/* An empty Python module: importing it loads the library, which registers its operator with torch. */
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", NULL, -1, NULL, NULL, NULL, NULL, NULL};
  PyObject* module = PyModule_Create(&definition);
  if (module != NULL) {
    /* For which GPUs it was compiled, as "80;90a;100", and of which sources: see setup.py. */
    PyModule_AddStringConstant(module, "ARCHITECTURES", TINYDROP_ARCHITECTURES);
    PyModule_AddStringConstant(module, "SOURCES", TINYDROP_SOURCES);
  }
  return module;
}
