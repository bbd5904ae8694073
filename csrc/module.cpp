// The Python module `kernels._native`. Importing it loads this library, and loading it registers the operations of
// torch.ops.keju (each file's TORCH_LIBRARY_FRAGMENT); the module itself is empty.

#include <Python.h>

PyMODINIT_FUNC PyInit__native() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_native", "Registers torch.ops.keju; holds nothing itself.", -1, nullptr, nullptr, nullptr, nullptr,
      nullptr};
  return PyModule_Create(&definition);
}
