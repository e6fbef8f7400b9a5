// The decoding step in f32: a file a type, since each is compiled for the device when it is first used.

#include "decode.cuh"

TYPE(f32)
