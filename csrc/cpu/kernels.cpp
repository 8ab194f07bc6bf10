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
#include "scale_columns.h"
#include "swiglu.h"
#include "vector.h"

namespace fastlora::FASTLORA_ISA {
namespace {

void narrow(const float* from, int64_t count, uint16_t* to) {
  BFloat16* numbers = reinterpret_cast<BFloat16*>(to);
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) store(numbers + i, load(from + i));
  if (i < count) store_some(numbers + i, load_some(from + i, count - i), count - i);
}

}  // namespace

#define FASTLORA_TEXT(name) #name
#define FASTLORA_NAME_OF(name) FASTLORA_TEXT(name)
extern const Kernels passes;
const Kernels passes = {
    FASTLORA_NAME_OF(FASTLORA_ISA), HAS_DOTS, false, draw, read_pass, add_pass, narrow, dropout, few_rows, few_rows_update, product_tiles, product,
    dequantise, few_rows_quantised, rms_norm, rms_norm_backward, swiglu, swiglu_backward, scale_columns, scale_columns_backward, dora_norm,
    QUERIES, attention_room, attention, attention_backward, attention_sum, rotary};

}  // namespace fastlora::FASTLORA_ISA
