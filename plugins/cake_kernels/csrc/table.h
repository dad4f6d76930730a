/* The body of every ops_*.c: the templates, then their table. The vectors are included before. */
#include "tile.h"

#include "dense.h"
#include "rows.h"

#include "attend.h"

const cake_ops ISA_OPS = {ISA_NAME, matmul_any, dense_BF16, quantize_, round_wide_, 4, rms_norm_, gate_, store_kv_, attend_, attend_rows_, LANES};
