// Data movement between global memory, UB, L1 and the stores of the cube.
#pragma once

#include "moves_copy.h"
#include "moves_fixpipe.h"
#include "moves_load.h"
#include "moves_nd2nz.h"
#include "moves_pad.h"
