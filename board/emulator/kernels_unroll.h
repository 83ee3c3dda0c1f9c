// Before a loop over vectors that must stay in registers: only loops that are gone before the
// compiler places its variables allow that.
#pragma once
#define RKEMU_UNROLL _Pragma("GCC unroll 16")
