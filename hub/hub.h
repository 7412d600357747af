// Included first by every source file in build/hub: what setup.py gives to the compiler by options.
#pragma once
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")  // not an option of kernel-builder, which gives the same ones to ARM
#endif
#define FASTFF_MODULE TORCH_EXTENSION_NAME
#include "glibc.h"
