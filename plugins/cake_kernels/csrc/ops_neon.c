#include "vec_neon.h"

#include "table.h"
