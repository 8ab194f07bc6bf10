// out = softmax(scale q kᵀ) v within segments of tokens, where heads of queries share heads of keys, and its gradients; computed in float32. The
// equations are fastlora/reference.py::attention and attention_backward.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "adapters.h"
#include "memory.h"

namespace fastlora {
namespace {

constexpr std::initializer_list<ScalarType> DTYPES = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

Tensor with_dense_heads(const Tensor& x) { return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x); }

/// Arguments that have been checked, and hold what the task points to.
struct Given {
  Tensor q, k, v;
  std::vector<int64_t> starts;
  Attention task;

  Given(const Tensor& queries, const Tensor& keys, const Tensor& values, const Tensor& segments, double scale, bool causal)
      : q(queries), k(keys), v(values) {
    check_cpu(q, "q");
    check(q, "q", {ANY, ANY, ANY}, DTYPES, q);
    check(k, "k", {q.size(0), ANY, q.size(2)}, {q.scalar_type()}, q);
    check(v, "v", {q.size(0), k.size(1), q.size(2)}, {q.scalar_type()}, q);
    STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "k: got ", describe(k), ", expected heads that divide the ", q.size(1), " of q");
    check(segments, "starts", {ANY}, {ScalarType::Long}, q);
    const Tensor dense = torch::stable::contiguous(segments);
    const int64_t* first = static_cast<const int64_t*>(dense.const_data_ptr());
    starts.assign(first, first + dense.numel());
    const bool whole = !starts.empty() && starts.front() == 0 && starts.back() == q.size(0) && std::is_sorted(starts.begin(), starts.end());
    STD_TORCH_CHECK(whole, "starts: expected ascending numbers from 0 to the ", q.size(0), " tokens of q");
    q = with_dense_heads(q), k = with_dense_heads(k), v = with_dense_heads(v);
    task = {
        kind_of(q), q.size(1), k.size(1), q.size(2), static_cast<float>(scale), causal, q.const_data_ptr(), {q.stride(0), q.stride(1)},
        k.const_data_ptr(), {k.stride(0), k.stride(1)}, v.const_data_ptr(), {v.stride(0), v.stride(1)}};
  }

  /// Calls body(begin, end, head of keys, room) for every segment and head: each thread has as good as the same share of the work.
  template <class Body>
  void for_each_part(bool backward, const Body& body) const {
    const int64_t segments = static_cast<int64_t>(starts.size()) - 1, parts = segments * task.kv_heads;
    const auto tokens = [&](int64_t part) { return starts[part / task.kv_heads + 1] - starts[part / task.kv_heads]; };
    int64_t longest = 0, work = 0;
    for (int64_t part = 0; part < parts; ++part) longest = std::max(longest, tokens(part)), work += tokens(part) * tokens(part);
    const int64_t room = kernels().attention_room(longest, task.width, backward);
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), work * task.heads * task.width / GRAIN + 1);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      const Memory memory(room * sizeof(float));
      int64_t before = 0;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t count = tokens(part), own = count * count, thread = (2 * before + own) * threads / (2 * work + 1);
        before += own;
        if (count == 0 || thread < first || thread >= last) continue;
        const int64_t begin = starts[part / task.kv_heads];
        body(begin, begin + count, part % task.kv_heads, memory.as<float>());
      }
    });
  }
};

Tensor new_like(const Tensor& x) { return torch::stable::new_empty(x, std::array<int64_t, 3>{x.size(0), x.size(1), x.size(2)}); }

std::tuple<Tensor, Tensor> attention_cpu(
    const Tensor& q,       // [T, H, D]
    const Tensor& k,       // [T, a divisor of H, D]
    const Tensor& v,
    const Tensor& starts,  // [segments + 1] int64
    double scale, bool causal) {
  Given given(q, k, v, starts, scale, causal);
  const Tensor out = new_like(q), lse = torch::stable::new_empty(q, std::array<int64_t, 2>{q.size(0), q.size(1)}, ScalarType::Float);
  given.task.out = out.mutable_data_ptr();
  given.task.lse = floats(lse);
  given.for_each_part(false, [&](int64_t begin, int64_t end, int64_t head, float* room) { kernels().attention(given.task, begin, end, head, room); });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& dout,  // [T, H, D]
    const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out,  // the forward's, as lse [T, H] float32
    const Tensor& lse, const Tensor& starts, double scale, bool causal) {
  Given given(q, k, v, starts, scale, causal);
  check(dout, "dout", {q.size(0), q.size(1), q.size(2)}, {q.scalar_type()}, q);
  check(out, "out", {q.size(0), q.size(1), q.size(2)}, {q.scalar_type()}, q);
  check(lse, "lse", {q.size(0), q.size(1)}, {ScalarType::Float}, q);
  const Tensor gradient = torch::stable::contiguous(dout), result = torch::stable::contiguous(out), sums = torch::stable::contiguous(lse);
  const Tensor dq = new_like(q), dk = new_like(k), dv = new_like(v);
  given.task.dout = gradient.const_data_ptr();
  given.task.out = result.mutable_data_ptr();
  given.task.lse = floats(sums);
  given.task.dq = dq.mutable_data_ptr();
  given.task.dk = dk.mutable_data_ptr();
  given.task.dv = dv.mutable_data_ptr();
  given.for_each_part(true, [&](int64_t begin, int64_t end, int64_t head, float* room) {
    kernels().attention_backward(given.task, begin, end, head, room);
  });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("attention_cpu", TORCH_BOX(&attention_cpu));
  m.impl("attention_backward_cpu", TORCH_BOX(&attention_backward_cpu));
}

}  // namespace fastlora
