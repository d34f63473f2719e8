// The header a generated kernel includes. On the host it brings the emulator instead of the device.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__
#define __aicore__
#define __gm__
#define __ubuf__
#define __vector__
#define __cube__
#define __mix__(cube_cores, vector_cores)
#define GM_ADDR uint8_t*

#define ASCEND_IS_AIC (::AscendC::emulator::core().cube)
#define ASCEND_IS_AIV (!::AscendC::emulator::core().cube)
#define KERNEL_TASK_TYPE_DEFAULT(kind) ::AscendC::emulator::declare_kind(::AscendC::kind)

#include "carve.h"
#include "cross.h"
#include "cube.h"
#include "half.h"
#include "instr.h"
#include "moves.h"
#include "narrow.h"
#include "sync.h"
#include "tensors.h"
#include "tpipe.h"
#include "vector.h"

// The device compiler knows the pipes without a namespace.
using AscendC::pipe_t;
using AscendC::PIPE_ALL;
using AscendC::PIPE_FIX;
using AscendC::PIPE_M;
using AscendC::PIPE_MTE1;
using AscendC::PIPE_MTE2;
using AscendC::PIPE_MTE3;
using AscendC::PIPE_S;
using AscendC::PIPE_V;
