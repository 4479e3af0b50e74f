// mma.sync. PTX ISA, "Matrix multiply-accumulate operation using mma instruction".
#include "ops_arithmetic.h"
#include "ops_tensor.h"

namespace sim {
namespace {

// ops: d, a, b, c; aux: .satfinite.
template <class A, class B, int K, class Sum>
void mma(Warp& w, const Instr& i, uint32_t mask) {
  need_whole_warp(mask);
  constexpr int kHalves = K * A::kBytes / 16;
  const Ref *a_refs = i.ops + Sum::kRegisters, *b_refs = a_refs + 2 * kHalves;
  TileA<K> a;
  TileB<K> b;
  TileC c;
  read_a<A, K>(w, a_refs, a);
  read_b<B, K>(w, b_refs, b);
  Sum::read(w, b_refs + kHalves, c);
  Sum::template multiply<K, 16 / A::kBytes>(a, b, c);
  Sum::write(w, i.ops, c, i.aux != 0);
}

struct Variant {
  const char *shape, *d, *a, *b;
  int target;
  Exec exec;
};

const Variant kVariants[] = {
    {"m16n8k8", "f32", "f16", "f16", 75, mma<F16, F16, 8, SumF32>},
    {"m16n8k8", "f16", "f16", "f16", 75, mma<F16, F16, 8, SumF16>},
    {"m16n8k16", "f32", "f16", "f16", 80, mma<F16, F16, 16, SumF32>},
    {"m16n8k16", "f16", "f16", "f16", 80, mma<F16, F16, 16, SumF16>},
    {"m16n8k8", "f32", "bf16", "bf16", 80, mma<Bf16, Bf16, 8, SumF32>},
    {"m16n8k16", "f32", "bf16", "bf16", 80, mma<Bf16, Bf16, 16, SumF32>},
    {"m16n8k4", "f32", "tf32", "tf32", 80, mma<Tf32, Tf32, 4, SumF32>},
    {"m16n8k8", "f32", "tf32", "tf32", 80, mma<Tf32, Tf32, 8, SumF32>},
    {"m16n8k16", "s32", "s8", "s8", 80, mma<S8, S8, 16, SumS32>},
    {"m16n8k16", "s32", "s8", "u8", 80, mma<S8, U8, 16, SumS32>},
    {"m16n8k16", "s32", "u8", "s8", 80, mma<U8, S8, 16, SumS32>},
    {"m16n8k16", "s32", "u8", "u8", 80, mma<U8, U8, 16, SumS32>},
    {"m16n8k32", "s32", "s8", "s8", 80, mma<S8, S8, 32, SumS32>},
    {"m16n8k32", "s32", "s8", "u8", 80, mma<S8, U8, 32, SumS32>},
    {"m16n8k32", "s32", "u8", "s8", 80, mma<U8, S8, 32, SumS32>},
    {"m16n8k32", "s32", "u8", "u8", 80, mma<U8, U8, 32, SumS32>},
    {"m16n8k32", "f32", "e4m3", "e4m3", 89, mma<E4m3, E4m3, 32, SumF32>},
    {"m16n8k32", "f32", "e4m3", "e5m2", 89, mma<E4m3, E5m2, 32, SumF32>},
    {"m16n8k32", "f32", "e5m2", "e4m3", 89, mma<E5m2, E4m3, 32, SumF32>},
    {"m16n8k32", "f32", "e5m2", "e5m2", 89, mma<E5m2, E5m2, 32, SumF32>},
};

// mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
const Variant& variant(const ptx::Instruction& i) {
  std::vector<std::string> m = i.modifiers;
  std::erase(m, "satfinite");
  if (m.size() != 9 || m[0] != "sync" || m[1] != "aligned" || m[3] != "row" || m[4] != "col") {
    unknown(i);
  }
  for (const Variant& v : kVariants) {
    if (m[2] == v.shape && m[5] == v.d && m[6] == v.a && m[7] == v.b && m[8] == v.d) return v;
  }
  unknown(i);
}

void decode_mma(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  const Variant& v = variant(i);
  if (a.target() < v.target) {
    fault(Kind::kUnsupported, -1, i.text(), " needs sm_", v.target);
  }
  if (i.has("satfinite") && v.d != std::string("s32")) unknown(i);
  const int k = std::stoi(std::string(v.shape).substr(6));
  const bool narrow = v.a[1] == '8' || v.a[0] == 'e';
  const int halves = k * (narrow ? 1 : v.a[0] == 't' ? 4 : 2) / 16;
  const int sums = v.d == std::string("f16") ? 2 : 4;
  const int expected[] = {sums, 2 * halves, halves, sums};
  std::vector<Ref> refs;
  for (size_t o = 0; o < 4; ++o) {
    const ptx::Operand& operand = i.operands.at(o);
    const bool vector = operand.form == ptx::Operand::kVector;
    const std::vector<ptx::Operand> parts =
        vector ? operand.parts : std::vector<ptx::Operand>{operand};
    if (static_cast<int>(parts.size()) != expected[o]) {
      fault(Kind::kUnsupported, -1, i.text(), ": operand ", o, " has ", parts.size(),
            " registers, takes ", expected[o]);
    }
    for (const ptx::Operand& p : parts) {
      refs.push_back(o == 0 ? a.write(p, 32) : a.read(p, 32, "f32"));
    }
  }
  instr->aux = i.has("satfinite");
  instr->exec = v.exec;
  instr->klass = Class::kTensor;
  instr->mma_flops = static_cast<uint32_t>(2 * 16 * 8 * k);
  a.set_ops(instr, refs);
}

}  // namespace

void add_mma(Decoders* decoders) { (*decoders)["mma"] = decode_mma; }

}  // namespace sim
