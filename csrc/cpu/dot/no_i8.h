// No int8 multiply-adds that are faster than fp32 here.
#pragma once
#define EDGECOLBERT_NO_INT8
