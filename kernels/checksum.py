"""A 64-bit checksum of a tensor's bytes, for weights on their way to an engine: the same number on a CPU and on a GPU.

The bytes, filled up with zeros to whole blocks of 4096, are words (a, b) of two little-endian 32-bit halves, 512 to a block.
With the keys K_i = mix((i + 1) G), their halves (p_i, q_i), and block number n counted from 0:

    a' = (a + p_i) mod 2^32        b' = (b + q_i) mod 2^32
    digest_n = sum_i a' b' + (a' + 2^32 b')                             mod 2^64
    checksum = mix(sum_n mix(digest_n + (n + 1) G) + (bytes + 1) G)     mod 2^64

The sum of products is NH of UMAC (Black, Halevi, Krawczyk, Krovetz and Rogaway, CRYPTO 1999; RFC 4418), which XXH3 (Collet)
also builds on; like XXH3 it adds the word itself, since NH alone cannot see a where b' = 0. mix is SplitMix64's (Steele, Lea and
Flood, OOPSLA 2014: Stafford's variant 13), a bijection; G = 2^64/golden ratio. Blocks are independent, so threads and GPUs may
take them in any order.

Certain: of two tensors of one length that differ in a single 32-bit half (a bit, a byte, a bf16, an fp32), the checksums
differ. So do those of two lengths that end in the same block and agree up to zeros. Because a' b' + a' + 2^32 b' = (a' +
2^32)(b' + 1) - 2^32, a change of a' by d, 0 < |d| < 2^32, is one of d (b' + 1), which lies between ±2^64 and is not 0; one of
b' is d (a' + 2^32), which is less than 2^65 in size, and ±2^64 only if a' + 2^32 divides it, so if a' = 0 and |d| = 2^32. The
rest is a bijection of one digest.

Only probable: everything else (swaps, shifts, other lengths, damage in several words). Damage without any relation to the keys
goes unseen about once in 2^64; the worst that NH allows, two words of a block changed so that their products may cancel, about
once in 2^32. Nothing here resists a forger: the keys are public.

On a CPU csrc/cpu/checksum*.cpp computes it at the speed of memory; plain PyTorch here does elsewhere.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernels import backend

BLOCK_BYTES = 4096
CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
"""What plain PyTorch takes at a time, a multiple of BLOCK_BYTES; it needs three times as much beside. A CPU's stays cached."""

_GOLDEN = 0x9E3779B97F4A7C15
_LOW_HALF = 0xFFFFFFFF
_MOD = 1 << 64


def checksum(tensor: Tensor, *, threads: int = 1) -> int:
    """The checksum, in [0, 2^64), of a contiguous tensor's bytes: any shape and dtype, CPU or CUDA. Formula: this module's head.

    threads: at most so many share the work on a CPU, some MiB or more for each; the result does not depend on it. On
    CUDA it waits for the device once. Raises ValueError for a tensor that is not contiguous, or threads below 1.
    """
    _check_contiguous("tensor", tensor)
    _check_threads(threads)
    if _is_native(tensor):
        return torch.ops.keju.checksum_native(tensor.detach(), threads) % _MOD
    return _plain_checksum(tensor)


def copy_checksum(source: Tensor, target: Tensor, *, threads: int = 1) -> int:
    """Copies source into target, as `target.copy_(source)`, and returns the checksum of the target's bytes.

    Contiguous, of one shape, not overlapping; devices and dtypes as copy_ takes them. On a CPU, where the dtypes are equal or
    fp32 becomes bf16, it is one read and one write and the checksum is of what was MEANT to be written, taken on the way;
    elsewhere it is of what the target holds afterwards. A target of some MiB that begins at a multiple of 64 is written past the
    caches.
    threads and errors as `checksum`'s; ValueError also for shapes that differ.
    """
    _check_contiguous("source", source)
    _check_contiguous("target", target)
    _check_threads(threads)
    if source.shape != target.shape:
        raise ValueError(f"target: expected {list(source.shape)} as source, got {list(target.shape)}")
    kept = source.dtype == target.dtype or (source.dtype == torch.float32 and target.dtype == torch.bfloat16)
    if kept and _is_native(source) and _is_native(target):
        return torch.ops.keju.copy_checksum_native(source.detach(), target.detach(), threads) % _MOD
    target.detach().copy_(source.detach())
    return checksum(target, threads=threads)


def _is_native(tensor: Tensor) -> bool:
    return tensor.is_cpu and backend.loss_path("cpu") == "native"


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got {list(tensor.shape)} with strides {list(tensor.stride())}")


def _check_threads(threads: int) -> None:
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")


def _plain_checksum(tensor: Tensor) -> int:
    """The definition in int64 arithmetic, which wraps as the formula's does, on any device."""
    bytes_N = tensor.detach().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    chunk = CHUNK_BYTES.get(tensor.device.type, CHUNK_BYTES["cuda"])
    for start in range(0, bytes_N.numel(), chunk):
        digest_B = _digests(_whole_blocks(bytes_N[start : start + chunk]))
        first = start // BLOCK_BYTES
        number_B = torch.arange(first + 1, first + 1 + digest_B.numel(), device=tensor.device)
        total += _mix_tensor(digest_B + number_B * _signed(_GOLDEN)).sum()
    return _mix(int(total) + (bytes_N.numel() + 1) * _GOLDEN)


def _whole_blocks(bytes_N: Tensor) -> Tensor:
    """[B, 512] words, as int64; a copy where the last block needs zeros or a word would lie across an address of words."""
    missing = -bytes_N.numel() % BLOCK_BYTES
    if missing:
        bytes_N = torch.nn.functional.pad(bytes_N, (0, missing))
    elif bytes_N.data_ptr() % 8 or bytes_N.storage_offset() % 8:
        bytes_N = bytes_N.clone()
    return bytes_N.view(torch.int64).view(-1, BLOCK_BYTES // 8)


def _digests(words_BW: Tensor) -> Tensor:
    halves = words_BW.view(torch.int32) + _keys(words_BW.device).view(torch.int32)
    x_BW = halves.view(torch.int64)
    low_BW = x_BW & _LOW_HALF
    return low_BW.mul_((x_BW >> 32).bitwise_and_(_LOW_HALF)).add_(x_BW).sum(1)


@functools.cache
def _keys(device: torch.device) -> Tensor:
    keys = [_signed(_mix((i + 1) * _GOLDEN)) for i in range(BLOCK_BYTES // 8)]
    return torch.tensor(keys, dtype=torch.int64, device=device)


def _mix(z: int) -> int:
    z %= _MOD
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % _MOD
    z = (z ^ z >> 27) * 0x94D049BB133111EB % _MOD
    return z ^ z >> 31


def _mix_tensor(z: Tensor) -> Tensor:
    """`_mix` of int64; `>>` on those copies the sign, which the masks take off again."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return z ^ (z >> 31 & (1 << 33) - 1)


def _signed(value: int) -> int:
    """The int64 with these 64 bits."""
    return value - _MOD if value >= _MOD // 2 else value
