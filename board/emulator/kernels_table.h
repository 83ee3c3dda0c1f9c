// A table whose float loops are compiled for the including file's instruction set.
#pragma once

#include "kernels_attention.h"
#include "kernels_float.h"

#define RKEMU_KERNELS(variable, name, integer_product)                       \
  extern const Kernels variable;                                             \
  const Kernels variable = {                                                 \
      name,     integer_product, float_product, quantize, dequantize, scale, \
      rms_norm, gelu_multiply,   softcap,       add,      attend,     to_half}
