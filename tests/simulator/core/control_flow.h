// Where the paths of a branch meet again: its block's immediate post-dominator.
#pragma once

#include <vector>

#include "ptx.h"

namespace sim {

// Per instruction of the body that branches: the index where its paths reconverge, body.size() for
// the function's end, or -1 where they never do. Paths that end with exit, trap or, in an entry,
// with a return other than the last are left out: their lanes are gone and nobody waits for them.
std::vector<int> reconvergence(const ptx::Function& function);

}  // namespace sim
