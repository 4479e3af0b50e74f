// The tensor-core families: mma, ldmatrix, wgmma.
#include "ops_tensor.h"

namespace sim {

void add_tensor(Decoders* decoders) {
  add_mma(decoders);
  add_ldmatrix(decoders);
  add_wgmma(decoders);
}

}  // namespace sim
