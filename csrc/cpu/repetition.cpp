// torch.ops.keju.repetition: the longest stretch of a token sequence that repeats itself back to back, and the share of n-grams
// seen before. rollout/reward/repetition.py defines both. Exact: hashes only rule candidates out, or are checked token by token.
//
// A stretch [start, start + covered) has period p where x[i] = x[i + p] for every i in [start, start + covered - p): a run of
// matches of length covered - p. For each p the search is for runs of at least `need` matches, so as Boyer and Moore's it looks
// first at the far end: given that a run may start at `left` at the earliest, it counts the matches backward from
// left + need - 1. Either that finds a mismatch, and the run starts behind it, or the run is there. About n/need probes serve one
// p, and need is at least (min_count - 1) p: n log n probes in all, each at worst a binary search over prefix hashes. As longer
// runs are found, need grows, and the rest of the search gets shorter.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

namespace keju {
namespace {

// Hashes of the substrings of x: polynomial, modulo 2^64, over mixed token values. Equal substrings have equal hashes.
template <class Token>
class SubstringHash {
 public:
  SubstringHash(const Token* x, int64_t n) : prefix_(n + 1), power_(n + 1) {
    prefix_[0] = 0;
    power_[0] = 1;
    for (int64_t i = 0; i < n; ++i) {
      prefix_[i + 1] = prefix_[i] * kBase + mix(static_cast<uint64_t>(x[i]));
      power_[i + 1] = power_[i] * kBase;
    }
  }

  uint64_t operator()(int64_t start, int64_t length) const { return prefix_[start + length] - prefix_[start] * power_[length]; }

  static uint64_t mix(uint64_t value) {
    value = (value ^ (value >> 31)) * 0x7fb5d329728ea185u + 0x632be59bd9b4e019u;
    return value ^ (value >> 29);
  }

 private:
  static constexpr uint64_t kBase = 0x9e3779b97f4a7c15u | 1u;

  std::vector<uint64_t> prefix_, power_;
};

// One byte of each token's hash, for comparing eight tokens at a time: unequal bytes are unequal tokens, equal bytes need a look.
template <class Token>
class Fingerprints {
 public:
  // As far as `matches_backward` looks.
  static constexpr int64_t kMost = 16;

  Fingerprints(const Token* x, int64_t n) : bytes_(n + kMost) {
    for (int64_t i = 0; i < n; ++i) {
      bytes_[kMost + i] = static_cast<uint8_t>(SubstringHash<Token>::mix(static_cast<uint64_t>(x[i])) >> 24);
    }
  }

  // How many positions match in a row, counted from `last` backward, at most kMost; beyond the sequence's start anything may.
  int64_t matches_backward(int64_t last, int64_t period) const {
    for (int64_t matched = 0; matched < kMost; matched += 8) {
      const uint64_t differ = eight_until(last - matched) ^ eight_until(last - matched + period);
      if (differ != 0) return matched + std::countl_zero(differ) / 8;
    }
    return kMost;
  }

 private:
  static_assert(std::endian::native == std::endian::little, "the last byte is to be the most significant one");

  uint64_t eight_until(int64_t last) const {
    uint64_t word;
    std::memcpy(&word, bytes_.data() + kMost + last - 7, sizeof(word));
    return word;
  }

  std::vector<uint8_t> bytes_;
};

struct Tandem {
  int64_t start = 0;
  int64_t covered = 0;
  int64_t period = 0;
};

template <class Token>
class TandemSearch {
 public:
  TandemSearch(const Token* x, int64_t n, const SubstringHash<Token>& hash)
      : x_(x), n_(n), hash_(hash), fingerprints_(x, n) {}

  // Of equal stretches the first found stays: the smaller period, then the earlier start.
  Tandem longest(int64_t min_count) {
    for (int64_t period = 1; period <= n_ / min_count && best_.covered < n_; ++period) search(period, min_count);
    return best_;
  }

 private:
  void search(int64_t period, int64_t min_count) {
    const int64_t end = n_ - period;
    const int64_t least = (min_count - 1) * period;
    int64_t left = 0;
    while (true) {
      const int64_t need = std::max(least, best_.covered + 1 - period);
      if (left + need > end) return;
      const int64_t matched = matches_backward(left + need - 1, period, need);
      if (matched < need) {
        left += need - matched;
        continue;
      }
      int64_t stop = left + need;
      while (stop < end && x_[stop] == x_[stop + period]) ++stop;
      best_ = {left, stop - left + period, period};
      left = stop + 1;
    }
  }

  // How many of the `need` positions that end at `last` match in a row, counted from `last` backward. May be too large where it
  // is less than need (hashes that agreed by accident), which costs the search a probe and nothing else; need itself is certain.
  int64_t matches_backward(int64_t last, int64_t period, int64_t need) const {
    const int64_t direct = fingerprints_.matches_backward(last, period);
    if (direct < std::min(need, Fingerprints<Token>::kMost)) return direct;
    if (need <= Fingerprints<Token>::kMost) return scan_backward(last, period, need);
    if (hashes_agree(last, period, need)) {
      if (std::equal(x_ + last + 1 - need, x_ + last + 1, x_ + last + 1 - need + period)) return need;
      return scan_backward(last, period, need);
    }
    // Most runs are far shorter than what is needed: first in growing steps, then by halves.
    int64_t equal = direct, unequal = need;
    for (int64_t step = Fingerprints<Token>::kMost; equal + step < unequal; step *= 2) {
      if (!hashes_agree(last, period, equal + step)) unequal = equal + step;
      else equal += step;
    }
    while (unequal - equal > 1) {
      const int64_t middle = equal + (unequal - equal) / 2;
      (hashes_agree(last, period, middle) ? equal : unequal) = middle;
    }
    return equal;
  }

  int64_t scan_backward(int64_t last, int64_t period, int64_t most) const {
    int64_t matched = 0;
    while (matched < most && x_[last - matched] == x_[last - matched + period]) ++matched;
    return matched;
  }

  bool hashes_agree(int64_t last, int64_t period, int64_t length) const {
    const int64_t start = last + 1 - length;
    return hash_(start, length) == hash_(start + period, length);
  }

  const Token* x_;
  int64_t n_;
  const SubstringHash<Token>& hash_;
  const Fingerprints<Token> fingerprints_;
  Tandem best_;
};

// How many n-grams equal one that starts earlier: a hash table of first occurrences, each match verified.
template <class Token>
int64_t repeated_ngrams(const Token* x, int64_t n, int64_t ngram, const SubstringHash<Token>& hash) {
  const int64_t total = n - ngram + 1;
  if (total <= 0) return 0;
  int64_t slots = 2;
  while (slots < 2 * total) slots *= 2;
  std::vector<int32_t> first(slots, -1);
  int64_t repeated = 0;
  for (int64_t i = 0; i < total; ++i) {
    const uint64_t key = hash(i, ngram);
    uint64_t slot = (key * 0xd6e8feb86659fd93u) >> 20;
    for (;; ++slot) {
      int32_t& seen = first[slot & (slots - 1)];
      if (seen < 0) {
        seen = static_cast<int32_t>(i);
        break;
      }
      if (hash(seen, ngram) == key && std::equal(x + i, x + i + ngram, x + seen)) {
        ++repeated;
        break;
      }
    }
  }
  return repeated;
}

template <class Token>
std::tuple<int64_t, int64_t, int64_t, double> measure(const Token* x, int64_t n, int64_t ngram, int64_t min_count) {
  const SubstringHash<Token> hash(x, n);
  const Tandem tandem = TandemSearch<Token>(x, n, hash).longest(min_count);
  const int64_t total = n - ngram + 1;
  const double share = total > 0 ? static_cast<double>(repeated_ngrams(x, n, ngram, hash)) / static_cast<double>(total) : 0.0;
  return {tandem.start, tandem.covered, tandem.period, share};
}

std::tuple<int64_t, int64_t, int64_t, double> repetition(const at::Tensor& token_ids, int64_t ngram, int64_t min_count) {
  TORCH_CHECK_VALUE(token_ids.dim() == 1, "token_ids: expected [n], got ", token_ids.sizes());
  TORCH_CHECK_VALUE(ngram >= 1, "ngram: expected at least 1, got ", ngram);
  TORCH_CHECK_VALUE(min_count >= 2, "min_count: expected at least 2, got ", min_count);
  TORCH_CHECK_VALUE(token_ids.numel() <= INT32_MAX, "token_ids: at most ", INT32_MAX, " tokens, got ", token_ids.numel());
  const at::Tensor ids = token_ids.contiguous();
  if (ids.scalar_type() == at::kInt) return measure(ids.const_data_ptr<int32_t>(), ids.numel(), ngram, min_count);
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong, "token_ids: expected int32 or int64, got ", ids.scalar_type());
  return measure(ids.const_data_ptr<int64_t>(), ids.numel(), ngram, min_count);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(keju, library) {
  library.def(
      "repetition(Tensor token_ids, int ngram, int min_count=3) -> (int start, int covered, int period, float ngram_share)");
}

TORCH_LIBRARY_IMPL(keju, CPU, library) { library.impl("repetition", &repetition); }

}  // namespace keju
