// torch.ops.keju.empty_reused: uninitialised memory that was touched before. PyTorch gives a large CPU tensor back to the system when
// it is freed, so that the next one of its size faults in every page again, which takes longer than filling it does. Here ONE block
// is kept when its tensor is freed, and handed out again to a request of about its size. Huge pages would do as well, but not where
// the machine has none ready.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

namespace keju {
namespace {

// Below, the allocator keeps memory by itself.
constexpr size_t kLeastBytes = size_t{4} << 20;
constexpr size_t kAlignment = 64;

struct Block {
  void* memory = nullptr;
  size_t bytes = 0;
};

// Never destroyed: tensors may be freed after static objects are.
struct Keep {
  std::mutex mutex;
  Block block;
};

Keep& keep() {
  static Keep* const one = new Keep;
  return *one;
}

Block exchange_kept(Block block) {
  const std::lock_guard<std::mutex> lock(keep().mutex);
  return std::exchange(keep().block, block);
}

// The block used last is kept: it is the one that is asked for again.
void give_back(Block block) { std::free(exchange_kept(block).memory); }

Block take(size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(keep().mutex);
    Block& kept = keep().block;
    if (bytes <= kept.bytes && kept.bytes <= 2 * bytes) return std::exchange(kept, Block{});
  }
  void* memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (memory == nullptr) throw std::bad_alloc();
  return {memory, bytes};
}

at::Tensor empty_reused(at::IntArrayRef shape, at::ScalarType dtype) {
  size_t bytes = c10::elementSize(dtype);
  for (const int64_t size : shape) {
    TORCH_CHECK_VALUE(size >= 0, "shape: expected no negative sizes, got ", shape);
    bytes *= static_cast<size_t>(size);
  }
  const auto options = at::TensorOptions().dtype(dtype).device(at::kCPU);
  if (bytes < kLeastBytes) return at::empty(shape, options);
  const Block block = take(bytes);
  return at::from_blob(block.memory, shape, [block](void*) { give_back(block); }, options);
}

// Bytes held while nobody uses them; they are freed.
int64_t release_reused() {
  const Block block = exchange_kept({});
  std::free(block.memory);
  return static_cast<int64_t>(block.bytes);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(keju, library) {
  library.def("empty_reused(int[] shape, ScalarType dtype) -> Tensor", &empty_reused);
  library.def("release_reused() -> int", &release_reused);
}

}  // namespace keju
