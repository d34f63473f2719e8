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
#include "instr.h"
#include "narrow.h"
#include "sync.h"
#include "tensors.h"
#include "tpipe.h"
#if __has_include("half.h")
#include "half.h"
#endif
#if __has_include("vector.h")
#include "vector.h"
#endif
#if __has_include("moves.h")
#include "moves.h"
#endif
#if __has_include("cube.h")
#include "cube.h"
#endif
