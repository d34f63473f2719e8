// The vector instructions.
//
// Where the behaviour of the hardware is not known (partial overlap, integer overflow, masked
// result bits) an instruction faults, so that no kernel comes to depend on a guess. Values are
// exact in the sense of vector_math.h; the hardware approximates Exp, Ln, Sqrt, Reciprocal and Div.
#pragma once

#include "half.h"
#include "vector_arithmetic.h"
#include "vector_cast.h"
#include "vector_compare.h"
#include "vector_fill.h"
#include "vector_gather.h"
#include "vector_reduce.h"
#include "vector_reduce_all.h"
#include "vector_sort.h"
