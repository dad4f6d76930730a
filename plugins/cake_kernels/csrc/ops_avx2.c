#include "vec_avx2.h"

#include "table.h"
