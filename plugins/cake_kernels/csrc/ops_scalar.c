#include "vec_scalar.h"

#include "table.h"
