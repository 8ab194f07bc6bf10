// The kernels of one instruction set. setup.py compiles this file once for each, with FASTLORA_ISA naming the namespace.
#include "kernels.h"

#include "adapter_passes.h"
#include "attention.h"
#include "dora_norm.h"
#include "dropout.h"
#include "few_rows.h"
#include "product.h"
#include "quantised.h"
#include "rms_norm.h"
#include "rotary.h"
#include "rows.h"
#include "scale_columns.h"
#include "swiglu.h"
#include "vector.h"

namespace fastlora::FASTLORA_ISA {
namespace {

template <class From, class To>
void convert(const From* from, int64_t count, To* to) {
  for_each_vector(count, [&](int64_t i, int64_t left) { store_up_to(to + i, load_up_to(from + i, left), left); });
}

void widen(Kind kind, const void* from, int64_t count, float* to) {
  with_kind(kind, [&](auto* of) { convert(static_cast<const std::remove_pointer_t<decltype(of)>*>(from), count, to); });
}

void narrow(Kind kind, const float* from, int64_t count, void* to) {
  with_kind(kind, [&](auto* of) { convert(from, count, static_cast<decltype(of)>(to)); });
}

}  // namespace

#define FASTLORA_TEXT(name) #name
#define FASTLORA_NAME_OF(name) FASTLORA_TEXT(name)
extern const Kernels passes;
const Kernels passes = {
    FASTLORA_NAME_OF(FASTLORA_ISA), HAS_DOTS, false, draw, read_pass, add_pass, pack, pack_pairs, turn, widen, narrow, dropout, few_rows, few_rows_update, product_tiles,
    product, dequantise, few_rows_quantised, rms_norm, rms_norm_backward, swiglu, swiglu_backward, scale_columns, scale_columns_backward, dora_norm,
    QUERIES, attention_room, attention, attention_backward, attention_sum, rotary};

}  // namespace fastlora::FASTLORA_ISA
