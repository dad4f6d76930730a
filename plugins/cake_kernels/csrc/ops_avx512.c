#include "vec_avx512.h"

#include "table.h"
