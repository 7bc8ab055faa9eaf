/* What a small model's step spends its time on, on a CPU: one library, a subject a file.
 *
 * All arithmetic is in fp32; half formats are rounded to where half kernels would. NaN and infinity go through as they do in the torch
 * operations. Compiled at first use by the system's C compiler (glm/precision/kernel.py); threads are torch's own OpenMP pool.
 */
#include "product.h"
#include "half.h"

#include "attention.h"
#include "feed_forward.h"
#include "losses.h"
