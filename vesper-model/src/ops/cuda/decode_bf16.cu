// The decoding step in bf16: a file a type, since each is compiled for the device when it is first used.

#include "decode.cuh"

TYPE(bf16)
