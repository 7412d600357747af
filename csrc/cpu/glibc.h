// Included before every source file of the library (setup.py): keeps it free of symbols that glibc 2.28 does not have, so that what any newer
// Linux compiles runs on all systems of the tag manylinux_2_28.
#pragma once
#include <cmath>  // defines __GLIBC__

#if defined(__GLIBC__) && defined(__x86_64__)
// glibc 2.29 gave these a second version, which leaves errno alone. The values are the same.
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver log, log@GLIBC_2.2.5");
#if __GLIBC_MINOR__ >= 32
// glibc 2.32 tells libstdc++ here whether a process has one thread, whose shared_ptr then counts without atomic operations. 0: it may have more.
extern "C" __attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
#endif
#endif
