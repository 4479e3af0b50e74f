#include "ops_tensor.h"
namespace sim { void add_wgmma(Decoders*) {} }
