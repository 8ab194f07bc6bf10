// Dropout of a whole activation, for where torch multiplies it (fastlora/frozen/composed.py). The equation is fastlora/reference.py::dropout, its bits
// are draw_keep's.
#include <torch/csrc/stable/library.h>

#include "adapters.h"
#include "new_tensor.h"

namespace fastlora {
namespace {

constexpr int64_t WORK = 4;  // of an element, beside an addition's: what is drawn costs more than what is read

Dropout task_of(const Tensor& x, double p, const Tensor& y) {
  STD_TORCH_CHECK(p >= 0 && p <= 1, "p: got ", p, ", expected a probability between 0 and 1");
  const Drop drop = drop_of(p);
  Dropout task{};
  task.kind = kind_of(x);
  task.width = x.size(1);
  task.x = x.const_data_ptr();
  task.x_stride = x.stride(0);
  task.keep_stride = keep_bytes(x.size(1));
  task.threshold = drop.threshold;
  task.factor = drop.factor;
  task.y = y.mutable_data_ptr();
  task.y_stride = y.stride(0);
  return task;
}

void check_rows(const Tensor& x) {
  check_cpu(x, "x");
  check(x, "x", {ANY, ANY}, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, x);
}

/// The bits without gaps, of a task that reads them.
Tensor checked_keep(const Tensor& keep, const Tensor& x) {
  check(keep, "keep", {x.size(0), keep_bytes(x.size(1))}, {ScalarType::Byte}, x);
  return dense(keep);
}

void run(const Dropout& task, int64_t rows) {
  torch::stable::parallel_for(0, rows, GRAIN / (WORK * task.width + 1) + 1, [&](int64_t begin, int64_t end) {
    kernels().dropout(task, begin, end);
  });
}

std::tuple<Tensor, Tensor> draw_dropout_cpu(const Tensor& x, double p, const Tensor& seed) {
  check_rows(x);
  check_seed(seed, 1, x);
  const Tensor rows = with_dense_rows(x), y = new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type());
  const Tensor keep = new_tensor(x, {x.size(0), keep_bytes(x.size(1))}, ScalarType::Byte);
  Dropout task = task_of(rows, p, y);
  task.keep = static_cast<uint8_t*>(keep.mutable_data_ptr());
  task.draws = true;
  task.seed = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  run(task, x.size(0));
  return {y, keep};
}

Tensor dropout_cpu(const Tensor& x, double p, const Tensor& keep) {
  check_rows(x);
  const Tensor rows = with_dense_rows(x), bits = checked_keep(keep, x), y = new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type());
  Dropout task = task_of(rows, p, y);
  task.keep = static_cast<uint8_t*>(bits.mutable_data_ptr());
  run(task, x.size(0));
  return y;
}

void add_dropout_cpu(const Tensor& y, const Tensor& x, double p, const Tensor& keep) {
  check_rows(x);
  check(y, "y", {x.size(0), x.size(1)}, {x.scalar_type()}, x);
  STD_TORCH_CHECK(y.size(1) <= 1 || y.stride(1) == 1, "y: got rows with gaps, expected rows that lie together");
  const Tensor rows = with_dense_rows(x), bits = checked_keep(keep, x);
  Dropout task = task_of(rows, p, y);
  task.keep = static_cast<uint8_t*>(bits.mutable_data_ptr());
  task.adds = true;
  run(task, x.size(0));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("draw_dropout_cpu", TORCH_BOX(&draw_dropout_cpu));
  m.impl("dropout_cpu", TORCH_BOX(&dropout_cpu));
  m.impl("add_dropout_cpu", TORCH_BOX(&add_dropout_cpu));
}

}  // namespace fastlora
