// To be put before a loop over vectors that must stay in registers, which is possible only if the
// compiler unrolls the loop before it places its variables.
#pragma once
#define RKEMU_UNROLL _Pragma("GCC unroll 16")
