// out = softmax(scale q kᵀ) v within segments of tokens and over their ancestors, where heads of queries share heads of keys, and its gradients;
// computed in float32. The equations are fastlora/reference.py::attention and attention_backward.
//
// The work is cut into parts, which threads take one after the other, the greatest first. A part is a segment, or some that have the same parent, so
// that the keys of their ancestors are widened once for all of them; or queries of a segment that is a great share of the whole. The gradients of keys
// that several parts see are float32 sums of a part each, which are added at the end. How it is cut depends on the segments alone, and never on the
// threads; so does the order of every sum.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <numeric>
#include <optional>
#include <vector>

#include "adapters.h"
#include "memory.h"

namespace fastlora {
namespace {

constexpr std::initializer_list<ScalarType> DTYPES = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

Tensor with_dense_heads(const Tensor& x) { return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x); }

using Numbers = std::vector<int64_t>;

Numbers numbers_of(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  const int64_t* first = static_cast<const int64_t*>(dense.const_data_ptr());
  return Numbers(first, first + dense.numel());
}

void check_ascent(const Numbers& starts, const char* name, int64_t count, const char* what) {
  const bool whole = !starts.empty() && starts.front() == 0 && starts.back() == count && std::is_sorted(starts.begin(), starts.end());
  STD_TORCH_CHECK(whole, name, ": expected ascending numbers from 0 to the ", count, " ", what);
}

/// Segments of queries and keys, each with its parent or -1.
struct Tree {
  Numbers queries, keys, parents;

  Tree() = default;
  Tree(const Tensor& q, const Tensor& k, const Tensor& starts, const std::optional<Tensor>& segment_parents, const std::optional<Tensor>& key_starts) {
    check(starts, "starts", {ANY}, {ScalarType::Long}, q);
    queries = numbers_of(starts);
    check_ascent(queries, "starts", q.size(0), "tokens of q");
    if (key_starts) {
      check(*key_starts, "key_starts", {starts.size(0)}, {ScalarType::Long}, q);
      keys = numbers_of(*key_starts);
      check_ascent(keys, "key_starts", k.size(0), "rows of k");
    } else {
      keys = queries;
    }
    if (segment_parents) {
      check(*segment_parents, "segment_parents", {segments()}, {ScalarType::Long}, q);
      parents = numbers_of(*segment_parents);
    } else {
      parents.assign(segments(), -1);
    }
    for (int64_t i = 0; i < segments(); ++i) {
      const bool fits = query_count(i) == 0 || query_count(i) == key_count(i);
      STD_TORCH_CHECK(fits, "key_starts: got ", key_count(i), " keys in segment ", i, ", expected as many as its ", query_count(i), " queries");
      const bool earlier = parents[i] >= -1 && parents[i] < i;
      STD_TORCH_CHECK(earlier, "segment_parents: got ", parents[i], " of segment ", i, ", expected an earlier segment's number, or -1");
    }
  }

  int64_t segments() const { return static_cast<int64_t>(queries.size()) - 1; }
  int64_t query_count(int64_t segment) const { return queries[segment + 1] - queries[segment]; }
  int64_t key_count(int64_t segment) const { return keys[segment + 1] - keys[segment]; }

  /// The eldest first.
  Numbers ancestors(int64_t segment) const {
    Numbers found;
    for (int64_t one = parents[segment]; one >= 0; one = parents[one]) {
      if (key_count(one) > 0) found.push_back(one);
    }
    std::reverse(found.begin(), found.end());
    return found;
  }
};

/// What one thread computes alone, for each head of keys.
struct Part {
  int64_t work;  // pairs of a query and a key
  std::vector<AttentionKeys> ancestors;
  std::vector<AttentionQueries> queries;

  AttentionPart view() const {
    return {ancestors.data(), static_cast<int64_t>(ancestors.size()), queries.data(), static_cast<int64_t>(queries.size())};
  }
};

/// Of all segments with queries.
class Parts {
 public:
  static constexpr int64_t ENOUGH = 256;  // queries of a part: beside them, to widen the keys and to add up the shares costs little
  static constexpr int64_t SHARES = 8;    // that siblings are joined to, whose ancestors' gradients take memory for each; some more where ends are left
  static constexpr int64_t RANGES = 4;    // that a segment is cut into, if
  static constexpr int64_t LARGE = 16;    // it is more than this share of all

  std::vector<Part> all;
  int64_t work = 0;  // for a head of keys

  Parts(const Tree& tree, int64_t heads, int64_t kv_heads, bool causal) : tree_(tree), causal_(causal) {
    join(heads / kv_heads);
    for (const Part& part : all) work += part.work;
    std::vector<Part> cut;
    for (Part& part : all) {
      const int64_t ranges = std::min(RANGES, part.queries.front().count / ENOUGH);
      if (ranges < 2 || part.queries.size() > 1 || part.work * LARGE <= work * kv_heads) {
        cut.push_back(std::move(part));
      } else {
        cut_into(ranges, part, cut);
      }
    }
    all = std::move(cut);
  }

 private:
  const Tree& tree_;
  bool causal_;

  /// Siblings together, until they have enough queries.
  void join(int64_t group) {
    Numbers order;
    for (int64_t i = 0; i < tree_.segments(); ++i) {
      if (tree_.query_count(i) > 0) order.push_back(i);
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return tree_.parents[a] < tree_.parents[b]; });
    for (auto first = order.begin(); first != order.end();) {
      const auto last = std::find_if(first, order.end(), [&](int64_t one) { return tree_.parents[one] != tree_.parents[*first]; });
      std::vector<AttentionKeys> ancestors;
      for (const int64_t one : tree_.ancestors(*first)) ancestors.push_back({tree_.keys[one], tree_.key_count(one), -1});
      int64_t queries = 0, keys = 0;
      for (auto one = first; one != last; ++one) queries += tree_.query_count(*one);
      for (const AttentionKeys& one : ancestors) keys += one.count;
      const int64_t enough = std::max(std::min(ENOUGH, keys), queries * group / SHARES);
      int64_t joined = keys == 0 ? 0 : enough;
      for (; first != last; ++first) {
        if (keys == 0 || joined >= enough) all.push_back({0, ancestors, {}}), joined = 0;
        const int64_t count = tree_.query_count(*first);
        all.back().queries.push_back({tree_.queries[*first], count, 0, {tree_.keys[*first], count, -1}});
        all.back().work += count * keys + (causal_ ? count * (count + 1) / 2 : count * count);
        joined += count * group;
      }
    }
  }

  /// A segment's queries in ranges of as good as the same work.
  void cut_into(int64_t ranges, const Part& part, std::vector<Part>& to) const {
    const AttentionQueries& whole = part.queries.front();
    int64_t keys = 0, before = 0, range = -1;
    for (const AttentionKeys& one : part.ancestors) keys += one.count;
    for (int64_t first = 0; first < whole.count; first += kernels().attention_block) {
      const int64_t count = std::min(kernels().attention_block, whole.count - first), last = first + count;
      const int64_t own = count * (keys + (causal_ ? first + (count + 1) / 2 : whole.count)), now = (2 * before + own) * ranges / (2 * part.work);
      before += own;
      if (now != range) to.push_back({0, part.ancestors, {{whole.begin + first, 0, first, {whole.keys.begin, whole.count, -1}}}});
      range = now;
      to.back().work += own;
      to.back().queries.front().count += count;
      if (causal_) to.back().queries.front().keys.count = last;
    }
  }
};

/// The gradients of one segment's keys: sums of what some parts have left, in their order.
struct Shared {
  int64_t segment;
  std::vector<AttentionKeys> shares;
};

/// Arguments that have been checked, and hold what the task points to.
struct Given {
  Tensor q, k, v;
  Tree tree;
  Attention task;
  std::vector<Part> parts;

  Given(
      const Tensor& queries, const Tensor& keys, const Tensor& values, const Tensor& starts, double scale, bool causal,
      const std::optional<Tensor>& segment_parents, const std::optional<Tensor>& key_starts)
      : q(queries), k(keys), v(values) {
    check_cpu(q, "q");
    check(q, "q", {ANY, ANY, ANY}, DTYPES, q);
    check(k, "k", {key_starts ? ANY : q.size(0), ANY, q.size(2)}, {q.scalar_type()}, q);
    check(v, "v", {k.size(0), k.size(1), q.size(2)}, {q.scalar_type()}, q);
    STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "k: got ", describe(k), ", expected heads that divide the ", q.size(1), " of q");
    tree = Tree(q, k, starts, segment_parents, key_starts);
    q = with_dense_heads(q), k = with_dense_heads(k), v = with_dense_heads(v);
    task = {
        kind_of(q), q.size(1), k.size(1), q.size(2), static_cast<float>(scale), causal, q.const_data_ptr(), {q.stride(0), q.stride(1)},
        k.const_data_ptr(), {k.stride(0), k.stride(1)}, v.const_data_ptr(), {v.stride(0), v.stride(1)}};
    Parts found(tree, task.heads, task.kv_heads, causal);
    work_ = found.work;
    parts = std::move(found.all);
  }

  /// Calls the kernel for every head of keys and part, the greatest first: two heads of one part would write into each other's cache lines.
  void run(bool backward) {
    std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.work > b.work; });
    const int64_t count = static_cast<int64_t>(parts.size()), units = count * task.kv_heads;
    int64_t room = 0;
    for (const Part& part : parts) room = std::max(room, kernels().attention_room(part.view(), task.width, backward));
    const int64_t worth = work_ * task.heads * task.width / GRAIN + 1, threads = std::min<int64_t>({torch::stable::get_num_threads(), worth, units});
    const auto kernel = backward ? kernels().attention_backward : kernels().attention;
    std::atomic<int64_t> next = 0;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      const Memory memory(room * sizeof(float));
      for (int64_t unit = next++; unit < units; unit = next++) {
        kernel(task, parts[unit % count].view(), unit / count, memory.as<float>());
      }
    });
  }

  /// Says of every segment's keys where their gradients go: into place, if one part has them all; else each part's share to its own sums. Returns
  /// these, in the memory that task.sums points to until it is gone.
  std::vector<Shared> share(Memory& memory) {
    std::vector<std::vector<AttentionKeys*>> seen(tree.segments());
    const auto note = [&](AttentionKeys& keys) {
      const auto next = std::upper_bound(tree.keys.begin(), tree.keys.end(), keys.begin);  // behind empty segments, which nobody sees
      seen[next - tree.keys.begin() - 1].push_back(&keys);
    };
    for (Part& part : parts) {
      for (AttentionKeys& keys : part.ancestors) note(keys);
      for (AttentionQueries& queries : part.queries) note(queries.keys);
    }
    constexpr int64_t UNIT = 16;  // floats: whole vectors of every instruction set
    task.sum_columns = (task.width + UNIT - 1) / UNIT * UNIT;
    task.sum_stride = 0;
    std::vector<Shared> shared;
    for (int64_t segment = 0; segment < tree.segments(); ++segment) {
      const std::vector<AttentionKeys*>& by = seen[segment];
      if (by.size() == 1 && by.front()->count == tree.key_count(segment)) continue;
      shared.push_back({segment, {}});
      for (AttentionKeys* keys : by) {
        keys->sum = task.sum_stride;
        task.sum_stride += 2 * keys->count * task.sum_columns;
        shared.back().shares.push_back(*keys);
      }
    }
    memory = Memory(task.kv_heads * task.sum_stride * sizeof(float));
    task.sums = memory.as<float>();
    return shared;
  }

  void add_up(const std::vector<Shared>& shared) const {
    constexpr int64_t KEYS = 64;  // at a time
    struct Piece {
      const Shared* of;
      int64_t begin, end;
    };
    std::vector<Piece> pieces;
    for (const Shared& one : shared) {
      const int64_t count = tree.key_count(one.segment);
      for (int64_t begin = 0; begin < count; begin += KEYS) pieces.push_back({&one, begin, std::min(begin + KEYS, count)});
    }
    const int64_t units = static_cast<int64_t>(pieces.size()) * task.kv_heads;
    torch::stable::parallel_for(0, units, GRAIN / (KEYS * task.width) + 1, [&](int64_t first, int64_t last) {
      for (int64_t unit = first; unit < last; ++unit) {
        const auto& [of, begin, end] = pieces[unit / task.kv_heads];
        const int64_t count = static_cast<int64_t>(of->shares.size());
        kernels().attention_sum(task, of->shares.data(), count, unit % task.kv_heads, tree.keys[of->segment], begin, end);
      }
    });
  }

 private:
  int64_t work_;
};

Tensor new_like(const Tensor& x) { return torch::stable::new_empty(x, std::array<int64_t, 3>{x.size(0), x.size(1), x.size(2)}); }

std::tuple<Tensor, Tensor> attention_cpu(
    const Tensor& q,       // [T, H, D]
    const Tensor& k,       // [N, a divisor of H, D]
    const Tensor& v,
    const Tensor& starts,  // [segments + 1] int64
    double scale, bool causal,
    const std::optional<Tensor>& segment_parents,  // [segments] int64: an earlier segment, or -1
    const std::optional<Tensor>& key_starts) {     // [segments + 1] int64; none: as starts
  Given given(q, k, v, starts, scale, causal, segment_parents, key_starts);
  const Tensor out = new_like(q), lse = torch::stable::new_empty(q, std::array<int64_t, 2>{q.size(0), q.size(1)}, ScalarType::Float);
  given.task.out = out.mutable_data_ptr();
  given.task.lse = floats(lse);
  given.run(false);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& dout,  // [T, H, D]
    const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out,  // the forward's, as lse [T, H] float32
    const Tensor& lse, const Tensor& starts, double scale, bool causal, const std::optional<Tensor>& segment_parents,
    const std::optional<Tensor>& key_starts) {
  Given given(q, k, v, starts, scale, causal, segment_parents, key_starts);
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
  Memory shares;
  const std::vector<Shared> shared = given.share(shares);
  given.run(true);
  given.add_up(shared);
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("attention_cpu", TORCH_BOX(&attention_cpu));
  m.impl("attention_backward_cpu", TORCH_BOX(&attention_backward_cpu));
}

}  // namespace fastlora
