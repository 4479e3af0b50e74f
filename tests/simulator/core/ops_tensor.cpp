// The tensor-core families: mma, ldmatrix, wgmma.
#include "program.h"

namespace sim {

void add_tensor(Decoders*) {}

}  // namespace sim
