// The wide kernels, which every kind of projection shares: from rows to lanes, from lanes to rows,
// and the gradients of the wide factors.
#pragma once

#include "contract.h"
#include "expand.h"
#include "weight_grad.h"
