/* The operations that take most of a small model's step on a CPU: one library, one file for each subject.
 *
 * All arithmetic is in fp32; the kernels round to a half format where half kernels would. NaN and infinity propagate as in torch's
 * operations. glm/precision/kernel.py compiles the library at first use, with the system's C compiler; threads are torch's own
 * OpenMP pool.
 */
#include "product.h"
#include "half.h"

#include "attention.h"
#include "feed_forward.h"
#include "losses.h"
