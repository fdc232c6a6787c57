// No fixed point: int16 multiply-adds are no faster than fp32 here.
#pragma once
#define EDGECOLBERT_NO_FIXED_POINT
