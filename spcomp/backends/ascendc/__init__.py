"""The AscendC target: kernels for Ascend A2 and A3, checked on the host by an emulator."""
